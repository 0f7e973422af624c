"""Tiny model folders with random weights for tests: small, deterministic, complete. Knows no stage of zhibei."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
NUM_POSITIONS = 256

_TRAINING_TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nAdd the numbers and answer with the sum.\n\n### Response:\nThe answer is 12.",
    "USER: What is the capital of France? ASSISTANT: The capital of France is Paris.</s>",
    "the cat and the dog went to the house and then the other cat saw the sun in the water",
]


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens with `<s>`, `</s>`, `<pad>`, `<unk>`; `<s>` comes first, as in LLaMA."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[UNKNOWN, BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=NUM_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _shape(**changes: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": NUM_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        # Wide enough that greedy answers vary and attention matters, unlike the usual 0.02.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return {**shape, **changes}


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_shape())


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_shape(sliding_window=8))


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_shape(tie_word_embeddings=True))


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_shape(head_dim=8))


def _gemma() -> Any:
    from transformers import GemmaConfig

    return GemmaConfig(**_shape(head_dim=8, tie_word_embeddings=True), hidden_activation="gelu_pytorch_tanh")


def _gemma2() -> Any:
    from transformers import Gemma2Config

    changes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True}
    return Gemma2Config(**_shape(**changes), hidden_activation="gelu_pytorch_tanh")


def _phi() -> Any:
    from transformers import PhiConfig

    return PhiConfig(**_shape(num_key_value_heads=4))


def _phi3() -> Any:
    from transformers import Phi3Config

    return Phi3Config(**_shape())


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "phi": _phi,
    "phi3": _phi3,
}


def tiny_model(family: str = "llama", *, seed: int = 0) -> Any:
    """A random model of a family in fp32 and eval mode: 2 layers, hidden 32; leaves the global RNG alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


def tiny_model_folder(tmp_path: Path, family: str = "llama", *, seed: int = 0, name: str | None = None) -> Path:
    """A complete Hugging Face folder `tmp_path/<name>` (default `tiny-<family>`): model and tokenizer."""
    folder = Path(tmp_path) / (name or f"tiny-{family}")
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
