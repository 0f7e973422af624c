"""What a run saves and takes up again: settings held to, checkpoints without devices, adapters that go on learning."""

import json
import shutil

import pytest
import torch

from tests.train.small_run import small_run
from tests.train.test_sft import StopAfter, losses
from zhibei.cli.app import run_command
from zhibei.config.errors import RunInterrupted, UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model.load import Need, load_for_inference, load_for_training
from zhibei.model.locate import locate
from zhibei.store.checkpoint import list_steps, load_checkpoint
from zhibei.store.run_dir import RunDir
from zhibei.train.materials import gather
from zhibei.train.offline import train

SHORT = ["sft.max_steps=3", "sft.warmup_steps=0", "sft.sample_tokens=0"]


def stopped_run(tmp_path, *overrides) -> RunDir:
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path, *overrides), watch=StopAfter(6, 15))
    return RunDir(tmp_path / "runs/small")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sft.learning_rate=1e-3", r"settings\.sft\.learning_rate is 0\.001 now, and was 0\.01"),
        ("sft.max_steps=40", r"settings\.sft\.max_steps is 40 now, and was 12"),
        ("sft.schedule=constant", r"settings\.sft\.schedule"),
        ("sft.weight_decay=0.1", r"settings\.sft\.weight_decay"),
        ("data.shuffle=false", r"settings\.data\.shuffle"),
        ("sft.global_batch=4", r"global_batch is 4 now, and was 8"),
    ],
)
def test_a_setting_changed_since_is_refused_with_both_values(tmp_path, setting, words):
    run_dir = stopped_run(tmp_path)
    with pytest.raises(UserError, match=words):
        train(small_run(tmp_path, setting), resume=run_dir)


def test_adapters_of_another_size_are_refused(tmp_path):
    run_dir = stopped_run(tmp_path, "model.method=lora", "lora.rank=4")
    with pytest.raises(UserError, match=r"settings\.lora\.rank is 8 now, and was 4"):
        train(small_run(tmp_path, "model.method=lora", "lora.rank=8"), resume=run_dir)
    manifest = json.loads(run_dir.manifest.read_text())
    del manifest["settings"]
    run_dir.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"has shape .* in the checkpoint"):
        train(small_run(tmp_path, "model.method=lora", "lora.rank=8"), resume=run_dir)


def test_how_a_step_is_computed_may_change(tmp_path):
    run_dir = stopped_run(tmp_path)
    straight = train(small_run(tmp_path, "name=straight"))
    train(small_run(tmp_path, "sft.micro_batch_tokens=400", "model.activation_checkpointing=full"), resume=run_dir)
    for (step, loss), (_, expected) in zip(losses(run_dir), losses(straight), strict=True):
        assert loss == pytest.approx(expected, rel=1e-3), step


def test_a_finished_run_is_not_resumed(tmp_path, capsys):
    run_dir = train(small_run(tmp_path, *SHORT))
    assert run_command(["resume", str(run_dir.path)]) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert "is finished" in words
    assert "model.path=" in words


def test_checkpoints_are_saved_where_nothing_is_evaluated(tmp_path):
    run_dir = train(small_run(tmp_path, "sft.save_every=5", "sft.evaluate_every=0", "sft.keep_checkpoints=9"))
    assert [step for step, _ in list_steps(run_dir.checkpoints)] == [5, 10, 12]


def test_every_checkpoint_holds_the_whole_state_and_no_device(tmp_path):
    run_dir = train(small_run(tmp_path, *SHORT, "model.method=lora", "sft.save_every=1", "sft.keep_checkpoints=9"))
    for step, path in list_steps(run_dir.checkpoints):
        groups, state = load_checkpoint(path)
        assert set(groups) == {"model", "optimizer", "random"}
        assert state["step"] == step
        tensors = [tensor for group in groups.values() for tensor in group.values()]
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_an_adapter_that_is_continued_goes_on_learning(tmp_path):
    first = train(small_run(tmp_path, *SHORT, "model.method=lora", "name=first"))
    resolved = small_run(tmp_path, *SHORT, "model.method=lora", f"lora.adapter={first.model}", "name=second")
    model = gather(resolved).model
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    assert before
    assert any(bool(value.any()) for name, value in before.items() if "lora_B" in name), "the first run's weights"
    second = train(resolved)
    after = load_for_inference(str(second.model), device="cpu")
    theirs = dict(after.hf.named_parameters())
    assert all(not torch.equal(value, theirs[name]) for name, value in before.items())


def test_an_adapter_merged_at_load_gives_the_logits_of_base_and_adapter(tmp_path):
    run_dir = train(small_run(tmp_path, *SHORT, "model.method=lora"))
    beside = load_for_inference(str(run_dir.path), device="cpu")
    need = Need(torch.device("cpu"), "fp32", packing=False, longest_row=64)
    merged = load_for_training(ModelSection(path=str(run_dir.path)), LoraSection(), need)
    assert merged.hf is merged.inner, "no adapter is left"
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad(), beside.sampling() as one, merged.sampling() as other:
        assert torch.allclose(one(tokens).logits, other(tokens).logits, atol=1e-4)


def test_nothing_is_merged_into_a_quantised_base(tmp_path):
    run_dir = train(small_run(tmp_path, *SHORT, "model.method=lora"))
    need = Need(torch.device("cpu"), "fp32", packing=False, longest_row=64)
    with pytest.raises(UserError, match="trains every weight"):
        load_for_training(ModelSection(path=str(run_dir.path), quantize="int8"), LoraSection(), need)


def test_a_folder_that_is_adapter_and_model_at_once_is_refused(tmp_path):
    run_dir = train(small_run(tmp_path, *SHORT, "model.method=lora"))
    mixed = tmp_path / "mixed"
    shutil.copytree(run_dir.model, mixed)
    locate(str(mixed))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "tiny-llama" / name, mixed / name)
    with pytest.raises(UserError, match=r"holds an adapter .* and whole weights"):
        locate(str(mixed))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("__0_0.distcp", "merge-weights"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "merge-weights"),
        ("zero_to_fp32.py", "zero_to_fp32"),
        ("global_step100/mp_rank_00_model_states.pt", "zero_to_fp32"),
        ("optimizer.pt", "training state"),
        ("files.json", "zhibei resume"),
    ],
)
def test_a_training_state_in_place_of_a_model_is_named(tmp_path, file, words):
    folder = tmp_path / "state"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        locate(str(folder))
    assert words in caught.value.fix
