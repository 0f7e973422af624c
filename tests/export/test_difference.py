"""Weight differences: FastChat's arithmetic, the way back bit for bit, new rows, and a wrong base that is caught."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.export.making import load
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.export.difference import apply_difference, make_difference, require_recovered, tensors_sha256
from zhibei.store.shards import read_tensors


def tuned_folder(base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, more_rows: int = 0) -> Path:
    model = load(base)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    if more_rows:
        model.resize_token_embeddings(model.config.vocab_size + more_rows)
    model.to(dtype).save_pretrained(folder)
    return folder


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_one_subtraction_and_one_addition_in_the_files_own_type(dtype, tmp_path):
    first = tiny_model_folder(tmp_path)
    base = tmp_path / "base"
    load(first).to(dtype).save_pretrained(base)
    tuned = tuned_folder(base, tmp_path / "tuned", dtype=dtype)
    delta, back = new(tmp_path / "delta"), new(tmp_path / "back")
    found = make_difference(tuned, base, delta)
    below, mine, difference = read_tensors(base), read_tensors(tuned), read_tensors(delta)
    for name in mine:
        assert torch.equal(difference[name], mine[name] - below[name]), "FastChat's make_delta: target -= base"
    sha256 = apply_difference(delta, base, back)
    require_recovered(sha256, found.recovered_sha256, where="here")
    again = read_tensors(back)
    for name in mine:
        assert torch.equal(again[name], difference[name] + below[name]), "FastChat's apply_delta: delta += base"
        torch.testing.assert_close(again[name], mine[name], atol=found.largest, rtol=0)
    assert sha256 == tensors_sha256(again)
    assert found.num_values == sum(tensor.numel() for tensor in mine.values())


def test_with_more_bits_the_way_back_is_exact(tmp_path):
    base = tmp_path / "base"
    load(tiny_model_folder(tmp_path)).to(torch.bfloat16).save_pretrained(base)
    tuned = tuned_folder(base, tmp_path / "tuned", dtype=torch.bfloat16)
    found = make_difference(tuned, base, new(tmp_path / "delta"), dtype="fp32")
    assert (found.num_off, found.recovered_dtype) == (0, "bfloat16")
    apply_difference(tmp_path / "delta", base, new(tmp_path / "back"), dtype="bf16")
    assert tensors_sha256(read_tensors(tmp_path / "back")) == tensors_sha256(read_tensors(tuned))


@pytest.mark.parametrize("new_rows", ["zeros", "mean"])
def test_a_longer_vocabulary(new_rows, tmp_path):
    base = tiny_model_folder(tmp_path)
    tuned = tuned_folder(base, tmp_path / "tuned", more_rows=1)
    make_difference(tuned, base, new(tmp_path / "delta"), new_rows=new_rows)
    name = "model.embed_tokens.weight"
    last = read_tensors(tuned)[name][-1] - read_tensors(tmp_path / "delta")[name][-1]
    expected = torch.zeros(32) if new_rows == "zeros" else read_tensors(base)[name].mean(dim=0)
    torch.testing.assert_close(last, expected, atol=1e-6, rtol=1e-6)
    apply_difference(tmp_path / "delta", base, new(tmp_path / "back"), new_rows=new_rows)
    torch.testing.assert_close(read_tensors(tmp_path / "back")[name], read_tensors(tuned)[name], atol=1e-6, rtol=0)


def test_another_base_is_caught(tmp_path):
    base, other = tiny_model_folder(tmp_path), tiny_model_folder(tmp_path, seed=1, name="other")
    tuned = tuned_folder(base, tmp_path / "tuned")
    found = make_difference(tuned, base, new(tmp_path / "delta"))
    sha256 = apply_difference(tmp_path / "delta", other, new(tmp_path / "a"))
    with pytest.raises(UserError, match="is expected"):
        require_recovered(sha256, found.recovered_sha256, where="here")
    with pytest.raises(UserError, match="one of the two only"):
        make_difference(tuned, tiny_model_folder(tmp_path, "qwen2"), new(tmp_path / "b"))
    with pytest.raises(UserError, match="no way noise"):
        make_difference(tuned, base, new(tmp_path / "c"), new_rows="noise")
