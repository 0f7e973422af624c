"""Canaries of area data."""

from __future__ import annotations

from typing import Any

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy, healthy_audit
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.rows import PairFacts, Seen
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()


def rows(*overrides: str, **changes: Any) -> Facts:
    """Sound rows with some of their facts replaced."""
    facts = healthy(*overrides)
    for name, value in changes.items():
        facts = broken(facts, f"rows.{name}", value)
    return facts


def audit(**changes: Any) -> dict[str, Any]:
    return healthy_audit() | changes


def few(number: int, **changes: Any) -> dict[str, Any]:
    """The audit of a small set, of which ten rows are held out."""
    sizes = {"rows_read": number, "rows_kept": number, "rows_train": number - 10, "rows_heldout": 10}
    return audit(**{**sizes, **changes})


def pairs(**changes: Any) -> Facts:
    sound = {"rows_read": 1000, "rows_kept": 1000, "rows_train": 980, "rows_heldout": 20, "dropped": {}}
    audit = {**sound, **changes.pop("audit", {})}
    given = {"num_pairs": 1000, "num_train": 980, "num_steps": 8, "audit": audit, **changes}
    return healthy("stage=dpo", rows=None, pairs=PairFacts(**given))


def mapped(columns: str) -> Facts:
    return healthy(f"data.sources=[{{path: a.json, columns: {columns}}}]")


def seen(count: int) -> Seen:
    return Seen(count, tuple(f"rows.json, record {number}" for number in range(min(count, 5))))


