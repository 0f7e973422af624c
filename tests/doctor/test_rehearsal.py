"""A rehearsal passes on sound runs, leaves nothing behind, and each of its steps bites on what it is for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.small_run import alpaca_rows, small_run
from zhibei.cli.app import run_command
from zhibei.doctor import fresh, readback
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.probes import (
    adapters,
    evaluation,
    find_worst,
    first_loss,
    packing,
    split,
    two_steps,
    zero_rate,
)
from zhibei.doctor.rehearsal import STEPS, rehearse, steps_of
from zhibei.doctor.saving import save
from zhibei.doctor.scene import Scene
from zhibei.doctor.watchdogs import WATCHDOGS
from zhibei.doctor.worst import MOST_PASSES, worst_heldout, worst_of
from zhibei.model.language_model import LanguageModel
from zhibei.train.materials import gather
from zhibei.train.optimizer import MasterOptimizer

RUNS = {
    "full, packed": [],
    "lora, padded": ["model.method=lora", "lora.dropout=0.1", "data.packing=false"],
    "bf16": ["model.precision=bf16"],
    "layers beside adapters": ["model.method=lora", "lora.targets=[q_proj]", "lora.modules_to_save=[embed_tokens]"],
    "noise": ["sft.neftune_alpha=5"],
}


def scene_of(tmp_path, *overrides, **options) -> Scene:
    scene = Scene(gather(small_run(tmp_path, *overrides, **options)))
    find_worst(scene)
    return scene


def ids(seen) -> list[str]:
    return [pitfall for pitfall, _ in seen.problems]


@pytest.mark.parametrize("name", RUNS)
def test_a_sound_run_passes_and_nothing_is_left_behind(tmp_path, name):
    resolved = small_run(tmp_path, *RUNS[name])
    before = sorted(path.name for path in tmp_path.iterdir())
    done = rehearse(resolved)
    assert [(one.finding.what, one.finding.where) for one in done.checkup.findings] == []
    assert [step.name for step in done.steps] == list(steps_of("sft"))
    assert not done.checkup.blocks
    assert sorted({path.name for path in tmp_path.iterdir()} - {"zhibei-cache"}) == before
    json.dumps(done.as_dict(), allow_nan=False)


def test_pitfalls_name_steps_and_watchdogs_that_exist():
    load_catalogue()
    for entry in CATALOGUE.values():
        if entry.kind == "rehearsal":
            assert entry.by in STEPS, entry.id
        if entry.kind == "watchdog":
            assert entry.by in {*WATCHDOGS, "non_finite"}, entry.id


def test_the_command_says_what_failed_and_leaves_with_2(tmp_path, capsys, monkeypatch):
    small_run(tmp_path)
    monkeypatch.setattr(MasterOptimizer, "step", lambda self, gradients, *, learning_rate, scale: None)
    monkeypatch.setattr("zhibei.doctor.readback.run_fresh", lambda folder: {"reload": {"problem": "x", "to_do": "y"}})
    assert run_command(["rehearse", str(tmp_path / "run.yaml"), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert not document["passed"]
    failed = [step["name"] for step in document["steps"] if not step["passed"]]
    assert failed == ["two steps", "reload", "resume"]
    assert {one["level"] for one in document["findings"]} == {"stop"}
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_loaded_is_a_finding_too(tmp_path):
    done = rehearse(small_run(tmp_path, "sft.global_batch=500"))
    assert [step.name for step in done.steps] == ["load"]
    assert "fewer than one optimiser step" in done.checkup.findings[0].finding.what


@pytest.mark.slow
def test_training_begins_with_a_rehearsal_where_it_is_asked_for(tmp_path):
    small_run(tmp_path)
    assert run_command(["train", str(tmp_path / "run.yaml"), "rehearse=always", "--quiet"]) in (0, None)
    stored = json.loads((tmp_path / "runs/small/rehearsal.json").read_text())
    assert stored["passed"]
    assert [step["name"] for step in stored["steps"]] == list(steps_of("sft"))


def test_the_worst_passes_are_the_worst_of_all_steps(tmp_path):
    for setting in ("data.packing=true", "data.packing=false"):
        materials = scene_of(tmp_path, setting).materials
        batches = materials.batches
        worst = worst_of(batches)
        every = [batches.micro_batches(step) for step in range(batches.num_steps)]
        assert worst.tokens == max(batch.tokens_BT.numel() for passes in every for batch in passes)
        assert worst.longest == max(batch.longest for passes in every for batch in passes)
        assert worst.passes == max(len(passes) for passes in every)
        assert len(worst.second) == min(worst.passes, MOST_PASSES)
        assert max(batch.tokens_BT.numel() for batch in worst.first) == worst.tokens
        assert max(batch.longest for batch in worst.first) == worst.longest
        heldout = materials.heldout
        assert heldout is not None
        assert worst_heldout(heldout).longest == int(heldout.rows.lengths.max())


def test_a_step_at_rate_zero_that_changes_weights_is_found(tmp_path, monkeypatch):
    assert zero_rate(scene_of(tmp_path)).problems == []
    step = MasterOptimizer.step

    def drifting(self, gradients, *, learning_rate, scale):
        step(self, gradients, learning_rate=learning_rate, scale=scale)
        next(iter(self.parameters.values())).data.mul_(1.001)

    monkeypatch.setattr(MasterOptimizer, "step", drifting)
    assert "changed 1 of 21" in zero_rate(scene_of(tmp_path)).problems[0][1].what


def test_a_model_that_is_trained_and_only_guesses_is_found(tmp_path):
    scene = scene_of(tmp_path)
    zero_rate(scene)
    assert first_loss(scene).problems == [], "its norms are all 1: an untrained model may guess"
    for name, parameter in scene.materials.model.inner.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    assert ids(first_loss(scene)) == ["fsdp-init-random-instead-of-pretrained"]
    scene.first_loss = 1.5
    assert first_loss(scene).problems == []


def test_a_batch_that_gives_nan_names_its_rows(tmp_path):
    scene = scene_of(tmp_path)
    scene.materials.model.head.weight.data[5, 5] = float("nan")
    finding = zero_rate(scene).problems[0][1]
    assert "nan" in finding.what
    assert "rows.json#" in finding.where
    assert "nan" in evaluation(scene).problems[0][1].what


def test_gradients_that_always_overflow_are_found(tmp_path):
    scene = scene_of(tmp_path)
    scene.materials.stepper.scale.enabled, scene.materials.stepper.scale.value = True, 2.0**127
    assert ids(zero_rate(scene)) == ["ds-fp16-all-steps-skipped"]


def test_rows_that_see_one_another_are_found(tmp_path, monkeypatch):
    from zhibei.model import attention

    sound = scene_of(tmp_path)
    assert packing(sound).problems == []
    assert split(sound).problems == []
    apart = attention.RowLengths
    monkeypatch.setattr(attention, "RowLengths", lambda lengths: apart((sum(lengths),)))
    assert ids(packing(sound)) == ["packing-cross-contamination"]
    assert split(sound).problems != []


def test_padding_that_is_seen_is_found(tmp_path, monkeypatch):
    scene = scene_of(tmp_path, "data.packing=false")
    assert packing(scene).problems == []
    hidden = LanguageModel.hidden

    def shifted(self, batch):
        out = hidden(self, batch)
        return out + (batch.tokens_BT.shape[0] - 1) * 0.1 * torch.arange(out.shape[1])

    monkeypatch.setattr(LanguageModel, "hidden", shifted)
    assert ids(packing(scene)) == ["packing-cross-contamination"]


def test_a_loss_that_depends_on_the_cut_is_found(tmp_path):
    scene = scene_of(tmp_path)
    loss_sum = scene.materials.task.plain_loss
    averaged = replace(
        scene.materials,
        task=replace(scene.materials.task, plain_loss=lambda model, batch: loss_sum(model, batch) / batch.num_units),
    )
    assert "one by one" in split(Scene(averaged)).problems[0][1].what


def test_parameters_without_gradient_are_named(tmp_path, monkeypatch):
    assert two_steps(scene_of(tmp_path, "model.method=lora")).problems == []
    trainable = LanguageModel.trainable
    orphan = torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(LanguageModel, "trainable", lambda self: {**trainable(self), "orphan.weight": orphan})
    seen = two_steps(scene_of(tmp_path))
    assert ids(seen) == ["gc-lora-silent-partial-training"]
    assert seen.problems[0][1].evidence == ("orphan.weight",)


def test_an_optimiser_that_does_nothing_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(MasterOptimizer, "step", lambda self, gradients, *, learning_rate, scale: None)
    assert ids(two_steps(scene_of(tmp_path))) == ["ds-fp16-all-steps-skipped"]


def test_updates_below_the_spacing_of_bf16_count_as_moves(tmp_path):
    seen = two_steps(scene_of(tmp_path, "model.precision=bf16", "sft.learning_rate=1e-6"))
    assert seen.problems == []


def test_adapters_that_learn_nothing_are_found(tmp_path):
    scene = scene_of(tmp_path, "model.method=lora")
    assert all("all zero" in finding.what for _, finding in adapters(scene).problems), "no step was taken yet"
    two_steps(scene)
    assert adapters(scene).problems == []
    name, parameter = next((n, p) for n, p in scene.materials.model.trainable().items() if "lora_B" in n)
    parameter.requires_grad = False
    assert "27 adapter tensors" in adapters(scene).problems[0][1].what
    parameter.requires_grad = True
    parameter.data.zero_()
    assert name in adapters(scene).problems[0][1].what


@pytest.fixture
def saved(tmp_path):
    """What a rehearsal leaves for its second process."""
    folder = tmp_path / "saved"
    folder.mkdir()
    scene = scene_of(tmp_path, "model.method=lora")
    zero_rate(scene)
    two_steps(scene)
    assert save(scene, folder).problems == []
    return folder


def judged(folder: Path, monkeypatch) -> dict[str, list]:
    """The verdict of the second half, taken in this process."""

    def here(place: Path):
        fresh.main(place)
        return json.loads((place / "answer.json").read_text())

    monkeypatch.setattr(readback, "run_fresh", here)
    answer: dict = {}
    steps = {"reload": readback.reload(folder, answer)}
    steps |= {"generate": readback.generated(folder, answer), "resume": readback.resumed(folder, answer)}
    return {name: ids(seen) for name, seen in steps.items() if seen.problems}


@pytest.mark.parametrize("settings", [[], ["model.method=lora"], ["model.precision=bf16"]])
def test_what_is_written_is_as_large_as_planned(tmp_path, monkeypatch, settings):
    scene = scene_of(tmp_path, *settings)
    zero_rate(scene)
    two_steps(scene)
    seen = save(scene, tmp_path)
    assert seen.problems == []
    assert seen.figures["checkpoint_bytes"] == pytest.approx(seen.figures["planned_bytes"], abs=40_000)
    monkeypatch.setattr("zhibei.doctor.saving.SMALL_FILES", 0)
    monkeypatch.setattr("zhibei.doctor.saving.plan_of", lambda scene: PlannedTooSmall)
    (tmp_path / "again").mkdir()
    assert ids(save(scene, tmp_path / "again")) == ["disk-full-at-checkpoint"]


class PlannedTooSmall:
    class disk:
        checkpoint_bytes = 1000.0


def test_what_was_saved_is_read_back_equal(saved, monkeypatch):
    assert judged(saved, monkeypatch) == {}


def test_a_written_adapter_that_lost_its_weights_is_found(saved, monkeypatch):
    from safetensors.torch import load_file, save_file

    path = saved / "model/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path, metadata={"format": "pt"})
    assert judged(saved, monkeypatch)["reload"][0] == "fsdp-save-missing-layers"


def test_a_model_without_its_tokenizer_is_found(saved, monkeypatch):
    for path in saved.glob("model/tokenizer*"):
        path.unlink()
    assert judged(saved, monkeypatch)["reload"] == ["tokenizer-not-saved-with-model"]


def test_a_tokenizer_that_became_another_is_found(saved, monkeypatch):
    path = saved / "model/tokenizer.json"
    document = json.loads(path.read_text())
    merges = document["model"]["merges"]
    document["model"]["merges"] = merges[len(merges) // 2 :]
    path.write_text(json.dumps(document))
    assert judged(saved, monkeypatch)["reload"] == ["tokenizer-not-saved-with-model"]


def test_a_template_that_became_another_is_found(saved, monkeypatch):
    path = saved / "model/chat_template.jinja"
    path.write_text(path.read_text().replace("### Response:", "### Answer:"))
    assert judged(saved, monkeypatch) == {"generate": ["training-inference-prompt-mismatch"]}


def test_a_checkpoint_that_lost_its_weights_is_found(saved, monkeypatch):
    request = json.loads((saved / "request.json").read_text())
    (saved / "request.json").write_text(json.dumps({**request, "after": request["after"] + 0.5}))
    assert judged(saved, monkeypatch) == {"resume": ["lora-resume-weights-not-loaded"]}
    path = next(saved.glob("checkpoints/*/model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert judged(saved, monkeypatch) == {"resume": ["lora-resume-weights-not-loaded"]}


def test_a_second_process_that_dies_is_told_with_its_last_words(tmp_path):
    from zhibei.config.errors import UserError

    with pytest.raises(UserError, match="died"):
        readback.run_fresh(tmp_path)


def test_logits_are_compared(saved, monkeypatch):
    np.save(saved / "logits.npy", np.load(saved / "logits.npy") + 1)
    assert judged(saved, monkeypatch)["reload"] == ["ppo-wrapper-prefix-in-checkpoint"]


def test_rows_of_one_length_only_are_no_reason_to_fail(tmp_path):
    rows = [{**row, "instruction": "Add.", "input": "", "output": "Seven."} for row in alpaca_rows(12)]
    rows = [{**row, "instruction": f"Add {number:02}."} for number, row in enumerate(rows)]
    scene = scene_of(tmp_path, "sft.global_batch=4", rows=rows)
    for probe in (zero_rate, first_loss, packing, split, two_steps, adapters, evaluation):
        assert probe(scene).problems == []
