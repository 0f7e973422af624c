"""What everybody trains: the LLaMA-7B shape with random weights, over rows as long as real Alpaca rows.

Knows shapes and lengths, not who trains. The lengths are those of 999 real rows under the LLaMA tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTHS_FILE = Path(__file__).parent / "data" / "alpaca_lengths.json"
FIRST_TOKEN = 3  # below are unknown, start, end: random rows hold none of them, so 0 always means padding

# hidden width, layers, heads, MLP width, vocabulary
SHAPES = {"llama-7b": (4096, 32, 32, 11008, 32000), "tiny": (64, 2, 4, 176, 512)}


@dataclass(frozen=True)
class Workload:
    """One measurement's rows and model shape. `layers` cuts the model short for a smoke test (0 keeps all)."""

    shape: str = "llama-7b"
    layers: int = 0
    max_tokens: int = 512
    global_batch: int = 128
    seed: int = 0

    @property
    def num_layers(self) -> int:
        return self.layers or SHAPES[self.shape][1]

    @property
    def vocabulary(self) -> int:
        return SHAPES[self.shape][4]

    def config(self) -> Any:
        """The transformers configuration of the shape."""
        from transformers import LlamaConfig

        hidden, _, heads, mlp, vocabulary = SHAPES[self.shape]
        return LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def num_parameters(self) -> int:
        """Parameters that take part in matrix products: everything but the input embedding."""
        hidden, _, _, mlp, vocabulary = SHAPES[self.shape]
        layer = 4 * hidden * hidden + 3 * hidden * mlp + 2 * hidden
        return self.num_layers * layer + hidden + vocabulary * hidden

    def tflops(self, tokens_per_s: float, method: str) -> float:
        """Model TFLOP/s: 6N per useful token for full training, 4N where the base is frozen (no weight gradients)."""
        return {"full": 6, "lora": 4, "qlora": 4}[method] * self.num_parameters() * tokens_per_s / 1e12

    def rows(self, num_steps: int) -> list[np.ndarray]:
        """Random token ids (int32) for that many optimiser steps, cut at `max_tokens`; a pure function of the seed."""
        lengths = np.asarray(json.loads(LENGTHS_FILE.read_text(encoding="utf-8")))
        random = np.random.default_rng(self.seed)
        chosen = np.minimum(random.choice(lengths, num_steps * self.global_batch), self.max_tokens)
        return [random.integers(FIRST_TOKEN, self.vocabulary, length, dtype=np.int32) for length in chosen]

    def describe(self) -> dict[str, Any]:
        """The part of a record's settings that is the same for everybody."""
        described: dict[str, Any] = {
            "shape": self.shape,
            "global_batch": self.global_batch,
            "max_tokens": self.max_tokens,
        }
        return {**described, "layers": self.layers} if self.layers else described


def random_model(workload: Workload, *, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Any:
    """The shape with random weights, made where it will train: normal(0, 0.02), norms at one."""
    from transformers import LlamaForCausalLM

    config = workload.config()
    config._attn_implementation = attention
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]
    # transformers computes the rotary frequencies at construction; on the meta device they would stay empty.
    model = model.to_empty(device=device)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    generator = torch.Generator(device=device).manual_seed(workload.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose words are t0, t1, ...: rivals ask for one although the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    )
