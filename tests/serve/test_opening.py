"""Several models in one server: names, adapters that share a base, reports, and what cannot be opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.serve.live import serving
from tests.serve.test_api import alone, opened
from tests.serve.test_chat import adapter_folder
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.serve.chat import open_speaker
from zhibei.serve.opening import Wanted, close_all, read_wanted, report_of

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Hello"}]


def adapters(tmp_path: Path, base: Path) -> list[Path]:
    """Two adapters that differ, on one base."""
    import torch
    from safetensors.torch import load_file, save_file

    first = adapter_folder(tmp_path / "first", base)
    second = adapter_folder(tmp_path / "second", base)
    file = second / "adapter_model.safetensors"
    save_file({name: torch.flip(tensor, [0]).contiguous() for name, tensor in load_file(file).items()}, file)
    return [first, second]


def test_adapters_share_their_base_and_each_answers_as_it_does_alone(tmp_path):
    """Requests for all three at once, on one set of weights."""
    base = tiny_model_folder(tmp_path)
    first, second = adapters(tmp_path, base)
    wanted = [Wanted("plain", str(base)), Wanted("first", str(first), True), Wanted("second", str(second), True)]
    hosted = opened(*wanted)
    assert len({one.worker for one in hosted.values()}) == 1
    assert len({id(one.speaker.model.hf) for one in hosted.values()}) == 1
    expected = {}
    for one in wanted:
        speaker = open_speaker(one.path, template="vicuna_v1.1", device="cpu")
        expected[one.name] = alone(speaker, HELLO, temperature=0, max_new_tokens=16).text
    assert len(set(expected.values())) == 3, "three models that differ"
    with serving(hosted) as live:
        assert asked_at_once(live, list(expected) * 4) == [expected[name] for name in list(expected) * 4]
        card = live.get("/v1/models/first").json()
        assert card["parent"] == base.name


def asked_at_once(live, names: list[str]) -> list[str]:
    import asyncio

    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        said = await asyncio.gather(
            *(
                client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=16)
                for name in names
            )
        )
        return [one.choices[0].message.content for one in said]

    return asyncio.run(ask())


def test_two_models_of_their_own_have_workers_of_their_own(tmp_path):
    one, two = tiny_model_folder(tmp_path, seed=1, name="one"), tiny_model_folder(tmp_path, seed=2, name="two")
    hosted = opened(*read_wanted([str(one), f"other={two}"], []))
    assert list(hosted) == ["one", "other"]
    assert hosted["one"].worker is not hosted["other"].worker
    close_all(hosted)


@pytest.mark.parametrize(
    ("paths", "adapter", "what"),
    [
        (["a/model", "b/model"], [], "both be called model"),
        (["a=x", "b=y"], ["a=z"], "both be called a"),
        (["a"], ["no-name"], "--adapter no-name"),
    ],
)
def test_names_are_checked_before_anything_is_read(paths, adapter, what):
    with pytest.raises(UserError, match=what):
        read_wanted(paths, adapter)


def test_an_adapter_needs_its_base_among_the_models(tmp_path):
    base, other = tiny_model_folder(tmp_path), tiny_model_folder(tmp_path, seed=4, name="other")
    adapter = adapter_folder(tmp_path, base)
    with pytest.raises(UserError, match="which is not served") as error:
        opened(Wanted("other", str(other)), Wanted("poet", str(adapter), True))
    assert str(base) in error.value.fix
    with pytest.raises(UserError, match="is a whole model"):
        opened(Wanted("base", str(base)), Wanted("poet", str(other), True))


def test_an_adapter_alone_on_its_base_is_told_to_merge(tmp_path):
    base = tiny_model_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base)
    alone_on_it = opened(Wanted("poet", str(adapter)))
    assert "zhibei merge" in alone_on_it["poet"].notes[-1]
    close_all(alone_on_it)
    beside = opened(Wanted("base", str(base)), Wanted("poet", str(adapter)))
    assert beside["poet"].notes == beside["base"].notes == ()
    close_all(beside)


def test_slots_that_do_not_fit_the_gpu_are_said(tmp_path, monkeypatch):
    """On a card of which 1 MiB is free; the tiny model's keys and values take 2 x 16 x 4 x 2 bytes a token."""
    import torch

    from tests.tiny import tiny_model
    from zhibei.serve.opening import _memory_note
    from zhibei.serve.settings import ServerSettings

    model = tiny_model()
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 4)
    monkeypatch.setattr(model, "get_input_embeddings", lambda: SimpleNamespace(weight=weight))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    per_token = 2 * 16 * 4 * 2
    fitting = 2**20 // (per_token * 256)
    assert _memory_note(model, ServerSettings(slots=fitting), num_lanes=1) == ()
    (note,) = _memory_note(model, ServerSettings(slots=fitting + 1), num_lanes=1)
    assert "lower --slots" in note
    assert _memory_note(model, ServerSettings(slots=fitting), num_lanes=2) != ()
    assert _memory_note(model, ServerSettings(slots=fitting + 1, context_tokens=128), num_lanes=1) == ()


def test_the_report_of_a_run_is_found_from_the_run_and_from_its_model(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    assert report_of(str(run)) is None
    (run / "report.html").write_text("<p>")
    assert report_of(str(run)) == run / "report.html"
    assert report_of("some/hub-id") is None
