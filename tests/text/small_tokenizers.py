"""Tokenizers small enough to build in a test, and the real ones where the shared material is there."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.shared_data import shared_root
from zhibei.text.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: Say hello to the user. ### Response: Hello, dear user! USER: hi ASSISTANT: yes",
    "smile:) smile:) smile:) smile:)",
    "A chat between a curious user and an artificial intelligence assistant. 你好，世界。 ça va très bien 😀",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"]


def _finish(backend: Backend, *, adds_bos: bool, source: str) -> Tokenizer:
    if adds_bos:
        bos = backend.token_to_id("<s>")
        single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        backend.post_processor = single
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    return check_tokenizer(wrapped, source=source)


@cache
def byte_level() -> Tokenizer:
    """GPT-style: bytes, a regular expression that puts spaces in front of words, trimmed offsets."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS + HEADERS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _finish(backend, adds_bos=False, source="byte level")


@cache
def sentencepiece_like() -> Tokenizer:
    """LLaMA-2-style: no pre-tokenizer, spaces as ▁, one before every piece of text, bytes for unknown characters."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = Backend(models.BPE())
    backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS + HEADERS, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    backend.train_from_iterator(CORPUS, trainer)
    trained = backend.get_vocab()
    vocabulary = dict(sorted(trained.items(), key=lambda item: item[1]))
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    import json

    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    whole = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = normalizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS + HEADERS])
    return _finish(whole, adds_bos=True, source="sentencepiece-like")


SMALL = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like}
REAL = {
    "llama2": ("data", "derived", "llama2_tokenizer"),
    "llama3": ("data", "derived", "llama3_tokenizer"),
    "stories260K": ("data", "models", "stories260K"),
    "stories3M": ("data", "models", "stories3M"),
}
ALL = [*SMALL, *REAL]


@cache
def _real(name: str) -> Tokenizer | None:
    folder = shared_root().joinpath(*REAL[name])
    return load_tokenizer(str(folder)) if folder.exists() else None


def tokenizer_called(name: str) -> Tokenizer:
    """A small tokenizer, or a real one; skips the test where the real one is not there."""
    if name in SMALL:
        return SMALL[name]()
    found = _real(name)
    if found is None:
        pytest.skip(f"the tokenizer {name} is not there (set ZHIBEI_SHARED)")
    return found
