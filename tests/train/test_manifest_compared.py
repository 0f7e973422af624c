"""What a run was trained with is compared by every later stage; each refusal names both values."""

import json
import shutil

import pytest

from tests.tiny import tiny_model_folder
from tests.train.small_run import small_run
from tests.train.test_sft import StopAfter
from zhibei.config.errors import RunInterrupted, UserError
from zhibei.model.load import load_for_inference
from zhibei.model.locate import locate
from zhibei.serve.chat import open_speaker
from zhibei.store.run_dir import RunDir
from zhibei.store.verify import inspect_run
from zhibei.train.offline import train

SHORT = ["sft.max_steps=2", "sft.warmup_steps=0", "sft.evaluate_every=0", "sft.save_every=0", "sft.sample_tokens=0"]


@pytest.fixture
def adapter_run(tmp_path) -> RunDir:
    return train(small_run(tmp_path, *SHORT, "model.method=lora", "name=adapter"))


@pytest.fixture
def full_run(tmp_path) -> RunDir:
    return train(small_run(tmp_path, *SHORT, "name=full"))


def swap_base(tmp_path) -> None:
    """Another model of the same shape under the name of the base."""
    other = tiny_model_folder(tmp_path, seed=7, name="other")
    shutil.copy(other / "model.safetensors", tmp_path / "tiny-llama/model.safetensors")


def test_an_adapter_is_not_put_on_another_base(tmp_path, adapter_run):
    open_speaker(str(adapter_run.path))
    assert [problem for file in inspect_run(adapter_run.path) for problem in file.problems] == []
    swap_base(tmp_path)
    for path in (adapter_run.path, adapter_run.model):
        with pytest.raises(UserError, match=r'base\.fingerprint is ".+" now, and was ".+" when') as caught:
            open_speaker(str(path))
        assert "tiny-llama" in caught.value.fix
    with pytest.raises(UserError, match=r"base\.fingerprint"):
        load_for_inference(str(adapter_run.model))
    problems = [problem for file in inspect_run(adapter_run.path) for problem in file.problems]
    assert len(problems) == 1
    assert "base.fingerprint" in problems[0]


def test_training_does_not_go_on_with_an_adapter_of_another_base(tmp_path, adapter_run):
    settings = [*SHORT, "model.method=lora", f"lora.adapter={adapter_run.model}"]
    train(small_run(tmp_path, *settings, "name=same"))
    swap_base(tmp_path)
    with pytest.raises(UserError, match=r"base\.fingerprint"):
        train(small_run(tmp_path, *settings, "name=other"))


def test_full_training_does_not_begin_with_an_adapter_of_another_base(tmp_path, adapter_run):
    swap_base(tmp_path)
    with pytest.raises(UserError, match=r"base\.fingerprint"):
        train(small_run(tmp_path, *SHORT, f"model.path={adapter_run.path}", "name=next"))


def change_tokenizer(run_dir: RunDir) -> None:
    path = run_dir.model / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][3:]
    path.write_text(json.dumps(document))


def test_a_tokenizer_that_was_changed_after_training_is_refused(tmp_path, full_run):
    open_speaker(str(full_run.path))
    change_tokenizer(full_run)
    with pytest.raises(UserError, match=r'tokenizer\.sha256 is ".+" now, and was "') as caught:
        open_speaker(str(full_run.path))
    assert "zhibei verify" in caught.value.fix
    with pytest.raises(UserError, match=r"tokenizer\.sha256"):
        train(small_run(tmp_path, *SHORT, f"model.path={full_run.path}", "name=next"))
    train(small_run(tmp_path, *SHORT, f"model.path={full_run.path}", f"model.tokenizer={tmp_path / 'tiny-llama'}"))


def test_a_special_id_that_was_changed_is_refused_with_both_values(full_run):
    manifest = json.loads(full_run.manifest.read_text())
    manifest["special_ids"]["eos"] = 77
    full_run.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r'special_ids is .*"eos": 2.* now, and was .*"eos": 77'):
        open_speaker(str(full_run.path))


def test_another_chat_template_is_refused_unless_it_is_asked_for(full_run):
    path = full_run.model / "chat_template.jinja"
    path.write_text(path.read_text().replace("### Response:", "### Answer:"))
    with pytest.raises(UserError, match=r"template\.sha256") as caught:
        open_speaker(str(full_run.path))
    assert "--template" in caught.value.fix
    assert open_speaker(str(full_run.path), template="vicuna_v1.1").template.name == "vicuna_v1.1"


def test_the_model_folder_of_a_run_knows_its_run(tmp_path, full_run):
    found = locate(str(full_run.model))
    assert found.run is not None
    assert found.run.path == full_run.path
    alone = tmp_path / "copied"
    shutil.copytree(full_run.model, alone)
    assert locate(str(alone)).run is None
    second = train(small_run(tmp_path, *SHORT, f"model.path={full_run.model}", "name=second"))
    assert json.loads(second.manifest.read_text())["parent_run"] == str(full_run.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("special_ids", {"bos": 1, "eos": 5, "pad": 0}), ("precision", "bf16"), ("supervise", "turns"), ("seed", 3)],
)
def test_resume_compares_what_training_depends_on(tmp_path, name, value):
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path), watch=StopAfter(3, 15))
    run_dir = RunDir(tmp_path / "runs/small")
    manifest = json.loads(run_dir.manifest.read_text())
    run_dir.manifest.write_text(json.dumps({**manifest, name: value}))
    with pytest.raises(UserError, match=f"{name} is .* now, and was"):
        train(small_run(tmp_path), resume=run_dir)


def test_all_that_differs_is_said_at_once(tmp_path):
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path), watch=StopAfter(3, 15))
    run_dir = RunDir(tmp_path / "runs/small")
    swap_base(tmp_path)
    with pytest.raises(UserError) as caught:
        train(small_run(tmp_path, "sft.global_batch=4"), resume=run_dir)
    assert "base.fingerprint" in str(caught.value)
    assert "global_batch is 4 now, and was 8" in str(caught.value)
