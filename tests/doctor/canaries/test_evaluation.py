"""Canaries of area evaluation."""

from __future__ import annotations

from typing import Any

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy, healthy_audit
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.rows import PairFacts


def held(number: int, *overrides: str, total: int = 52000, steps: int = 1170) -> Facts:
    audit = healthy_audit() | {"rows_heldout": number, "rows_train": total - number, "rows_kept": total}
    return broken(broken(healthy(*overrides), "rows.audit", audit), "rows.num_steps", steps)


def pairs(number: int, *overrides: str) -> Facts:
    audit: dict[str, Any] = {"rows_heldout": number, "rows_kept": 9000, "rows_train": 9000 - number}
    return healthy("stage=dpo", *overrides, rows=None, pairs=PairFacts(num_pairs=9000, num_steps=70, audit=audit))


CANARIES: Canaries = {
    "val-split-too-small-eval-useless": (
        [
            held(1, "data.validation=0.00001"),
            held(0, "data.validation=0.001", total=60),
            held(1040, "sft.evaluate_every=60000"),
            pairs(3, "data.validation=3"),
            pairs(180, "dpo.evaluate_every=500"),
        ],
        [
            held(1040),
            held(0, total=30),  # the default share of thirty rows: nobody asked for more
            held(6, "data.validation=0.1", total=60),
            held(0, "data.validation=0"),
            held(1040, "sft.evaluate_every=100"),
            held(1040, "sft.evaluate_every=0"),
            pairs(180),
        ],
    ),
}
