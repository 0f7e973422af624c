"""The configurations whose memory is measured: shapes of real families cut to few layers. Knows no measuring.

GRID was used while the model of `zhibei.plan` was made; HELD_OUT is drawn by a seed and was never looked at for that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

# Sizes as in the families' published config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
                 "intermediate_size": 11008, "vocab_size": 32000},
    "llama-3-8b": {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 128256},
    "tinyllama-1.1b": {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
                       "intermediate_size": 5632, "vocab_size": 32000},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 32000, "sliding_window": 4096},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
                     "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
                   "intermediate_size": 18944, "vocab_size": 152064},
    "qwen3-1.7b": {"model_type": "qwen3", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "tie_word_embeddings": True},
    "gemma-2b": {"model_type": "gemma", "hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1,
                 "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000, "pad_token_id": 0},
    "gemma2-2b": {"model_type": "gemma2", "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4,
                  "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000, "pad_token_id": 0},
    "phi3-mini": {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32,
                  "intermediate_size": 8192, "vocab_size": 32064, "pad_token_id": 0, "eos_token_id": 2,
                  "bos_token_id": 1},
    "phi-2": {"model_type": "phi", "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 32,
              "intermediate_size": 10240, "vocab_size": 51200},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 2048,
                "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt-1.3b": {"model_type": "opt", "hidden_size": 2048, "num_attention_heads": 32, "ffn_dim": 8192,
                 "word_embed_proj_dim": 2048, "vocab_size": 50272, "dropout": 0.0},
    "pythia-2.8b": {"model_type": "gpt_neox", "hidden_size": 2560, "num_attention_heads": 32,
                    "intermediate_size": 10240, "vocab_size": 50304},
    "starcoder2-3b": {"model_type": "starcoder2", "hidden_size": 3072, "num_attention_heads": 24,
                      "num_key_value_heads": 2, "intermediate_size": 12288, "vocab_size": 49152},
    "olmoe-7b": {"model_type": "olmoe", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
                 "intermediate_size": 1024, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8},
    "llama-0.5b-tied": {"model_type": "llama", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
                        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "tiny": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 176, "vocab_size": 512, "pad_token_id": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One configuration. `tokens` fill one forward pass, in rows of `row` tokens; a step takes `passes` of them."""

    shape: str
    layers: int
    tokens: int
    row: int = 1024
    passes: int = 1
    method: str = "full"
    checkpointing: str = "none"
    optimizer: str = "adamw"
    compile: bool = True
    precision: str = "bf16"
    packing: bool = True
    rank: int = 16
    targets: str = "all-linear"
    quantize: str = "none"

    def config(self) -> dict[str, Any]:
        """As config.json holds it."""
        sizes = SHAPES[self.shape]
        layers = "n_layer" if "n_embd" in sizes else "num_hidden_layers"
        positions = {} if "n_positions" in sizes else {"max_position_embeddings": max(4096, self.row)}
        return {**sizes, layers: self.layers, **positions}

    def words(self) -> str:
        """What `--only` looks into."""
        return " ".join(f"{key}={value}" for key, value in vars(self).items())


def _s(shape: str, layers: int, tokens: int, **options: Any) -> Setting:
    return Setting(shape, layers, tokens, **options)


