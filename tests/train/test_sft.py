"""A supervised run end to end: what it writes, how it resumes, stops and refuses. CPU, tiny models."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES
from tests.train.small_run import alpaca_rows, small_run
from zhibei.config.errors import RunInterrupted, UserError
from zhibei.store.checkpoint import list_steps
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.offline import train
from zhibei.train.step import NonFiniteStep, Stepper


def losses(run_dir: RunDir) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir.metrics) if r["kind"] == "train"]


def heldout(run_dir: RunDir) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir.metrics) if r["kind"] == "heldout"]


def model_bytes(run_dir: RunDir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run_dir.model.glob("*.safetensors"))}


class StopAfter:
    """A watcher that sends a signal to this process once a step is recorded."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def __call__(self, record: dict) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            os.kill(os.getpid(), self.number)


def test_a_run_learns_and_leaves_a_folder_that_transformers_loads(tmp_path):
    run_dir = train(small_run(tmp_path))
    curve = heldout(run_dir)
    assert [step for step, _ in curve] == [0, 4, 8, 12]
    assert curve[-1][1] < 0.7 * curve[0][1]
    model = AutoModelForCausalLM.from_pretrained(run_dir.model)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.model)
    chat = [{"role": "user", "content": "Add 1 and 2."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("### Instruction:\nAdd 1 and 2.\n\n### Response:")
    logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits
    assert torch.isfinite(logits).all()
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))
    manifest = json.loads(run_dir.manifest.read_text())
    assert manifest["finished"]["steps"] == 12
    assert manifest["template"]["name"] == "alpaca"
    rows = tmp_path / "rows.json"
    sha256 = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert manifest["data"] == [{"path": str(rows), "bytes": rows.stat().st_size, "sha256": sha256}]


@pytest.mark.parametrize("settings", [[], ["model.method=lora", "lora.dropout=0.1"], ["sft.neftune_alpha=5"]])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, settings, packing):
    settings = [*settings, f"data.packing={packing}"]
    straight = train(small_run(tmp_path, *settings, "name=straight"))
    with pytest.raises(RunInterrupted) as caught:
        train(small_run(tmp_path, *settings, "name=cut"), watch=StopAfter(6, signal.SIGTERM))
    assert caught.value.exit_code == 130
    cut = RunDir(straight.path.with_name("cut"))
    assert [step for step, _ in list_steps(cut.checkpoints)][-1] == 6
    assert not cut.model.exists()
    train(small_run(tmp_path, *settings, "name=cut"), resume=cut)
    assert losses(cut) == losses(straight)
    assert heldout(cut) == heldout(straight)
    assert model_bytes(cut) == model_bytes(straight)


def test_sigusr1_saves_and_stops_too(tmp_path):
    with pytest.raises(RunInterrupted, match="SIGUSR1"):
        train(small_run(tmp_path), watch=StopAfter(3, signal.SIGUSR1))
    assert [step for step, _ in list_steps(tmp_path / "runs/small/checkpoints")][-1] == 3


def test_resume_takes_the_newest_sound_checkpoint_and_says_so(tmp_path):
    straight = train(small_run(tmp_path, "name=straight"))
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path, "name=cut"), watch=StopAfter(7, signal.SIGTERM))
    cut = RunDir(tmp_path / "runs/cut")
    damaged = cut.checkpoint(7) / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(bytes(data))
    seen = []
    train(small_run(tmp_path, "name=cut"), resume=cut, watch=seen.append)
    notes = [r["text"] for r in seen if r["kind"] == "event"]
    assert any("hash differs" in note and "step-000007" in note for note in notes)
    assert next(r["step"] for r in seen if r.get("event") == "resumed") == 4
    assert losses(cut) == losses(straight)


def test_resume_refuses_other_rows_and_another_base(tmp_path):
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path), watch=StopAfter(3, signal.SIGTERM))
    run_dir = RunDir(tmp_path / "runs/small")
    with pytest.raises(UserError, match="prepared_key"):
        train(small_run(tmp_path, rows=alpaca_rows(59)), resume=run_dir)
    weights = tmp_path / "tiny-llama/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match="fingerprint"):
        train(small_run(tmp_path), resume=run_dir)


