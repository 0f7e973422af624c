"""Every kind of damage to a checkpoint, a run, a model or an adapter is named; sound ones pass."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.shared_data import shared_path
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.store.checkpoint import save_checkpoint
from zhibei.store.manifest import DESCRIBED, finish_manifest, new_manifest, write_manifest
from zhibei.store.pipeline_dir import write_pipeline
from zhibei.store.shards import DTYPES, save_tensors
from zhibei.store.verify import inspect_folder, verify_folder
from zhibei.store.weights import inspect_weights

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 12, 20, 3


def llama_tensors() -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for number in range(LAYERS):
        prefix = f"model.layers.{number}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape)
    tensors["lm_head.weight"] = torch.randn(VOCABULARY, HIDDEN)
    return tensors


def model_folder(folder: Path) -> Path:
    save_tensors(folder, llama_tensors(), stem="model", max_shard_bytes=2000)
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {chr(97 + number): number for number in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Save all weights anew, as one file, after a change that no size or hash gives away."""
    tensors = llama_tensors()
    change(tensors)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    tensors[name] = value


def only_pickle(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")


UP = "model.layers.1.mlp.up_proj.weight"
MODEL_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda folder: os.truncate(first_shard(folder), 900), "truncated to 900 of"),
    "missing shard": (lambda folder: first_shard(folder).unlink(), "which is missing"),
    "shard of another save": (
        lambda folder: shutil.copy(first_shard(folder), folder / "model-00099-of-00099.safetensors"),
        "is also in model-00001",
    ),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "missing, although there are"),
    "index of another save": (
        lambda folder: edit_json(folder / "model.safetensors.index.json", weight_map={UP: first_shard(folder).name}),
        "is not in the index",
    ),
    "empty index": (lambda folder: (folder / "model.safetensors.index.json").write_text(""), "not JSON"),
    "NaN": (
        lambda folder: rewrite(folder, lambda tensors: tensors[UP].view(-1)[3:5].fill_(float("nan"))),
        f"tensor {UP}: 2 NaN and 0 infinite of 96 values",
    ),
    "infinity": (
        lambda folder: rewrite(folder, lambda tensors: tensors["lm_head.weight"].view(-1)[0].fill_(float("-inf"))),
        "0 NaN and 1 infinite of 160 values",
    ),
    "lost tensor": (lambda folder: rewrite(folder, lambda tensors: tensors.pop(UP)), "layer 1 lacks mlp.up_proj"),
    "lost layer": (
        lambda folder: rewrite(
            folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if ".layers.2." in name]
        ),
        "num_hidden_layers is 3, and of the weights layers [2] are missing",
    ),
    "lost head": (lambda folder: rewrite(folder, lambda tensors: tensors.pop("lm_head.weight")), "no tensor lm_head"),
    "emptied tensor": (
        lambda folder: rewrite(folder, lambda tensors: swap(tensors, UP, torch.empty(0))),
        f"tensor {UP} is empty: shape [0]",
    ),
    "turned tensor": (
        lambda folder: rewrite(folder, lambda tensors: swap(tensors, UP, torch.zeros(HIDDEN, INNER))),
        "has shape [8, 12], config.json says [12, 8]",
    ),
    "config of another model": (
        lambda folder: edit_json(folder / "config.json", vocab_size=32),
        "has shape [20, 8], config.json says [32, 8]",
    ),
    "tokenizer too large": (
        lambda folder: edit_json(folder / "tokenizer.json", added_tokens=[{"id": VOCABULARY, "content": "<pad>"}]),
        "has token id 20, but config.json says vocab_size 20",
    ),
    "only pickle": (only_pickle, "pickle file: not opened"),
    "cut config": (lambda folder: (folder / "config.json").write_text('{"model'), "not readable JSON"),
    "cut generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"), "not readable JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), MODEL_DAMAGES.values(), ids=MODEL_DAMAGES)
def test_damage_to_a_model_folder_is_named(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert verify_folder(folder) == []
    damage(folder)
    problems = [str(problem) for problem in verify_folder(folder)]
    assert any(said in problem for problem in problems), problems


def test_tied_heads_and_other_families_pass_and_pickle_beside_weights_is_a_note(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "tied")
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert verify_folder(folder) == []
    edit_json(folder / "config.json", model_type="mamba", vocab_size=99)
    assert verify_folder(folder) == []
    (folder / "training_args.bin").write_bytes(b"\x80\x02")
    verdict = inspect_folder(folder)
    assert verdict.is_sound
    (said,) = (file.notes for file in verdict.files if file.path.name == "training_args.bin")
    assert said[0].startswith("pickle file: not opened")


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.is_floating_point])
def test_nan_is_seen_in_every_floating_dtype(name: str, tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), 2.0]).to(DTYPES[name])
    save_tensors(tmp_path, {"bad": values, "good": torch.ones(2).to(DTYPES[name])}, stem="model")
    findings, _ = inspect_weights(tmp_path / "model.safetensors")
    assert findings.problems == ["tensor bad: 1 NaN and 0 infinite of 3 values"]


def adapter_folder(folder: Path, *, b_value: float = 1.0) -> Path:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(2, HIDDEN),
        f"{prefix}.lora_B.weight": torch.full((HIDDEN, 2), b_value),
    }
    save_tensors(folder, tensors, stem="adapter_model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def drop_lora_b(folder: Path) -> None:
    tensors = {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "_A" in name}
    save_file(tensors, folder / "adapter_model.safetensors")


ADAPTER_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda folder: save_file({}, folder / "adapter_model.safetensors"), "empty adapter"),
    "half a pair": (drop_lora_b, "has no lora_B beside it"),
    "another rank": (lambda folder: edit_json(folder / "adapter_config.json", r=8), "has rank 2, adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no adapter"),
    "only pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "pickle file: not opened",
    ),
}


