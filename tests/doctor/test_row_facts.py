"""What checks learn about rows is what the files hold: planted faults are counted, with their places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.small_tokenizers import byte_level
from zhibei.config.run import DataSection, ModelSection, RunFile
from zhibei.data.prepare import prepare
from zhibei.doctor.facts.rows import PairFacts, RowFacts, read_pair_facts, read_row_facts
from zhibei.text.families import find_template

ROWS = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(40)]
PAIRS = [{"prompt": f"Say {n}.", "chosen": f"{n}, gladly", "rejected": f"no {n}"} for n in range(40)]


def run_of(folder: Path, rows: list[Any], stage: str = "sft", **data: Any) -> RunFile:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    section = DataSection(sources=[data.pop("source", str(path))], **{"workers": 0, "validation": 0.2} | data)
    return RunFile(name="t", model=ModelSection(path="m"), data=section, stage=stage)  # type: ignore[arg-type]


def facts_of(folder: Path, rows: list[Any], **data: Any) -> RowFacts:
    tokenizer = byte_level()
    run = run_of(folder, rows, **data)
    return read_row_facts(run, prepare(run, tokenizer, find_template("alpaca", tokenizer)))


def pairs_of(folder: Path, rows: list[Any], stage: str = "dpo", **data: Any) -> PairFacts:
    tokenizer = byte_level()
    return read_pair_facts(run_of(folder, rows, stage, **data), tokenizer, find_template("alpaca", tokenizer))


def test_sound_rows_show_nothing(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, ROWS)
    assert facts.duplicates.count == facts.heldout_in_training.count == facts.asked_in_training.count == 0
    assert facts.same_answer.count == 1
    assert facts.records_in_files == 40
    assert facts.num_steps == 1
    assert facts.longest == facts.audit["lengths"]["percentiles"]["100"]
    assert facts.suspicious == {}


@pytest.mark.parametrize("change", [str.upper, lambda text: text.replace(" ", "  ") + " \n", str])
def test_rows_that_differ_in_case_and_spacing_alone_are_repeated(change: Any, tmp_path: Path) -> None:
    again = [{name: change(text) for name, text in row.items()} for row in ROWS[:3]]
    facts = facts_of(tmp_path, [*ROWS, *again], validation=0)
    assert facts.duplicates.count == 3
    assert (
        facts.duplicates.places[0] == f"{tmp_path}/rows.json, record 40 says what {tmp_path}/rows.json, record 0 says"
    )


def test_a_weight_is_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    facts = facts_of(tmp_path, ROWS, source={"path": str(path), "weight": 3}, validation=0)
    assert facts.audit["rows_kept"] == 120
    assert facts.duplicates.count == 0
    assert facts.records_in_files == 40


def test_a_limit_leaves_records_in_the_files(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, ROWS, source={"path": str(tmp_path / "rows.json"), "limit": 12}, validation=0)
    assert facts.audit["rows_read"] == 12
    assert facts.records_in_files == 40


def test_held_out_rows_that_training_knows(tmp_path: Path) -> None:
    held = tmp_path / "held.json"
    same, spaced = ROWS[0], {name: text.upper() for name, text in ROWS[1].items()}
    asked = {"instruction": "Say 2.", "output": "another"}
    held.write_text(json.dumps([same, spaced, asked, {"instruction": "New", "output": "new"}]))
    facts = facts_of(tmp_path, ROWS, validation=str(held))
    assert facts.audit["dropped"] == {"in_validation": 2}
    assert facts.heldout_in_training.count == 2
    assert f"{tmp_path}/rows.json, record 0" in facts.heldout_in_training.places
    assert facts.asked_in_training.count == 1


def test_answers_that_are_all_the_same_and_rows_that_look_faulty(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, [row | {"output": "N/A"} for row in ROWS], validation=0)
    assert facts.same_answer.count == 40
    assert facts.suspicious["placeholder_answer"].count == 40
    assert facts.suspicious["placeholder_answer"].places[0] == f"{tmp_path}/rows.json, record 0 (line 1)"


def test_what_was_counted_is_kept_with_the_rows(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], ROWS[1] | {"output": "N/A"}]
    assert facts_of(tmp_path, rows) == facts_of(tmp_path, rows)
    pairs = [*PAIRS, PAIRS[0]]
    assert pairs_of(tmp_path, pairs) == pairs_of(tmp_path, pairs)


def test_sound_pairs_show_nothing(tmp_path: Path) -> None:
    facts = pairs_of(tmp_path, PAIRS, validation=0)
    assert (facts.kind, facts.num_pairs, facts.num_train) == ("pairs", 40, 40)
    assert [
        name
        for name in PairFacts.__dataclass_fields__
        if getattr(getattr(facts, name), "count", 0) and not isinstance(getattr(facts, name), (tuple, str))
    ] == []
    assert facts.looks_swapped == ""
    assert facts.mean_tokens_chosen > facts.mean_tokens_rejected > 0


def test_rejected_answers_that_are_always_far_longer_look_exchanged(tmp_path: Path) -> None:
    swapped = [
        row | {"chosen": "no", "rejected": "a long and careful answer " * 3 + str(n)} for n, row in enumerate(PAIRS)
    ]
    assert "100% of the pairs" in pairs_of(tmp_path, swapped).looks_swapped
    half = [*PAIRS, *swapped]
    assert pairs_of(tmp_path, half).looks_swapped == ""
    assert pairs_of(tmp_path, swapped[:10]).looks_swapped == ""


def test_labels_of_judged_answers_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!", "label": n < 30} for n in range(40)]
    facts = pairs_of(tmp_path, rows)
    assert (facts.kind, facts.num_good, facts.num_bad) == ("judged", 30, 10)


def test_prompts_of_stage_ppo_have_facts_too(tmp_path: Path) -> None:
    facts = pairs_of(tmp_path, [{"prompt": f"Say {n}."} for n in range(40)], stage="ppo", validation=0)
    assert (facts.kind, facts.num_pairs) == ("prompts", 40)
    assert facts.longest == max(facts.audit["sides"]["prompt"]["lengths"].values())
