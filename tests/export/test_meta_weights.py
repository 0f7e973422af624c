"""Meta's form: Meta's arithmetic gives the same logits, both ways are bit-equal, and what has no such form says so."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.making import load, tokens
from tests.tiny import tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.export.meta_form import MULTIPLIERS, config_of, mlp_rule, mlp_width, params_of, refusal, rope_note
from zhibei.export.meta_weights import is_meta_folder, read_meta, write_meta
from zhibei.store.shards import read_tensors


def llama_folder(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 304, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "initializer_range": 0.2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def forward_like_meta(folder: Path, tokens_T: torch.Tensor) -> torch.Tensor:
    """LLaMA as Meta's own code computes it: complex rotary over neighbouring pairs, from one file."""
    params = json.loads((folder / "params.json").read_text())
    w = torch.load(folder / "consolidated.00.pth", weights_only=True)
    heads, kv, dim = params["n_heads"], params["n_kv_heads"], params["dim"]
    size = dim // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * w[name]

    frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    turns = torch.outer(torch.arange(len(tokens_T)).float(), frequencies)
    circle = torch.polar(torch.ones_like(turns), turns)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * circle).flatten(-2)

    x = w["tok_embeddings.weight"][tokens_T]
    mask = torch.full((len(tokens_T), len(tokens_T)), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = (
            (h @ w[f"{at}attention.w{part}.weight"].T).view(len(tokens_T), count, size)
            for part, count in (("q", heads), ("k", kv), ("v", kv))
        )
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv, 1)
        v = v.repeat_interleave(heads // kv, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        gate = torch.nn.functional.silu(h @ w[at + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w[at + "feed_forward.w3.weight"].T)) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, {"tie_word_embeddings": True}]
)
def test_metas_arithmetic_on_our_file_gives_transformers_logits(changes, tmp_path):
    source = llama_folder(tmp_path / "hf", **changes)
    (tmp_path / "meta").mkdir()
    write_meta(source, tmp_path / "meta")
    ours = tokens(304)
    with torch.no_grad():
        expected = load(source)(ours).logits
    for row, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(forward_like_meta(tmp_path / "meta", row), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("kv", [8, 4])
def test_there_and_back_is_bit_for_bit(num_shards, kv, tmp_path):
    source = llama_folder(tmp_path / "hf", num_key_value_heads=kv)
    meta, back = tmp_path / "meta", tmp_path / "back"
    meta.mkdir()
    back.mkdir()
    if kv % num_shards:
        with pytest.raises(UserError, match="key heads 4 cannot be divided"):
            write_meta(source, meta, num_shards=num_shards)
        return
    write_meta(source, meta, num_shards=num_shards)
    assert is_meta_folder(meta)
    assert len(list(meta.glob("*.pth"))) == num_shards
    read_meta(meta, back)
    before, after = read_tensors(source), read_tensors(back)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert mine[name] == theirs[name]


def test_llama3_splits_the_vocabulary_and_scales_its_positions(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    source = llama_folder(
        tmp_path / "hf", vocab_size=100_008, rope_parameters=rope, hidden_size=16, intermediate_size=32
    )
    meta, back = tmp_path / "meta", tmp_path / "back"
    meta.mkdir()
    back.mkdir()
    write_meta(source, meta, num_shards=2)
    first = torch.load(meta / "consolidated.00.pth", weights_only=True)
    assert first["tok_embeddings.weight"].shape == (50_004, 16)
    assert first["layers.0.attention.wo.weight"].shape == (16, 8)
    (note,) = read_meta(meta, back)
    assert "131,072" in note
    assert json.loads((back / "config.json").read_text())["rope_parameters"] == rope
    assert torch.equal(read_tensors(source)["lm_head.weight"], read_tensors(back)["lm_head.weight"])


@pytest.mark.parametrize(
    ("width", "inner"), [(4096, 11008), (5120, 13824), (8192, 28672), (4096, 14336), (2048, 8192), (64, 172), (64, 193)]
)
def test_the_width_of_the_mlp_is_metas_rule(width, inner):
    multiple_of, multiplier = mlp_rule(width, inner)
    assert mlp_width(width, multiple_of, multiplier) == inner
    if (width, inner) in ((4096, 11008), (8192, 28672), (4096, 14336)):
        assert (multiple_of, multiplier) in MULTIPLIERS


def test_what_has_no_such_form():
    plain = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1,
        "intermediate_size": 192, "vocab_size": 304,
    }  # fmt: skip
    assert refusal(plain) == ""
    assert "qwen2" in refusal({**plain, "model_type": "qwen2"})
    assert "bias" in refusal({**plain, "attention_bias": True})
    assert "head_dim" in refusal({**plain, "head_dim": 16})
    assert "vocabulary 305" in refusal({**plain, "vocab_size": 305}, num_shards=2)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert refusal({**plain, "rope_scaling": llama3}) == ""
    assert "factor of its rotary scaling is 16" in refusal({**plain, "rope_scaling": {**llama3, "factor": 16.0}})
    assert "high_freq_factor" in refusal({**plain, "rope_scaling": {**llama3, "high_freq_factor": 2.0}})
    small = {**plain, "hidden_size": 2048, "rope_scaling": {**llama3, "factor": 32.0}}
    assert refusal(small) == ""
    assert "Meta's own code by 8" in rope_note(small)[0]
    assert rope_note({**plain, "rope_scaling": llama3}) == rope_note(plain) == ()
    assert config_of(params_of(small), vocabulary=304, mlp=192, is_tied=True)[0]["rope_parameters"]["factor"] == 32.0
    assert "yarn" in refusal({**plain, "rope_scaling": {"type": "yarn", "factor": 2}})


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/zhibei-was-here"),))


def test_a_pickle_with_a_program_is_not_run(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 64, "n_layers": 1, "n_heads": 8}')
    torch.save({"tok_embeddings.weight": Harmful()}, tmp_path / "consolidated.00.pth")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        read_meta(tmp_path, out)
    (tmp_path / "consolidated.00.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        read_meta(tmp_path, out)
    assert not Path("/tmp/zhibei-was-here").exists()


def test_missing_and_strange_files(tmp_path):
    source, meta, out = llama_folder(tmp_path / "hf"), tmp_path / "meta", tmp_path / "out"
    meta.mkdir()
    out.mkdir()
    (note,) = write_meta(source, meta, num_shards=2)
    assert "tokenizer.model" in note
    params = json.loads((meta / "params.json").read_text())
    (meta / "params.json").write_text(json.dumps({**params, "n_layers": 1}))
    with pytest.raises(UserError, match=r"layers\.1\."):
        read_meta(meta, out)
    (meta / "params.json").write_text(json.dumps({**params, "n_layers": 3}))
    with pytest.raises(UserError, match=r"layers\.2\."):
        read_meta(meta, out)
    (meta / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match=r"1 files consolidated"):
        read_meta(meta, out)
