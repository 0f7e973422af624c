"""Canaries of tokenizers."""

from __future__ import annotations

from pathlib import Path

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts
from zhibei.doctor.pitfalls.tokenizer import token_id_beyond_embedding
from zhibei.doctor.pitfalls.tokenizer_more import train_infer_special_ids_disagree

FINE = healthy()
KNOWN = broken(FINE, "tokenizer.fingerprint", "a" * 64)


def trained_with(facts: Facts, sha256: str, **ids: int) -> Facts:
    manifest = {"tokenizer": {"sha256": sha256}, "special_ids": {"bos": 1, "eos": 2, "pad": 0, **ids}}
    return broken(facts, "model.parent_manifest", manifest)


def adapter_trained_with(sha256: str, **ids: int) -> Facts:
    manifest = {"tokenizer": {"sha256": sha256}, "special_ids": {"bos": 1, "eos": 2, **ids}}
    return broken(KNOWN, "adapter", AdapterFacts(path=Path("/runs/a/model"), manifest=manifest))


def declared(file: str, **ids: int | list[int] | None) -> Facts:
    return broken(FINE, "tokenizer.declared_ids", {"config.json": {"bos": 1, "eos": 2}, file: ids})


QWEN = broken(FINE, "tokenizer.bos", None)
QWEN = broken(QWEN, "tokenizer.ids", {"bos": None, "eos": 2, "pad": 0, "unk": 0})
QWEN = broken(QWEN, "tokenizer.declared_ids", {"config.json": {"bos": 151643, "eos": 2}})
QWEN = broken(broken(QWEN, "model.embedding_rows", 151936), "tokenizer.highest_id", 151664)
LLAMA3_CHAT = broken(FINE, "tokenizer.declared_ids", {"config.json": {"bos": 1, "eos": [2, 128008, 128009]}})
LLAMA3_CHAT = broken(broken(LLAMA3_CHAT, "model.embedding_rows", 128256), "tokenizer.highest_id", 128255)

UNUSED = broken(broken(FINE, "tokenizer.highest_id", 32000), "tokenizer.added_tokens", {"[PAD]": 32000})
PADDED = broken(UNUSED, "tokenizer.ids.pad", 32000)

CANARIES: Canaries = {
    "fast-tokenizer-ignores-add-eos": (
        [broken(FINE, "tokenizer.asks_eos", True), broken(FINE, "tokenizer.adds_eos", True)],
        [FINE],
    ),
    "legacy-flag-changes-between-versions": (
        [trained_with(KNOWN, "b" * 64), adapter_trained_with("b" * 64)],
        [KNOWN, trained_with(KNOWN, "a" * 64), adapter_trained_with("a" * 64), trained_with(KNOWN, "b" * 64, eos=7)],
    ),
    "llama-wrong-special-ids-decapoda": (
        [
            declared("config.json", bos=0, eos=1, pad=-1),
            declared("config.json", bos=1, eos=2, pad=-1),
            declared("config.json", eos=0),
            declared("config.json", eos=[128001, 128009]),
            broken(FINE, "tokenizer.misplaced", ("eos_token is 'a' with id 5; tokenizer.model has '</s>' with id 2",)),
        ],
        [FINE, QWEN, LLAMA3_CHAT, declared("config.json", bos=1, eos=2, pad=None)],
    ),
    "slow-fast-space-after-special": (
        [
            broken(FINE, "tokenizer.other_vocabulary", "900 of 1,000 pieces differ"),
            broken(FINE, "tokenizer.slow_fast_difference", "'a b': tokenizer.model gives [1], tokenizer.json [2]"),
        ],
        [FINE],
    ),
    "token-id-beyond-embedding": (
        [
            PADDED,
            broken(UNUSED, "rows.highest_id", 32000),
            broken(UNUSED, "rows", None),
            broken(FINE, "model.embedding_rows", 31000),
            broken(FINE, "rows.highest_id", 32007),
            declared("config.json", bos=1, eos=2, pad=32000),
            declared("generation_config.json", eos=[2, 128009]),
        ],
        [
            FINE,
            QWEN,
            LLAMA3_CHAT,
            UNUSED,  # gguf-vocab-model-32000-tok-32001 says so
            broken(broken(FINE, "tokenizer.highest_id", 40000), "model.embedding_rows", None),
        ],
    ),
    "tokenizer-of-another-model": (
        [
            broken(FINE, "model.embedding_rows", 128256),
            broken(FINE, "tokenizer.other_than_models", "31,000 of 32,000 ids are other tokens"),
            broken(broken(FINE, "model.embedding_rows", 600), "tokenizer.highest_id", 299),
        ],
        [
            FINE,
            QWEN,
            LLAMA3_CHAT,
            broken(broken(FINE, "model.embedding_rows", 51200), "tokenizer.highest_id", 50294),
            broken(broken(FINE, "model.embedding_rows", 320), "tokenizer.highest_id", 299),
        ],
    ),
    "train-infer-special-ids-disagree": (
        [
            declared("generation_config.json", bos=1, eos=0),
            declared("generation_config.json", eos=[0, 7]),
            declared("generation_config.json", bos=0, eos=2),
            trained_with(KNOWN, "b" * 64, eos=0),
            adapter_trained_with("b" * 64, bos=0),
        ],
        [
            FINE,
            QWEN,
            LLAMA3_CHAT,
            declared("generation_config.json", bos=1, eos=[2, 7]),
            trained_with(KNOWN, "b" * 64),
            trained_with(KNOWN, "b" * 64, pad=5),
        ],
    ),
}


def test_one_wrong_id_is_told_by_one_check() -> None:
    """config.json and generation_config.json with the same wrong id: the first file is named, not both."""
    facts = broken(FINE, "tokenizer.declared_ids", {"config.json": {"eos": 1}, "generation_config.json": {"eos": 1}})
    assert list(train_infer_special_ids_disagree(facts)) == []


def test_the_tokens_beyond_the_embedding_are_named() -> None:
    (finding,) = token_id_beyond_embedding(PADDED)
    assert "[PAD]" in finding.what
    assert "32,001 rows" in finding.to_do