GRID: list[Setting] = [
    # sizes, vocabularies and grouped-query attention, compiled, everything kept
    _s("llama-7b", 6, 8192),
    _s("llama-3-8b", 4, 8192),
    _s("tinyllama-1.1b", 8, 16384, row=2048),
    _s("mistral-7b", 4, 4096, row=512),
    _s("qwen2.5-0.5b", 12, 8192, row=512),
    _s("qwen2.5-7b", 3, 4096),
    _s("qwen3-1.7b", 6, 8192, row=4096),
    _s("gemma-2b", 4, 4096),
    _s("gemma2-2b", 4, 4096),
    _s("phi3-mini", 6, 8192),
    _s("starcoder2-3b", 5, 8192),
    # several passes
    _s("llama-7b", 4, 4096, passes=3),
    _s("qwen2.5-0.5b", 8, 16384, passes=2),
    _s("llama-3-8b", 3, 2048, passes=2, row=512),
    # checkpointing
    _s("llama-7b", 6, 16384, checkpointing="full"),
    _s("llama-7b", 6, 8192, checkpointing="selective"),
    _s("llama-3-8b", 4, 16384, checkpointing="selective", passes=2),
    _s("qwen2.5-7b", 4, 32768, checkpointing="full", row=4096),
    _s("tinyllama-1.1b", 12, 32768, checkpointing="full", row=2048),
    # adapters
    _s("llama-7b", 8, 16384, method="lora"),
    _s("llama-3-8b", 6, 16384, method="lora", rank=64),
    _s("qwen2.5-7b", 4, 8192, method="lora", targets="q_proj,v_proj", rank=8),
    _s("llama-7b", 8, 32768, method="lora", checkpointing="full", row=2048),
    _s("mistral-7b", 6, 16384, method="lora", checkpointing="selective"),
    _s("gemma-2b", 6, 8192, method="lora"),
    _s("phi3-mini", 6, 8192, method="lora"),
    # not compiled
    _s("llama-7b", 4, 8192, compile=False),
    _s("qwen2.5-7b", 3, 4096, compile=False),
    _s("llama-7b", 6, 8192, method="lora", compile=False),
    _s("qwen3-1.7b", 6, 8192, compile=False, method="lora"),
    _s("llama-7b", 4, 8192, compile=False, checkpointing="selective"),
    _s("llama-3-8b", 4, 8192, compile=False, checkpointing="full", method="lora"),
    _s("gpt2-xl", 8, 8192, compile=False),
    _s("opt-1.3b", 8, 4096, compile=False),
    _s("pythia-2.8b", 4, 8192),
    _s("gemma2-2b", 4, 2048, compile=False, row=512),
    # long passes over a small vocabulary: a layer's backward is the peak
    _s("llama-7b", 3, 24576),
    _s("tinyllama-1.1b", 6, 32768, row=2048),
    # experts
    _s("olmoe-7b", 2, 4096, compile=False),
    # padded, precisions, optimisers
    _s("llama-7b", 4, 8192, packing=False, row=512),
    _s("tinyllama-1.1b", 6, 4096, packing=False, compile=False, row=512, method="lora"),
    _s("tinyllama-1.1b", 6, 4096, precision="fp32", row=512),
    _s("tinyllama-1.1b", 6, 8192, precision="fp16"),
    _s("llama-7b", 4, 4096, precision="fp16", method="lora"),
    _s("llama-7b", 4, 4096, optimizer="adamw_8bit"),
    _s("llama-7b", 4, 4096, optimizer="adafactor"),
    _s("qwen2.5-0.5b", 8, 4096, precision="fp32", optimizer="adafactor", passes=2),
]

TINY: list[Setting] = [
    _s("tiny", 2, 256, row=64, compile=False, precision="fp32"),
    _s("tiny", 2, 256, row=64, compile=False, precision="bf16", method="lora", passes=2),
    _s("tiny", 2, 256, row=64, compile=False, precision="fp32", checkpointing="full", packing=False),
]
"""For a CPU: whether the script runs, not what a GPU holds."""

HELD_OUT_SEED = 20261124
BLIND_SEED = 7  # drawn after the last change to the formulas: nothing was fitted to these
HELD_OUT_ROWS = 8  # rows of the evaluation in each measurement


def held_out(count: int = 14, seed: int = HELD_OUT_SEED) -> list[Setting]:
    """Configurations drawn by a seed; sizes between and beyond those of the grid."""
    draw = random.Random(seed)
    chosen: list[Setting] = []
    names = [name for name in SHAPES if name not in ("tiny", "olmoe-7b")]
    draw.shuffle(names)
    for number in range(count):
        shape = names[number % len(names)]
        method = draw.choice(("full", "full", "lora"))
        wide = int(SHAPES[shape].get("hidden_size", SHAPES[shape].get("n_embd", 0)))
        setting = Setting(
            shape,
            layers=draw.randint(2, 5) if wide > 2600 else draw.randint(4, 12),
            tokens=draw.choice((1536, 3072, 6144, 12288, 20480)),
            row=draw.choice((384, 768, 1536)),
            passes=draw.choice((1, 1, 2, 4)),
            method=method,
            checkpointing=draw.choice(("none", "none", "selective", "full")),
            compile=draw.random() < 0.7,
            rank=draw.choice((8, 32, 128)),
        )
        if SHAPES[shape]["model_type"] == "opt":
            setting = replace(setting, compile=False)
        chosen.append(setting)
    return chosen


QUANTISED: list[Setting] = [
    _s("llama-7b", 8, 4096, method="qlora", quantize="nf4"),
    _s("llama-7b", 8, 8192, method="qlora", quantize="nf4", checkpointing="full"),
    _s("llama-3-8b", 6, 4096, method="qlora", quantize="nf4", checkpointing="selective", passes=2),
    _s("qwen2.5-7b", 4, 4096, method="qlora", quantize="nf4", rank=64),
    _s("mistral-7b", 6, 1024, method="qlora", quantize="nf4", checkpointing="full", row=512),
    _s("llama-7b", 6, 4096, method="qlora", quantize="nf4", compile=False, checkpointing="full"),
    _s("llama-7b", 8, 4096, method="qlora", quantize="int8"),
    _s("gemma-2b", 6, 8192, method="qlora", quantize="int8", checkpointing="full", rank=8),
]
"""Bases in 4 and 8 bits."""

GRIDS = {
    "grid": GRID,
    "quantised": QUANTISED,
    "held-out": held_out(),
    "blind": [setting for setting in held_out(18, BLIND_SEED) if setting not in held_out()],
    "tiny": TINY,
}
