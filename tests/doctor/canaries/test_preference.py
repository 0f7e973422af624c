"""Canaries of area preference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts
from zhibei.doctor.facts.rows import PairFacts, Seen

LORA = ("model.method=lora",)
PPO = ("stage=ppo", "model.method=lora", "ppo.models=shared")


def seen(count: int) -> Seen:
    return Seen(count, tuple(f"pairs.json, record {number}" for number in range(min(count, 5))))


def pairs(*overrides: str, stage: str = "dpo", **changes: Any) -> Facts:
    """A thousand sound pairs with some of their facts replaced."""
    audit = {"kind": "pairs", "rows_read": 1000, "rows_kept": 1000, "rows_train": 980, "rows_heldout": 20}
    given: dict[str, Any] = {"num_pairs": 1000, "num_train": 980, "audit": audit | changes.pop("audit", {}), **changes}
    return healthy(f"stage={stage}", *overrides, rows=None, pairs=PairFacts(**given))


def judged(good: int, bad: int) -> Facts:
    return pairs(kind="judged", num_good=good, num_bad=bad)


def adapter(**config: Any) -> AdapterFacts:
    return AdapterFacts(Path("/models/adapter"), config=config)


CANARIES: Canaries = {
    "dpo-bos-in-completion": ([pairs(extra_bos=seen(1)), pairs(stage="reward", extra_bos=seen(900))], [pairs()]),
    "dpo-data-identical-pairs": (
        [pairs(identical=seen(144), audit={"rows_read": 220}), pairs(stage="reward", whitespace_only=seen(40))],
        [pairs(), pairs(identical=seen(3)), pairs(whitespace_only=seen(2))],
    ),
    "dpo-double-eos": ([pairs(extra_terminator=seen(2)), pairs(stage="reward", extra_terminator=seen(9))], [pairs()]),
    "dpo-trainable-nonlora-moves-reference": (
        [
            pairs(*LORA, "dpo.reference=adapters_off", "lora.modules_to_save=[embed_tokens]"),
            pairs("model.method=qlora", "dpo.reference=adapters_off", "lora.modules_to_save=[lm_head, norm]"),
            healthy(*PPO, "lora.modules_to_save=[lm_head]", rows=None),
            healthy(*PPO, "lora.adapter=/models/adapter", rows=None, adapter=adapter(modules_to_save=["embed_tokens"])),
        ],
        [
            pairs(*LORA, "dpo.reference=adapters_off"),
            pairs(*LORA, "lora.modules_to_save=[embed_tokens]"),  # auto keeps a copy then
            pairs(*LORA, "dpo.reference=precomputed", "lora.modules_to_save=[embed_tokens]"),
            healthy(*LORA, "lora.modules_to_save=[embed_tokens]"),
            healthy(*PPO, rows=None),
        ],
    ),
    "reference-is-not-the-start": (
        [
            pairs(*LORA, "lora.adapter=/models/adapter", "dpo.reference=adapters_off"),
        ],
        [
            pairs(*LORA, "lora.adapter=/models/adapter"),
            pairs(*LORA, "lora.adapter=/models/adapter", "dpo.reference=precomputed"),
            healthy(*LORA, "lora.adapter=/models/adapter"),
            healthy(*PPO, "lora.adapter=/models/adapter", rows=None),
            pairs(*LORA, "lora.adapter=/models/adapter", stage="reward"),
        ],
    ),
    "kto-all-labelled-desirable": (
        [judged(500, 0), judged(0, 20), judged(5000, 3)],
        [judged(400, 600), judged(30, 1), pairs()],
    ),
    "pref-pair-identical-after-truncation": (
        [pairs(identical_after_cut=seen(30)), pairs(stage="reward", identical_after_cut=seen(400))],
        [pairs(), pairs(identical_after_cut=seen(4))],
    ),
    "simpo-max-prompt-ge-max-length": (
        [
            pairs(prompt_fills_window=seen(30)),
            pairs(kind="judged", num_good=5, num_bad=5, prompt_fills_window=seen(300)),
        ],
        [pairs(), pairs(prompt_fills_window=seen(2))],
    ),
    "pairs-contradict": (
        [pairs(contradictions=seen(60)), pairs(kind="judged", num_good=500, num_bad=500, contradictions=seen(90))],
        [pairs(), pairs(contradictions=seen(4))],
    ),
    "pairs-look-exchanged": (
        [
            pairs(negative_margin=seen(2)),
            pairs(negative_margin=seen(900)),
            pairs(looks_swapped="in 99% of the pairs the rejected answer is longer (300 tokens against 20)"),
        ],
        [pairs(), pairs(mean_tokens_chosen=40, mean_tokens_rejected=60)],
    ),
}


def test_mostly_negative_margins_stop_and_a_few_warn() -> None:
    from zhibei.doctor.pitfalls.preference_pairs import pairs_look_exchanged

    assert [one.level for one in pairs_look_exchanged(pairs(negative_margin=seen(900)))] == ["stop"]
    assert [one.level for one in pairs_look_exchanged(pairs(negative_margin=seen(2)))] == ["warning"]