def test_an_existing_run_is_never_overwritten(tmp_path):
    run_dir = train(small_run(tmp_path))
    before = model_bytes(run_dir)
    with pytest.raises(UserError, match="exists already") as caught:
        train(small_run(tmp_path))
    assert "resume" in caught.value.fix
    assert model_bytes(run_dir) == before


def test_weights_that_blow_up_stop_the_run_with_step_and_row_ids(tmp_path):
    settings = ["sft.learning_rate=0.9", "sft.max_grad_norm=0", "sft.warmup_steps=0", "sft.weight_decay=1e9"]
    with pytest.raises(NonFiniteStep, match=r"step \d+: .* its rows: .*rows.json#\d+") as caught:
        train(small_run(tmp_path, *settings, "sft.evaluate_every=0", "sft.save_every=0"))
    assert caught.value.exit_code == 3
    events = [r for r in read_metrics(tmp_path / "runs/small/metrics.jsonl") if r.get("event") == "stopped"]
    assert len(events) == 1
    assert not (tmp_path / "runs/small/model").exists()


def test_weights_that_an_update_ruins_never_get_into_a_checkpoint(tmp_path, monkeypatch):
    step = Stepper.step

    def ruined(self, micro_batches, *, learning_rate):
        record = step(self, micro_batches, learning_rate=learning_rate)
        if learning_rate > 0.009:
            self.model.head.weight.data[3, 3] = float("inf")
        return record

    monkeypatch.setattr(Stepper, "step", ruined)
    settings = ["sft.evaluate_every=0", "sft.save_every=1"]
    with pytest.raises(NonFiniteStep, match=r"step 3: the update left non-finite weights in lm_head.weight; its rows"):
        train(small_run(tmp_path, *settings))
    assert [saved for saved, _ in list_steps(tmp_path / "runs/small/checkpoints")] == [1, 2]


def test_the_best_evaluation_is_the_final_model(tmp_path):
    """Decay that grows with the rate ruins the last weights: earlier ones are the model."""
    run_dir = train(
        small_run(
            tmp_path,
            "sft.learning_rate=0.125",
            "sft.warmup_steps=15",
            "sft.weight_decay=30",
            "sft.schedule=constant",
            "sft.max_steps=16",
        )
    )
    curve = dict(heldout(run_dir))
    best = min(curve, key=curve.get)
    assert best not in (0, 16), "the set-up must make an evaluation in the middle the best one"
    assert json.loads(run_dir.manifest.read_text())["finished"]["model_step"] == best
    kept = load_file(run_dir.checkpoint(best) / "model.safetensors")
    written = load_file(run_dir.model / "model.safetensors")
    assert all(torch.equal(kept[name], written[name]) for name in written)


def test_early_stop_ends_after_evaluations_without_gain(tmp_path):
    settings = ["sft.learning_rate=0.5", "sft.warmup_steps=0", "sft.evaluate_every=2", "sft.early_stop_patience=2"]
    run_dir = train(small_run(tmp_path, *settings, "sft.max_steps=40"))
    events = [r for r in read_metrics(run_dir.metrics) if r["kind"] == "event"]
    assert any(r["event"] == "early stop" for r in events)
    assert losses(run_dir)[-1][0] < 40


