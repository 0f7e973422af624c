"""Canaries of area gguf."""

from __future__ import annotations

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy
from zhibei.doctor.facts.facts import Facts


def sizes(rows: int, tokens: int, added: dict[str, int] | None = None) -> Facts:
    """A model of so many rows beside a tokenizer of so many tokens."""
    facts = broken(broken(healthy(), "model.embedding_rows", rows), "tokenizer.num_ids", tokens)
    return broken(facts, "tokenizer.added_tokens", added or {})


def configured(**changes: object) -> Facts:
    return broken(healthy(), "model.config", {**CONFIG, **changes})


CANARIES: Canaries = {
    "gguf-vocab-minus-one": (
        [configured(vocab_size=-1), configured(vocab_size=0), configured(text_config={"vocab_size": -1})],
        [healthy(), configured(vocab_size=50257), configured(text_config={"vocab_size": 262144})],
    ),
    "gguf-vocab-model-32000-tok-32001": (
        [
            sizes(32000, 32001, {"<pad>": 32000}),
            sizes(50257, 50259, {"<|user|>": 50257, "<|end|>": 50258}),
            sizes(151936, 151937, {"<x>": 151936}),
        ],
        [
            sizes(32001, 32001, {"<pad>": 32000}),
            sizes(151936, 151669, {"<|im_end|>": 151645}),  # rows beyond the tokens only pad the table
            sizes(32000, 49953),  # another tokenizer altogether: area tokenizer says so
            healthy(),
        ],
    ),
    "gguf-vocab-model-32001-tok-32000": (
        [sizes(32001, 32000), sizes(32003, 32000), sizes(128257, 128256)],
        [
            sizes(32000, 32000),
            sizes(151936, 151669),
            sizes(50264, 50257),
            sizes(32064, 32000),
            sizes(257, 256),  # vocabularies of toy models have any size
        ],
    ),
}
