"""The border to vLLM, with a module of its public interface that answers with our engine. vLLM itself is not run."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from types import SimpleNamespace as Record

import pytest

from tests.serve.live import serving
from tests.serve.test_api import alone
from tests.serve.test_chat import adapter_folder
from tests.serve.test_opening import HELLO, asked_at_once
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.generate.engine import Engine, Request
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import open_speaker
from zhibei.serve.opening import Loading, Wanted, open_all
from zhibei.serve.settings import ServerSettings
from zhibei.serve.vllm_engine import rank_for

pytest.importorskip("openai")


class FakeEngine:
    """vLLM's `LLMEngine` as far as it is used: requests of all adapters together, tokens so far with each step."""

    started: list[dict] = []

    def __init__(self, **settings) -> None:
        self.started.append(settings)
        self.engines, self.open, self.so_far = {}, {}, {}
        self.settings = settings

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(**vars(arguments))

    def add_request(self, id, prompt, way, lora_request=None) -> None:
        path = lora_request.path if lora_request else self.settings["model"]
        if path not in self.engines:
            speaker = open_speaker(path, template="vicuna_v1.1", device="cpu")
            self.engines[path] = Engine(speaker.model.hf, slots=4)
        options = SamplingOptions(max_new_tokens=way.max_tokens, temperature=way.temperature, seed=way.seed % 2**62)
        request = Request(prompt["prompt_token_ids"], options, way.stop_token_ids, top_logprobs=way.logprobs)
        self.open[id] = (path, self.engines[path].submit(request))

    def step(self):
        found = []
        for path, engine in self.engines.items():
            ids = {ours: id for id, (where, ours) in self.open.items() if where == path}
            for ours, piece in engine.step():
                if piece.answer is None or ours not in ids:
                    continue
                answer, id = piece.answer, ids[ours]
                rows = [{token: Record(logprob=logp)} for token, logp in zip(answer.tokens, answer.logps, strict=True)]
                # Some tokens first and all of them then, as vLLM's cumulative outputs come.
                for count in (len(rows) // 2, len(rows)):
                    part = Record(token_ids=answer.tokens[:count], logprobs=rows[:count], finish_reason=None)
                    found.append(Record(request_id=id, outputs=[part]))
        return found

    def abort_request(self, ids) -> None:
        for id in ids:
            path, ours = self.open.pop(id)
            self.engines[path].cancel(ours)


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLMEngine, module.EngineArgs, module.SamplingParams = FakeEngine, Record, Record
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: Record(name=name, number=number, path=path)
    for name, one in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, one)
    FakeEngine.started.clear()


def opened_with(*wanted: Wanted, **more):
    loading = Loading(template="vicuna_v1.1", engine="vllm", **more)
    return open_all(wanted, ServerSettings(), loading, watch=lambda _: None)


def test_a_base_and_its_adapter_share_one_engine_and_answer_as_they_do_alone(tmp_path, vllm):
    base = tiny_model_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base)
    hosted = opened_with(Wanted("plain", str(base)), Wanted("poet", str(adapter), True))
    assert [(one["max_loras"], one["max_lora_rank"]) for one in FakeEngine.started] == [(1, 8)]
    expected = {
        name: alone(
            open_speaker(str(path), template="vicuna_v1.1", device="cpu"), HELLO, temperature=0, max_new_tokens=16
        )
        for name, path in (("plain", base), ("poet", adapter))
    }
    with serving(hosted) as live:
        assert asked_at_once(live, ["plain", "poet"] * 3) == [expected[n].text for n in ["plain", "poet"] * 3]
        text = expected["plain"].text
        body = {"model": "plain", "messages": HELLO, "temperature": 0, "max_tokens": 16, "stop": [text[4:6]]}
        cut = live.post("/v1/chat/completions", body).json()["choices"][0]
        assert (cut["message"]["content"], cut["finish_reason"]) == (text[: text.index(text[4:6])], "stop")
        live.wait_until_idle()
        for refused in ({"response_format": {"type": "json_object"}}, {"max_tokens": 500}):
            assert live.post("/v1/chat/completions", {**body, **refused}).status_code == 400
        assert live.post("/v1/embeddings", {"model": "plain", "input": "a"}).status_code == 400


def test_the_rank_that_vllm_reserves_holds_every_adapter(tmp_path):
    folders = []
    for number, config in enumerate(({"r": 4}, {"r": 8, "rank_pattern": {"q_proj": 40}})):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    assert (rank_for(folders[:1]), rank_for(folders)) == (8, 64)
    (folders[0] / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(UserError, match="rank 1024"):
        rank_for(folders)


def test_what_vllm_decides_itself_is_refused(tmp_path, vllm):
    folder = str(tiny_model_folder(tmp_path))
    for more in ({"quantize": "nf4"}, {"device": "cpu"}):
        with pytest.raises(UserError, match="with --engine vllm"):
            opened_with(Wanted("a", folder), **more)


def test_without_vllm_it_says_what_to_install(tmp_path):
    if "vllm" in sys.modules:
        pytest.skip("vLLM is installed here")
    with pytest.raises(UserError, match="not installed") as error:
        opened_with(Wanted("a", str(tiny_model_folder(tmp_path))))
    assert "pip install vllm" in error.value.fix