CANARIES: Canaries = {
    "alpaca-data-noise": (
        [
            rows(suspicious={"placeholder_answer": seen(300), "no_input_phrase": seen(400)}),
            rows(suspicious={"merged_instructions": seen(80)}),
            rows(suspicious={"placeholder_answer": seen(3)}, audit=few(60)),
            rows(suspicious={"wrong_arithmetic": seen(20)}, audit=few(500)),
            pairs(suspicious={"service_message": seen(15)}),
        ],
        [
            rows(suspicious={"placeholder_answer": seen(4), "merged_instructions": seen(10)}),
            rows(suspicious={"cut_off_answer": seen(4000), "names_another_model": seen(900)}),
            rows(suspicious={"placeholder_answer": seen(1)}, audit=few(60)),
        ],
    ),
    "dataset-all-rows-dropped": (
        [
            rows(audit=audit(rows_kept=1000, dropped={"broken": 51000})),
            pairs(audit={"rows_kept": 600, "dropped": {"too_long": 400}}),
            rows(audit=audit(rows_kept=48000, dropped={"broken": 2600, "template": 1400})),
            rows(audit=few(54, rows_read=60, dropped={"special_token": 6})),
            pairs(audit={"rows_kept": 900, "dropped": {"prompt_fills_window": 100}}),
        ],
        [
            rows(audit=audit(dropped={"broken": 900})),
            rows(audit=few(58, rows_read=60, dropped={"too_long": 2})),
            rows(audit=audit(rows_kept=1000, dropped={"template": 51000})),  # roles-must-alternate says so
        ],
    ),
    "dataset-whole-dialogue-in-instruction": (
        [rows(suspicious={"role_markers": seen(9000)}), rows(suspicious={"role_markers": seen(4)}, audit=few(40))],
        [rows(suspicious={"role_markers": seen(300)}), rows(suspicious={"role_markers": seen(1)}, audit=few(12))],
    ),
    "markup-artefacts-in-answers": (
        [
            rows(suspicious={"html_remnants": seen(7800)}),
            rows(suspicious={"escaped_characters": seen(9)}, audit=few(60)),
        ],
        [
            rows(suspicious={"html_remnants": seen(200)}),
            rows(suspicious={"escaped_characters": seen(1)}, audit=few(30)),
        ],
    ),
    "train-val-leakage-duplicates": (
        [
            rows(heldout_in_training=seen(40)),
            rows("data.validation=eval.json", heldout_in_training=seen(1)),
            rows("data.validation=eval.json", heldout_in_training=seen(9), audit=audit(dropped={"in_validation": 9})),
            rows(asked_in_training=seen(700)),
            pairs(heldout_in_training=seen(3)),
        ],
        [
            rows(heldout_in_training=seen(2)),
            rows(asked_in_training=seen(80)),
            rows(asked_in_training=seen(6), audit=few(60)),
            rows("data.validation=eval.json"),
        ],
    ),
    "rows-repeated": (
        [rows(duplicates=seen(5200)), rows(duplicates=seen(30), audit=few(60)), pairs(duplicates=seen(500))],
        [rows(duplicates=seen(400)), rows(duplicates=seen(1), audit=few(12))],
    ),
    "answers-all-the-same": (
        [rows(same_answer=seen(50000)), rows(same_answer=seen(45), audit=few(60))],
        [
            rows(same_answer=seen(25000)),  # one of two classes
            rows(same_answer=seen(8), audit=few(18)),
        ],
    ),
    "answers-repeat-the-question": (
        [
            rows(suspicious={"answer_repeats_question": seen(30000)}),
            rows(suspicious={"answer_repeats_question": seen(12)}, audit=few(40)),
            pairs(suspicious={"answer_repeats_question": seen(600)}),
        ],
        [
            rows(suspicious={"answer_repeats_question": seen(900)}),
            rows(suspicious={"answer_repeats_question": seen(3)}, audit=few(12)),
        ],
    ),
    "answers-speak-as-another-model": (
        [
            rows(suspicious={"assistant_disclaimer": seen(12000)}),
            rows(suspicious={"names_another_model": seen(3000)}),
            rows(suspicious={"assistant_disclaimer": seen(20)}, audit=few(60)),
        ],
        [
            rows(suspicious={"assistant_disclaimer": seen(4000), "names_another_model": seen(900)}),
            rows(suspicious={"names_another_model": seen(3)}, audit=few(40)),
        ],
    ),
    "answers-cut-off": (
        [rows(suspicious={"cut_off_answer": seen(9000)}), rows(suspicious={"cut_off_answer": seen(15)}, audit=few(60))],
        [rows(suspicious={"cut_off_answer": seen(3000)}), rows(suspicious={"cut_off_answer": seen(4)}, audit=few(20))],
    ),
    "columns-mapped-crosswise": (
        [
            mapped("{chosen: rejected, rejected: chosen}"),
            mapped("{chosen: rejected_response}"),
            mapped("{rejected: best_answer}"),
            mapped("{output: question}"),
            mapped("{instruction: reference_answer}"),
            mapped("{prompt: response}"),
        ],
        [
            mapped("{chosen: better_answer, rejected: worse_answer}"),
            mapped("{output: target, instruction: query}"),
            mapped("{prompt: question, completion: best_answer}"),
            mapped("{output: text}"),
            healthy("data.sources=[{path: a.json}, b.json]"),
        ],
    ),
    "fewer-rows-than-a-batch": (
        [
            rows(audit=few(60)),
            rows("sft.global_batch=512", audit=few(500)),
            pairs(audit={"rows_train": 40}),
        ],
        [rows("sft.global_batch=8", audit=few(60)), rows(audit=few(500)), pairs()],
    ),
}


def test_what_is_told_names_count_share_place_and_setting() -> None:
    find = CATALOGUE["rows-repeated"].find
    assert find is not None
    (finding,) = find(rows(duplicates=seen(12), audit=few(60)))
    assert finding.what == "12 of 60 rows (20.0%) say what an earlier one says"
    assert finding.where == "rows.json, record 0"
    assert finding.level == "warning"
    assert [one.level for one in find(rows(duplicates=seen(58), audit=few(60)))] == ["stop"]


@pytest.mark.parametrize("number", [8, 20, 60])
def test_a_small_sound_set_shows_nothing(number: int) -> None:
    facts = rows("sft.global_batch=4", "data.validation=0.2", audit=few(number + 10))
    found = [
        name for name, entry in CATALOGUE.items() if entry.area == "data" and entry.find and list(entry.find(facts))
    ]
    assert found == []
