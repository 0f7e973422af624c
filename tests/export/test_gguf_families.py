"""Every family, written as GGUF and read by llama.cpp, gives the logits that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import FAMILIES, _shape, tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.export.gguf.export import export_gguf
from zhibei.export.gguf.families import extra_tensors, family_of, metadata
from zhibei.generate.llama_cpp import GgufModel

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    changes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True}
    return Gemma3TextConfig(**_shape(**changes, num_hidden_layers=7))


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_shape(**changes))


CONFIGS = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3")},
    "mistral": lambda: _mistral(),
    "gemma3": _gemma3,
    "llama, tied": lambda: _llama(tie_word_embeddings=True),
    "llama 3.1": lambda: _llama(rope_parameters=LLAMA3),
    "llama, linear": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama, yarn": lambda: _llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "llama, biases": lambda: _llama(attention_bias=True),
    "phi3, longrope": lambda: _phi3_long(),
}


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_shape(sliding_window=None))


def _phi3_long() -> Any:
    from transformers import Phi3Config

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 4.0, 8.0],
    }
    # llama.cpp opens contexts in steps of 256 tokens, and takes the long factors beyond the original length.
    return Phi3Config(**_shape(max_position_embeddings=512), original_max_position_embeddings=256, rope_parameters=rope)


def _folder(path: Path, config: Any, *, rows: int = 300) -> tuple[Path, Any]:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config.vocab_size = rows
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path, model


def _logits(path: Path, row: list[int]) -> np.ndarray:
    with GgufModel.load(path) as model:
        return model.open(context_tokens=128).feed(row, every=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    folder, model = _folder(tmp_path / "model", CONFIGS[name]())
    row = np.random.default_rng(2).integers(4, 300, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([row])).logits[0].numpy()
    (made,) = export_gguf(str(folder), tmp_path / "out.gguf", types=["F32"])
    found = _logits(made.paths[0], row)
    # llama.cpp keeps keys and values in 16 bits, whatever the weights are.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.95


def test_factors_of_llama_3_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = _llama(rope_parameters=LLAMA3)
    plain = _llama()
    expected = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(config).inv_freq
    found = extra_tensors(config.to_dict())["rope_freqs.weight"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised already"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(changes: dict[str, Any], what: str) -> None:
    config = {**_llama().to_dict(), **changes}
    with pytest.raises(UserError, match=what):
        family_of(config, where="config.json")


def test_a_window_that_llama_cpp_does_not_have_is_said() -> None:
    config = FAMILIES["mistral"]().to_dict()
    (note,) = family_of(config, where="").notes(config)
    assert "beyond 8 tokens" in note


def test_old_and_new_configs_give_the_same_metadata() -> None:
    new = {**_llama().to_dict(), "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    family = family_of(new, where="")
    assert metadata(family, new) == metadata(family, old)
    assert metadata(family, new)["llama.rope.freq_base"] == 5e5


def test_rows_without_a_word_are_written_and_said(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "model", _llama(), rows=320)
    (made,) = export_gguf(str(folder), tmp_path, types=["Q8_0"])
    assert any("20 rows" in note for note in made.notes)
    with GgufModel.load(made.paths[0]) as model:
        assert model.num_tokens == 320


def test_words_without_a_row_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "model", _llama(), rows=296)
    with pytest.raises(UserError, match="300 words and the model 296 rows"):
        export_gguf(str(folder), tmp_path / "out", types=["Q8_0"])
    assert not (tmp_path / "out").exists()
