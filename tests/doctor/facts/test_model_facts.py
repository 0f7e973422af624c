"""Facts of model folders, broken one at a time: what is read from files alone, and that sound ones give no finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.doctor.healthy import broken, healthy
from tests.tiny import FAMILIES, tiny_model, tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.doctor.facts.model import AdapterFacts, ModelFacts, read_adapter_facts, read_model, with_row_norms
from zhibei.doctor.pitfalls import model as pitfalls
from zhibei.store.manifest import model_fingerprint

CHECKS = [
    pitfalls.weights_not_finite,
    pitfalls.weights_incomplete,
    pitfalls.weights_do_not_fit_config,
    pitfalls.weights_all_zero,
    pitfalls.weights_far_too_large,
]


def facts_of(folder: Path | str) -> ModelFacts:
    return read_model(ModelSection(path=str(folder)), LoraSection(), cache=Path(str(folder)) / ".cache")


def findings_of(folder: Path | str) -> list[str]:
    facts = broken(healthy(), "model", facts_of(folder))
    return [f"{check.__name__}: {finding.what}" for check in CHECKS for finding in check(facts)]


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_folder_is_described_as_the_model_itself_would(tmp_path: Path, family: str) -> None:
    folder = tiny_model_folder(tmp_path, family)
    found, model = facts_of(folder), tiny_model(family)
    assert findings_of(folder) == []
    assert found.scanned_share == 1.0
    assert found.embedding_rows == model.get_input_embeddings().weight.shape[0] == 300
    assert found.is_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert found.dtype == "float32"
    assert found.fingerprint == model_fingerprint(folder)
    assert set(found.module_names) <= {name for name, _ in model.named_modules()}
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(found.linear_names) == linears - {"lm_head"}
    assert found.shape is not None
    assert found.shape.vocabulary == 300


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_the_real_models_are_sound(shared: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = shared("data", "models", name)
    found = read_model(ModelSection(path=str(folder)), LoraSection(), cache=tmp_path)
    facts = broken(healthy(), "model", found)
    assert [finding for check in CHECKS for finding in check(facts)] == []
    assert (found.is_tied, found.scanned_share, found.generation_config_fault) == (True, 1.0, "")
    norms = with_row_norms(found, [0, 1, 2])
    assert norms.median_row_norm is not None
    assert all(0.2 * norms.median_row_norm < norm < 5 * norms.median_row_norm for norm in norms.row_norms.values())


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()


def _wild(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = 1e30


def _other_width(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.ones(310, 32)


def _no_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_nan, "weights_not_finite: 1 of"),
        (_zero, "weights_all_zero: 1 matrices are all zero: model.layers.0.mlp.down_proj.weight"),
        (_wild, "weights_far_too_large: 1 tensors hold values beyond 10,000; lm_head.weight reaches 1e+30"),
        (_other_width, "weights_do_not_fit_config: "),
        (_no_layer, "weights_do_not_fit_config: "),
    ],
)
def test_broken_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], says: str) -> None:
    (finding,) = findings_of(changed(folder, change))
    assert finding.startswith(says)


def test_a_cut_file_and_a_cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size, says in ((len(whole) - 10, "truncated to"), (100, "header truncated"), (3, "only 3 bytes")):
        file.write_bytes(whole[:size])
        (finding,) = findings_of(folder)
        assert finding.startswith("weights_incomplete")
        assert says in finding


def test_shards_and_their_index(folder: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    sound = tmp_path / "shards"
    assert findings_of(sound) == []
    assert facts_of(sound).tensors == facts_of(folder).tensors
    shards = sorted(sound.glob("model-*.safetensors"))
    assert len(shards) > 2
    lost = shards[1].read_bytes()
    shards[1].unlink()
    found = facts_of(sound)
    assert found.missing_files == (shards[1].name,)
    (finding,) = findings_of(sound)
    assert shards[1].name in finding
    shards[1].write_bytes(lost[:-1])
    (finding,) = findings_of(sound)
    assert "truncated" in finding


def test_pickles_are_named_and_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never a pickle")
    assert findings_of(folder) == []
    (folder / "model.safetensors").unlink()
    (finding,) = findings_of(folder)
    assert "only pickled weights (pytorch_model.bin)" in finding
    (folder / "pytorch_model.bin").unlink()
    (finding,) = findings_of(folder)
    assert "no file of weights" in finding


def settings(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_generation_config_quantisation_and_broken_json(folder: Path) -> None:
    settings(folder, "generation_config.json", top_p=0.6)
    assert "top_p is 0.6" in facts_of(folder).generation_config_fault
    settings(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert facts_of(folder).quant_method == "gptq"
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        facts_of(folder)


def test_a_hub_id_gives_its_name_until_it_is_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert facts_of("some-org/some-model") == ModelFacts(path="some-org/some-model")
    download = tmp_path / "hub" / "models--some-org--some-model"
    (download / "refs").mkdir(parents=True)
    (download / "refs" / "main").write_text("abc123")
    (download / "snapshots").mkdir()
    folder.rename(download / "snapshots" / "abc123")
    found = read_model(ModelSection(path="some-org/some-model"), LoraSection(), cache=tmp_path)
    assert found.folder == download / "snapshots" / "abc123"
    assert found.embedding_rows == 300


def test_the_manifest_of_the_run_a_model_came_from(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    folder.rename(run / "model")
    manifest = {"format": 1, "tokenizer": {"sha256": "x"}, "base": {"fingerprint": "f" * 64}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    for path in (run, run / "model"):
        assert facts_of(path).parent_manifest == manifest


def adapter(folder: Path, tensors: dict[str, torch.Tensor] | None) -> AdapterFacts:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "b"})
    )
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return read_adapter_facts(folder)


def test_adapters_sound_untrained_empty_and_broken(tmp_path: Path) -> None:
    names = [f"base_model.model.layers.{n}.q_proj.lora" for n in range(2)]
    trained = {f"{name}_{side}.weight": torch.ones(2, 2) for name in names for side in "AB"}
    found = adapter(tmp_path / "sound", trained)
    assert (found.fault, found.zero_tensors, len(found.tensors)) == ("", (), 4)
    assert found.config["base_model_name_or_path"] == "b"
    zero = {name: torch.zeros(2, 2) if "_B" in name else tensor for name, tensor in trained.items()}
    assert len(adapter(tmp_path / "untrained", zero).zero_tensors) == 2
    assert adapter(tmp_path / "empty", {}).tensors == {}
    assert "no adapter_model.safetensors" in adapter(tmp_path / "none", None).fault
    assert (
        "NaN or infinity"
        in adapter(tmp_path / "nan", {**trained, f"{names[0]}_A.weight": torch.full((2, 2), torch.nan)}).fault
    )
    shards_0 = {name: torch.ones(0) for name in trained}
    assert all(shape == (0,) for _, shape in adapter(tmp_path / "zero3", shards_0).tensors.values())
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"no")
    assert "only pickled weights" in adapter(tmp_path / "pickle", None).fault
    with pytest.raises(UserError, match="no such folder"):
        read_adapter_facts(tmp_path / "nowhere")


def test_an_adapter_in_its_run_knows_its_base(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    adapter(run / "model", {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)})
    (run / "manifest.json").write_text(json.dumps({"format": 1, "base": {"fingerprint": "f" * 64}}))
    for path in (run, run / "model"):
        assert read_adapter_facts(path).base_fingerprint == "f" * 64
