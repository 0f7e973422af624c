"""Preference pairs that cannot teach a preference. Knows only what is broken; the stages are checked, not run."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.place import Place, pair_rows
from tests.bad_inputs.scenario import Build, Scenario

EQUAL = "the same answer"


def pairs(stage: str, change: Any = None, **settings: Any) -> Build:
    """Sound pairs for a stage, then `change(rows)`."""

    def build(place: Place) -> None:
        place.verb = "check"
        place.rows = pair_rows()
        place.values[stage] = {**place.values.pop("sft"), "learning_rate": 1e-5}
        if stage == "reward":  # a score has no sampled answers
            del place.values[stage]["sample_tokens"]
        place.set("stage", stage)
        for key, value in settings.items():
            place.set(key.replace("__", "."), value)
        if change is not None:
            changed = change(place.rows)
            place.rows = (
                changed if isinstance(changed, list) and changed and isinstance(changed[0], dict) else place.rows
            )

    return build


def _equal(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["rejected"] = row["chosen"]


def _equal_one(rows: list[dict[str, Any]]) -> None:
    rows[17]["rejected"] = rows[17]["chosen"]


def _empty_rejected(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["rejected"] = ""


def _empty_one(rows: list[dict[str, Any]]) -> None:
    rows[17]["rejected"] = ""


def _no_rejected(rows: list[dict[str, Any]]) -> None:
    del rows[17]["rejected"]


def _equal_after_cut(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["chosen"] = "so " * 400 + "yes"
        row["rejected"] = "so " * 400 + "no"


RECORD_17 = r"rows\.json\S*, record 17 \(line \d+\), field 'rejected'"

PAIR_CASES = [
    Scenario(
        "r1_dpo_equal_all",
        "In every pair both answers are the same.",
        pairs("dpo", _equal),
        value=(r"equal|identical|same", r"\b(60|59)\b"),
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "r2_dpo_equal_one",
        "In one pair both answers are the same.",
        pairs("dpo", _equal_one),
        value="equal|identical|same",
        where=RECORD_17,
        remedy="on_error: drop",
    ),
    Scenario(
        "r3_dpo_missing_rejected",
        "A pair without its rejected answer.",
        pairs("dpo", _no_rejected),
        value="missing",
        where=RECORD_17,
        remedy="on_error: drop",
    ),
    Scenario(
        "r4_equal_after_cut",
        "Answers that differ only behind the cut.",
        pairs("dpo", _equal_after_cut, data__too_long="cut"),
        value=("cut", "equal|identical|same"),
        where=r"rows\.json\S*(#|, record )\d+",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "r5_rm_equal_all",
        "In every pair of a reward model both answers are the same.",
        pairs("reward", _equal),
        value=(r"equal|identical|same", r"\b(60|59)\b"),
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "r6_rm_equal_one",
        "In one pair of a reward model both answers are the same.",
        pairs("reward", _equal_one),
        value="equal|identical|same",
        where=RECORD_17,
        remedy="on_error: drop",
    ),
    Scenario(
        "r7_rm_empty_rejected",
        "Every rejected answer is empty: a reward model would learn to prefer length.",
        pairs("reward", _empty_rejected),
        value=("empty", r"\b(60|59)\b"),
        where=r"rows\.json.*'rejected'",
        remedy="to do:.*",
    ),
    Scenario(
        "r8_rm_empty_one",
        "One rejected answer is empty.",
        pairs("reward", _empty_one),
        value="empty",
        where=RECORD_17,
        remedy="on_error: drop",
    ),
]
