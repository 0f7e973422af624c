"""Handing over: complete folders that transformers loads alone, proofs that bite, and inputs that stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.export.making import adapter_folder, load, logits_of, tiny_model_folder, with_adapter
from tests.export.test_meta_weights import llama_folder
from zhibei.cli.app import run_command
from zhibei.config.errors import UserError
from zhibei.export import hand_over
from zhibei.export.forms import Wanted, from_meta, recover, to_adapter, to_difference, to_meta
from zhibei.export.hand_over import Proving, export_hf, merge
from zhibei.export.parity_limits import LIMITS, Limits
from zhibei.store.shards import read_tensors
from zhibei.store.verify import verify_folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def base(tmp_path):
    return tiny_model_folder(tmp_path)


def test_a_merged_folder_is_complete_proved_and_stands_alone(base, tmp_path):
    adapter = adapter_folder(base, tmp_path / "adapter")
    (base / "LICENSE").write_text("as you like")
    before = everything(base), everything(adapter)
    made = merge([str(adapter)])
    assert made.path == tmp_path / "adapter-merged"
    assert made.parity is not None
    assert made.parity.kl_mean < 1e-6
    assert made.parity.tokenizer.is_whole
    assert verify_folder(made.path) == []
    assert json.loads((made.path / "parity.json").read_text())["failures"] == []
    card = (made.path / "README.md").read_text()
    assert "see LICENSE" in card
    assert str(tmp_path) not in card, "no path of this machine"
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(made.path)("the cat")["input_ids"]
    torch.testing.assert_close(logits_of(load(made.path)), logits_of(with_adapter(base, adapter)), atol=1e-5, rtol=1e-5)
    assert (everything(base), everything(adapter)) == before
    assert merge([str(adapter)]).path == made.path, "what we made is replaced"


def test_a_mixture_is_proved_against_peft_with_both_adapters_active(base, tmp_path):
    paths = [
        f"{adapter_folder(base, tmp_path / name, seed=seed)}:{w}" for name, seed, w in (("a", 1, 0.7), ("b", 2, 0.3))
    ]
    with pytest.raises(UserError, match="several adapters"):
        merge(paths)
    made = merge(paths, out=tmp_path / "mixed")
    assert made.parity is not None
    assert made.parity.kl_mean < 1e-6


def test_a_merge_that_is_another_model_leaves_nothing(base, tmp_path, monkeypatch):
    adapter = adapter_folder(base, tmp_path / "adapter")
    before = everything(tmp_path)

    write = hand_over.write_merged

    def forgetful(source, folder, **options):
        made = write(source, folder, **options)
        (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
        return made

    monkeypatch.setattr(hand_over, "write_merged", forgetful)
    with pytest.raises(UserError, match="is not the model"):
        merge([str(adapter)])
    assert everything(tmp_path) == before


def test_a_folder_of_someone_else_is_not_replaced(base, tmp_path):
    adapter = adapter_folder(base, tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not made by this command"):
        merge([str(adapter)], out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_limits_stop_an_export(base, tmp_path, monkeypatch):
    adapter = adapter_folder(base, tmp_path / "adapter")
    monkeypatch.setitem(LIMITS, "bf16", Limits(0.0, 1.0, -1.0, "nothing may differ"))
    with pytest.raises(UserError, match="perplexity"):
        export_hf(str(adapter), out=tmp_path / "hf", dtype="bf16")
    assert not (tmp_path / "hf").exists()
    export_hf(str(adapter), out=tmp_path / "hf", dtype="bf16", proving=Proving(is_wanted=False))
    assert (tmp_path / "hf" / "config.json").is_file()
    assert not (tmp_path / "hf" / "parity.json").exists()


def test_meta_difference_and_adapter_there_and_back(tmp_path):
    base = llama_folder(tmp_path / "base")
    merged = merge([str(adapter_folder(base, tmp_path / "tuning", r=2))], out=tmp_path / "tuned").path
    meta = to_meta(str(merged), Wanted(out=tmp_path / "meta", shards=2)).path
    back = from_meta(str(meta), Wanted(base=str(base), out=tmp_path / "back")).path
    mine = read_tensors(merged)
    assert all(torch.equal(read_tensors(back)[name], mine[name]) for name in mine)
    delta = to_difference(str(merged), Wanted(base=str(base), out=tmp_path / "delta"))
    recovered = recover(str(delta.path), Wanted(base=str(base), out=tmp_path / "recovered"))
    assert "equals what its maker noted" in recovered.notes[0]
    torch.testing.assert_close(logits_of(load(recovered.path)), logits_of(load(merged)), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="is expected"):
        recover(str(delta.path), Wanted(base=str(merged), out=tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()
    again = to_adapter(str(merged), Wanted(base=str(base), out=tmp_path / "again", rank=2))
    assert again.parity is not None
    assert again.parity.kl_mean < 1e-6
    with pytest.raises(UserError, match="not known which base"):
        to_difference(str(merged), Wanted(out=tmp_path / "nowhere"))


def test_commands_tell_and_refuse(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = adapter_folder(base, tmp_path / "adapter")
    assert run_command(["merge", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["top1_agreement"] == 1.0
    assert run_command(["parity", str(adapter), "adapter-merged", "--kind", "f32"]) == 0
    assert "the same model" in capsys.readouterr().out
    assert run_command(["parity", str(adapter), str(base)]) == 2
    assert "beyond its limit" in capsys.readouterr().out
    assert run_command(["export"]) == 0
    assert "consolidated" in capsys.readouterr().out
    for arguments, words in (
        (["merge"], "no adapter named"),
        (["merge", "nowhere"], "no folder nowhere"),
        (["merge", str(base)], "nothing to merge"),
        (["export", str(base), "--to", "hff"], "no form hff"),
        (["export", str(base), "--to", "hf", "--rank", "3"], "--rank has no effect"),
        (["export", str(base), "--to", "hf", "--dtype", "bf16"], "holds whole weights"),
        (["export", str(base), "--to", "meta", "--shards", "3"], "3 files"),
        (["export", str(base), "--to", "recover"], "needs its base"),
        (["parity", str(base), str(base), "--kind", "fine"], "no limits are known"),
        (["parity", str(base), str(base), "--text", "no.txt"], "no.txt"),
    ):
        assert run_command(arguments) == 2, arguments
        assert words in capsys.readouterr().err.replace("\n", " "), arguments
