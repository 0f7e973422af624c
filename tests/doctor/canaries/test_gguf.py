"""Canaries of area gguf."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy, planned
from zhibei.config.errors import UserError
from zhibei.config.hand_over import GGUF_BITS, WANT_IMPORTANCE
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.hand_over import HandOverFacts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.export.gguf.kinds import KINDS


def sizes(rows: int, tokens: int, added: dict[str, int] | None = None) -> Facts:
    """A model of so many rows beside a tokenizer of so many tokens."""
    facts = broken(broken(healthy(), "model.embedding_rows", rows), "tokenizer.num_ids", tokens)
    return broken(facts, "tokenizer.added_tokens", added or {})


def configured(**changes: object) -> Facts:
    return broken(healthy(), "model.config", {**CONFIG, **changes})


def asking(*forms: str, **changes: object) -> Facts:
    """LLaMA-7B that is to be handed over as GGUF, where the packages are."""
    facts = healthy(f"hand_over=[{','.join(forms or ('gguf:Q8_0',))}]")
    packages = {**facts.environment.packages, "gguf": "0.19.0", "xllamacpp": "2026.10.11549"}
    return broken(broken(facts, "environment.packages", packages), "model.config", {**CONFIG, **changes})


def without_package(name: str, *overrides: str) -> Facts:
    facts = broken(healthy(*overrides), "environment.packages", asking().environment.packages)
    return broken(facts, "environment.packages", {k: v for k, v in facts.environment.packages.items() if k != name})


def refused_words(pitfall: str, *forms: str) -> Facts:
    refusal = UserError("llama.cpp cannot", expected="another", fix="serve it", where="/models/x", pitfall=pitfall)
    return replace(asking(*forms), hand_over=HandOverFacts(tokenizer=refusal))


def disk(gib: float, *overrides: str) -> Facts:
    """LLaMA-7B in full training as it is planned: a checkpoint of 75 GiB is left, and the model of 12.6 GiB."""
    facts = planned(healthy("sft.max_steps=100", "sft.save_every=0", "sft.keep_best=false", *overrides))
    return broken(facts, "output.free_bytes", int(gib * 2**30))


PRE, ENGINE = "gguf-pretokenizer-hash-unknown", "gguf-tokenizer-without-engine"
GGUF = "hand_over=[gguf:Q8_0]"

CANARIES: Canaries = {
    "export-peak-disk-gguf": (
        [disk(92, GGUF), disk(97, "hand_over=[hf]"), disk(110, "hand_over=[hf,gguf:F16]")],
        [
            disk(98, GGUF),
            disk(92),
            disk(60, GGUF),  # too small for the run itself, as its own checks say
            disk(120, "hand_over=[hf,gguf:F16]"),
            healthy(GGUF),
        ],
    ),
    "export-toolchain-missing": (
        [without_package("gguf", GGUF), without_package("xllamacpp", "hand_over=[hf,gguf:Q4_K_M]")],
        [without_package("gguf"), without_package("xllamacpp", "hand_over=[hf,meta]"), asking()],
    ),
    "gguf-arch-unsupported": (
        [
            asking(model_type="gpt_neox"),
            asking(model_type="qwen2", use_sliding_window=True),
            asking(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ],
        [asking(), asking(model_type="qwen2"), broken(healthy(), "model.config", {**CONFIG, "model_type": "gpt_neox"})],
    ),
    PRE: ([refused_words(PRE), refused_words(PRE, "hf", "gguf:F16")], [asking(), refused_words(ENGINE), healthy()]),
    ENGINE: ([refused_words(ENGINE)], [asking(), refused_words(PRE), replace(healthy(), hand_over=HandOverFacts())]),
    "gguf-rows-no-multiple-of-block": (
        [
            asking("gguf:Q4_K_M", hidden_size=288),
            asking("gguf:Q8_0", intermediate_size=172),
            asking("gguf:F16", "gguf:Q6_K", hidden_size=4544),
        ],
        [asking("gguf:Q4_K_M"), asking("gguf:Q8_0", hidden_size=288), asking("gguf:F16", hidden_size=172), healthy()],
    ),
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


def test_the_types_that_a_run_file_can_name_are_those_that_can_be_written() -> None:
    assert set(GGUF_BITS) == set(KINDS)
    assert set(WANT_IMPORTANCE) == {name for name, kind in KINDS.items() if kind.wants_importance}


def test_what_cannot_be_made_is_taken_out_and_the_rest_stays() -> None:
    find = CATALOGUE["gguf-arch-unsupported"].find
    assert find is not None
    (finding,) = find(asking("hf", "gguf:F16", "gguf:Q8_0", model_type="gpt_neox"))
    assert dict(finding.changes) == {"hand_over": ["hf"]}
    assert "gguf:F16, gguf:Q8_0" in finding.what


def test_types_that_take_the_place_of_others_are_named() -> None:
    find = CATALOGUE["gguf-rows-no-multiple-of-block"].find
    assert find is not None
    (finding,) = find(asking("gguf:Q4_K_M", hidden_size=288, intermediate_size=768))
    assert "hidden_size 288 as Q5_0" in finding.what
    assert "intermediate_size" not in finding.what
    assert finding.level == "warning"
