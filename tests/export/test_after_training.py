"""`hand_over` in the run file: made after training, each form alone; what fails keeps the run and is made later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zhibei
from tests.export.making import load
from tests.train.small_run import small_run
from zhibei.cli.app import run_command
from zhibei.config.errors import USER_MUST_ACT, UserError
from zhibei.doctor.guard import train_guarded
from zhibei.export.after_training import make_forms, pending_forms, place_of
from zhibei.export.meta_weights import MetaTensors
from zhibei.export.sides import FolderSide
from zhibei.store.ledger import read_ledger
from zhibei.store.run_dir import RunDir
from zhibei.text.messages import Message

FORMS = ["merged", "hf", "meta:2", "delta"]
SHORT = ("sft.max_steps=2", "sft.warmup_steps=0", "sft.evaluate_every=0", "sft.save_every=0", "sft.sample_tokens=0")
ASKED = (f"hand_over=[{','.join(FORMS)}]", "model.method=lora", *SHORT)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_form_is_made_and_made_once(tmp_path):
    records = []
    run = train_guarded(small_run(tmp_path, *ASKED), watch=records.append)
    told = [record for record in records if record.get("event") == "handed over"]
    assert [record["form"] for record in told] == FORMS
    assert told[0]["parity"]["failures"] == []
    assert pending_forms(run, FORMS) == []
    assert [entry["what"] for entry in read_ledger(run.handed_over)] == ["merge", "merge", "meta", "delta"]
    before = everything(run.exports)
    assert make_forms(run, FORMS) == []
    assert everything(run.exports) == before


def test_a_folder_begins_conversations_as_training_did(tmp_path):
    run = train_guarded(
        small_run(tmp_path, *SHORT, "model.method=lora", "data.system=You are brief.", "hand_over=[hf]"),
        watch=lambda record: None,
    )
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(place_of(run, "hf"))
    chat = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.count("You are brief.") == 1
    own = [{"role": "system", "content": "Other."}, *chat]
    assert "brief" not in theirs.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    speaker = zhibei.load(place_of(run, "hf"), device="cpu")
    assert speaker.template.as_jinja() == theirs.chat_template
    side, folder = FolderSide(str(run.path)), FolderSide(str(place_of(run, "hf")))
    messages = [Message("user", "Hi")]
    assert side.render(messages) == folder.render(messages)
    assert "You are brief." in side.tokenizer.decode(side.render(messages))


def test_what_fails_keeps_the_run_and_the_other_forms_and_is_made_later(tmp_path, monkeypatch, capsys):
    whole = MetaTensors.whole
    monkeypatch.setattr(MetaTensors, "whole", lambda self, name: whole(self, name) + 1)
    with pytest.raises(UserError) as caught:
        train_guarded(small_run(tmp_path, *ASKED), watch=lambda record: None)
    run = RunDir(next((tmp_path / "runs").iterdir()))
    assert caught.value.exit_code == USER_MUST_ACT
    assert "is trained and kept" in caught.value.what
    assert "meta:2" in caught.value.what
    assert "does not read back" in caught.value.what
    assert f"zhibei resume {run.path}" in caught.value.fix
    assert run.model.is_dir()
    assert pending_forms(run, FORMS) == ["meta:2"]
    assert not place_of(run, "meta:2").exists()
    monkeypatch.undo()
    assert run_command(["resume", str(run.path)]) == 0
    assert "meta:2" in capsys.readouterr().out
    assert pending_forms(run, FORMS) == []
    meta = MetaTensors(place_of(run, "meta:2"))
    merged = load(run.merged).state_dict()
    torch.testing.assert_close(meta.whole("model.norm.weight"), merged["model.norm.weight"], rtol=0, atol=0)
    assert run_command(["resume", str(run.path)]) == USER_MUST_ACT, "now the run is finished"


def test_gguf_files_in_folders_of_their_own_and_those_made_by_hand_count(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    run = train_guarded(small_run(tmp_path, *SHORT, "hand_over=[gguf:F16]"), watch=lambda record: None)
    assert [path.name for path in place_of(run, "gguf:F16").glob("*.gguf")] == [f"{run.path.name}-F16.gguf"]
    proof = json.loads((place_of(run, "gguf:F16") / "parity-F16.json").read_text())
    assert proof["failures"] == []
    assert pending_forms(run, ["gguf:F16", "gguf:BF16"]) == ["gguf:BF16"]
    assert run_command(["export", str(run.path), "--to", "gguf", "--types", "BF16"]) == 0
    assert pending_forms(run, ["gguf:F16", "gguf:BF16"]) == []