def test_samples_show_base_and_tuned_side_by_side(tmp_path):
    run_dir = train(small_run(tmp_path, "sft.sample_prompts=[Add 1 and 2., Say hello.]"))
    first = json.loads((run_dir.samples / "step-000000.json").read_text())
    last = json.loads((run_dir.samples / "step-000012.json").read_text())
    assert [entry["prompt"] for entry in last] == ["Add 1 and 2.", "Say hello."]
    assert [entry["base"] for entry in last] == [entry["tuned"] for entry in first]
    assert any(entry["base"] != entry["tuned"] for entry in last)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_trains_and_saves_through_the_same_road(tmp_path, family):
    settings = ["sft.max_steps=1", "sft.evaluate_every=0", "sft.save_every=0", "sft.warmup_steps=0"]
    run_dir = train(small_run(tmp_path, *settings, "sft.learning_rate=1e-3", family=family))
    before = load_file(tmp_path / f"tiny-{family}/model.safetensors")
    after = {name: value for path in run_dir.model.glob("*.safetensors") for name, value in load_file(path).items()}
    assert set(after) == set(before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(run_dir.model)


def test_plain_text_takes_the_same_road(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("The answer is twelve. " * 600, encoding="utf-8")
    run = small_run(tmp_path, f"data.sources=[{text}]", "data.max_tokens=64", "data.validation=4")
    run_dir = train(run)
    assert heldout(run_dir)[-1][1] < heldout(run_dir)[0][1]
    assert json.loads(run_dir.audit.read_text())["supervised_share"] > 0.95


ADAPTERS = {
    "plain": [],
    "rslora": ["lora.rslora=true"],
    "dora": ["lora.dora=true"],
    "modules": ["lora.targets=[q_proj,v_proj]", "lora.modules_to_save=[embed_tokens,lm_head]"],
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_peft_folders_in_and_out(tmp_path, name):
    import peft

    run_dir = train(small_run(tmp_path, "model.method=lora", "lora.rank=4", *ADAPTERS[name]))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama")
    model = peft.PeftModel.from_pretrained(base, run_dir.model)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad(), model.disable_adapter():
        plain = model(tokens).logits
    with torch.no_grad():
        tuned = model(tokens).logits
    assert not torch.allclose(plain, tuned)
    again = train(
        small_run(tmp_path, "name=again", "model.method=lora", f"lora.adapter={run_dir.model}", "sft.max_steps=4")
    )
    assert heldout(again)[0][1] == pytest.approx(min(loss for _, loss in heldout(run_dir)), rel=1e-5)


def test_a_target_that_matches_no_layer_is_an_error_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="'q_porj' matches no layer") as caught:
        train(small_run(tmp_path, "model.method=lora", "lora.targets=[q_porj,v_proj]"))
    assert "q_proj" in caught.value.fix
    assert not (tmp_path / "runs").exists()


def test_full_training_continues_on_a_run_directory(tmp_path):
    first = train(small_run(tmp_path))
    second = train(small_run(tmp_path, "name=second", f"model.path={first.path}", "sft.max_steps=4"))
    assert heldout(second)[0][1] == pytest.approx(min(loss for _, loss in heldout(first)), rel=1e-6)
    assert json.loads(second.manifest.read_text())["parent_run"] == str(first.path)


def test_bf16_on_a_cpu_trains_and_is_proved(tmp_path):
    run_dir = train(small_run(tmp_path, "model.precision=bf16"))
    assert heldout(run_dir)[-1][1] < heldout(run_dir)[0][1]
    assert {tensor.dtype for tensor in load_file(run_dir.model / "model.safetensors").values()} == {torch.bfloat16}


def refused(tmp_path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        train(small_run(tmp_path, *overrides))
    assert not (tmp_path / "runs").exists(), "a run that cannot work leaves nothing behind"
    return caught.value


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    assert "fp16 on a CPU" in refused(tmp_path, "model.precision=fp16").what
    assert "256 positions" in refused(tmp_path, "data.max_tokens=300").what
    assert "there is no folder" in refused(tmp_path, "model.path=/no/such/folder").what
    assert "fewer than one optimiser step" in refused(tmp_path, "sft.global_batch=500").what
    assert "cuda" in refused(tmp_path, "device=cuda:7").what
    assert "never reached" in refused(tmp_path, "sft.warmup_steps=12").what
    assert "not writable" in refused(tmp_path, "runs=/proc/runs").what


def test_damaged_weights_are_refused_with_a_remedy(tmp_path):
    small_run(tmp_path)
    weights = tmp_path / "tiny-llama/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "zhibei verify" in refused(tmp_path).fix
    tensors = {name: value.clone() for name, value in load_whole(whole, tmp_path).items()}
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    write(tensors, weights)
    assert "NaN or infinity" in refused(tmp_path).what
    del tensors[name]
    write(tensors, weights)
    assert f"e.g. {name}" in refused(tmp_path).what


def load_whole(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "whole.safetensors"
    path.write_bytes(data)
    return load_file(path)


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