@pytest.mark.parametrize(("damage", "said"), ADAPTER_DAMAGES.values(), ids=ADAPTER_DAMAGES)
def test_damage_to_an_adapter_folder_is_named(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter")
    assert verify_folder(folder) == []
    assert inspect_folder(folder).kind == "adapter"
    damage(folder)
    problems = [str(problem) for problem in verify_folder(folder)]
    assert any(said in problem for problem in problems), problems


def test_an_untrained_adapter_is_noted(tmp_path: Path) -> None:
    verdict = inspect_folder(adapter_folder(tmp_path, b_value=0.0))
    assert verdict.is_sound
    assert [note for file in verdict.files for note in file.notes] == [
        "all 1 lora_B matrices are zero: this adapter changes nothing"
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_manifest(run, new_manifest({name: name for name in DESCRIBED}, device_name="cpu"))
    run_id = json.loads((run / "manifest.json").read_text())["run_id"]
    for step in (1, 2):
        save_checkpoint(run / "checkpoints", step, groups={"model": llama_tensors()}, state={"run_id": run_id})
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "time": 0, "loss": 2.5}\n')
    (run / "ledger.jsonl").write_text("")
    (run / "proofs.json").write_text('[{"name": "logits", "passed": true, "detail": ""}]')
    model_folder(run / "model")
    finish_manifest(run, {"steps": 2})
    return run


def foreign_checkpoint(run: Path) -> None:
    save_checkpoint(run / "checkpoints", 3, groups={}, state={"run_id": "another"})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


RUN_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda run: (run / "manifest.json").rename(run / "resolved.yaml"), "no manifest.json"),
    "flipped bit in a checkpoint": (
        lambda run: flip(run / "checkpoints/step-000001/model.safetensors"), "hash differs",
    ),
    "flipped bit in the model": (lambda run: flip(first_shard(run / "model")), "hash differs from the one in the"),
    "missing model file": (lambda run: (run / "model/tokenizer.json").unlink(), "tokenizer.json: missing"),
    "missing model": (lambda run: shutil.rmtree(run / "model"), "the manifest says that the run finished"),
    "failed proof": (
        lambda run: (run / "proofs.json").write_text('[{"name": "logits", "passed": false, "detail": "0.5"}]'),
        "proof logits failed: 0.5",
    ),
    "foreign checkpoint": (foreign_checkpoint, "belongs to run another"),
    "damaged metrics": (lambda run: (run / "metrics.jsonl").write_text("x\n{}\n"), "line 1: not a metrics record"),
    "damaged ledger": (lambda run: (run / "ledger.jsonl").write_text("x\n"), "line 1: not a ledger entry"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), RUN_DAMAGES.values(), ids=RUN_DAMAGES)
def test_damage_to_a_run_is_named(damage: Callable[[Path], Any], said: str, run_dir: Path) -> None:
    assert verify_folder(run_dir) == []
    damage(run_dir)
    problems = [str(problem) for problem in verify_folder(run_dir)]
    assert any(said in problem for problem in problems), problems


def test_a_pipeline_is_verified_stage_by_stage(run_dir: Path) -> None:
    folder = run_dir.parent
    write_pipeline(folder, stages=["run"], final="run")
    verdict = inspect_folder(folder)
    assert (verdict.kind, verdict.is_sound, len(verdict.files)) == ("pipeline", True, 18)
    flip(first_shard(run_dir / "model"))
    assert [problem.path for problem in verify_folder(folder)] == [str(first_shard(run_dir / "model"))]
    write_pipeline(folder, stages=["run", "lost"], final="run")
    assert "missing, although pipeline.json names this stage" in [problem.what for problem in verify_folder(folder)]
    (folder / "pipeline.json").write_text("{}")
    assert [problem.what for problem in verify_folder(folder)] == ["names no stages"]


def test_left_overs_and_a_torn_line_of_a_killed_run_are_notes(run_dir: Path) -> None:
    (run_dir / "checkpoints" / ".writing-step-000003-1").mkdir()
    (run_dir / ".writing-model-1").mkdir()
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    verdict = inspect_folder(run_dir)
    assert verdict.is_sound
    assert sum(bool(file.notes) for file in verdict.files) == 3
    assert (run_dir / "checkpoints" / ".writing-step-000003-1").exists()


def test_real_models_are_sound() -> None:
    for name in ("stories260K", "stories3M"):
        verdict = inspect_folder(shared_path("data", "models", name))
        assert verdict.is_sound, verdict.problems
        assert max(file.num_tensors for file in verdict.files) > 40


def test_what_we_do_not_know_is_a_user_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(UserError):
            verify_folder(path)


def test_the_command_says_what_it_found_and_exits_with_0_or_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(run_dir)]) == 0
    assert "sound: 17 files" in capsys.readouterr().out
    flip(run_dir / "checkpoints/step-000002/model.safetensors")
    assert run_command(["verify", str(run_dir)]) == 2
    shown = capsys.readouterr().out
    assert "NOT sound: 1 of 17 files have problems" in shown
    assert "bits changed after writing" in shown
    assert run_command(["verify", str(run_dir), "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["sound"]) == ("run", False)
    assert [file["path"] for file in answer["files"] if file["problems"]] == [
        str(run_dir / "checkpoints/step-000002/model.safetensors")
    ]
    assert run_command(["verify", str(run_dir / "absent"), "--json"]) == 2
    assert "no such folder" in json.loads(capsys.readouterr().out)["error"]["what"]
