"""Pairs, judged answers and prompts: the ids of the supervised path, one BOS and one terminator, nothing unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.text.small_tokenizers import byte_level, sentencepiece_like
from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, ModelSection, RunFile
from zhibei.data import workers
from zhibei.data.pairs import prepare_answers
from zhibei.data.prepare import prepare
from zhibei.data.prepared import PreparedAnswers, PreparedRows
from zhibei.text.families import find_template
from zhibei.text.tokenizer import Tokenizer


def pairs(num_rows: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}.", "chosen": f"{n}, gladly", "rejected": f"no {n}"} for n in range(num_rows)]


def judged(num_rows: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}.", "completion": f"{n}!", "label": n % 3 > 0} for n in range(num_rows)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def run_of(path: Path | str, stage: str, **data: Any) -> RunFile:
    section = DataSection(sources=[str(path)], **{"workers": 0, "validation": 0.2} | data)
    return RunFile(name="t", model=ModelSection(path="m"), data=section, stage=stage)  # type: ignore[arg-type]


def made(
    rows: list[Any], folder: Path, *, stage: str = "dpo", tokenizer: Tokenizer | None = None, **options: Any
) -> PreparedAnswers:
    tokenizer = tokenizer or byte_level()
    template = find_template(options.pop("template", "alpaca"), tokenizer)
    return prepare_answers(run_of(write(folder / "rows.json", rows), stage, **options), tokenizer, template)


def row(rows: PreparedRows, number: int) -> list[int]:
    return rows.tokens[rows.borders[number] : rows.borders[number + 1]].tolist()


def learned(rows: PreparedRows, number: int) -> list[int]:
    part = slice(rows.borders[number], rows.borders[number + 1])
    return rows.tokens[part][rows.supervised[part]].tolist()


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("template", ["alpaca", "vicuna_v1.1"])
def test_each_side_is_the_row_that_supervised_training_would_make(make: Any, template: str, tmp_path: Path) -> None:
    tokenizer = make()
    found = made(pairs(), tmp_path, tokenizer=tokenizer, template=template, validation=0)
    assert found.kind == "pairs"
    for side in ("chosen", "rejected"):
        rows = [{"instruction": one["prompt"], "output": one[side]} for one in pairs()]
        path = write(tmp_path / f"{side}.json", rows)
        supervised = prepare(run_of(path, "sft", validation=0), tokenizer, find_template(template, tokenizer))
        mine = found.train.sides[side]
        assert np.array_equal(mine.tokens, supervised.train.tokens)
        assert np.array_equal(mine.supervised, supervised.train.supervised)
        assert np.array_equal(mine.borders, supervised.train.borders)


def test_one_bos_one_terminator_and_a_shared_prompt(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    found = made(pairs(), tmp_path, tokenizer=tokenizer)
    for number in range(len(found.train)):
        sides = [row(found.train.sides[side], number) for side in ("chosen", "rejected")]
        begin = int(found.train.columns["prompt_tokens"][number])
        assert sides[0][:begin] == sides[1][:begin]
        for ids, side in zip(sides, ("chosen", "rejected"), strict=True):
            assert ids.count(tokenizer.bos_id or -1) == 1
            assert ids.count(tokenizer.eos_id) == 1
            assert ids[-1] == tokenizer.eos_id
            assert learned(found.train.sides[side], number) == ids[-len(learned(found.train.sides[side], number)) :]
    assert found.remarks["extra_bos"]["count"] == found.remarks["extra_terminator"]["count"] == 0


def test_a_template_that_writes_bos_before_each_question_is_sound_and_one_inside_of_an_answer_is_not(
    tmp_path: Path,
) -> None:
    tokenizer = sentencepiece_like()
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "B?"},
    ]
    rows = [{"prompt": turns, "chosen": f"good {n}", "rejected": "bad"} for n in range(4)]
    sound = made(rows, tmp_path, tokenizer=tokenizer, template="llama2", validation=0)
    assert row(sound.train.sides["chosen"], 0).count(tokenizer.bos_id or -1) == 2
    assert sound.remarks["extra_bos"]["count"] == 0
    spelt = [*rows, {"prompt": "C?", "chosen": f"{tokenizer.bos}good", "rejected": "bad"}]
    kept = made(spelt, tmp_path, tokenizer=tokenizer, special_tokens_in_text="keep", validation=0)
    assert kept.remarks["extra_bos"]["count"] == 1
    ended = [*rows, {"prompt": "C?", "chosen": f"good{tokenizer.eos}", "rejected": "bad"}]
    twice = made(ended, tmp_path, tokenizer=tokenizer, special_tokens_in_text="keep", validation=0)
    assert twice.remarks["extra_terminator"]["count"] == 1


def test_only_the_compared_answer_is_learned(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "B?"},
    ]
    rows = [{"prompt": turns, "chosen": "good", "rejected": "bad"}, *pairs(3)]
    tokenizer = byte_level()
    found = made(rows, tmp_path, template="vicuna_v1.1", validation=0)
    assert tokenizer.decode(learned(found.train.sides["chosen"], 0)).strip() == "good</s>"
    assert tokenizer.decode(learned(found.train.sides["rejected"], 0)).strip() == "bad</s>"


def test_the_last_token_of_a_row_is_known_by_its_border_not_by_a_padding_id(tmp_path: Path) -> None:
    """Earlier turns end with EOS, which may be the padding id too: "the first one, minus one" lies in the prompt."""
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "B?"},
    ]
    rows = [{"prompt": turns, "chosen": "good", "rejected": "not so good"}] * 2
    tokenizer = sentencepiece_like()
    found = made(rows, tmp_path, tokenizer=tokenizer, template="vicuna_v1.1", validation=0)
    for side in found.train.sides.values():
        ids = row(side, 0)
        last = int(side.borders[1]) - 1
        assert ids.count(tokenizer.eos_id) == 2
        assert side.tokens[last] == tokenizer.eos_id
        assert ids.index(tokenizer.eos_id) < found.train.columns["prompt_tokens"][0] < last
        assert side.supervised[last]
        assert not set(ids) & {-1, -100}


def test_held_out_pairs_are_chosen_by_their_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n} {k}", "rejected": f"no {n} {k}"} for n in range(30) for k in range(3)
    ]
    found = made(rows, tmp_path)
    numbers = [
        {int(one.split("#")[1]) // 3 for one in side.sides["chosen"].row_ids} for side in (found.train, found.heldout)
    ]
    assert numbers[0]
    assert numbers[1]
    assert not numbers[0] & numbers[1]
    assert found.remarks["asked_in_training"]["count"] == 0


def test_what_is_equal_after_the_cut_is_dropped_and_counted(tmp_path: Path) -> None:
    long = "word " * 100
    rows = [*pairs(10), {"prompt": "Say it.", "chosen": long + "yes", "rejected": long + "no"}]
    found = made(rows, tmp_path, max_tokens=300, too_long="cut")
    assert found.remarks["identical_after_cut"] == {
        "count": 1,
        "places": [f"{tmp_path / 'rows.json'}, record 10 (line 1)"],
    }
    assert found.audit["dropped"] == {"identical_after_cut": 1}
    assert found.audit["rows_kept"] == 10


def test_a_prompt_that_fills_the_window_is_dropped_and_named(tmp_path: Path) -> None:
    rows = [*pairs(10), {"prompt": "why " * 200, "chosen": "yes", "rejected": "no"}]
    found = made(rows, tmp_path, max_tokens=300, too_long="cut")
    assert found.audit["dropped"] == {"prompt_fills_window": 1}
    kept = made(rows, tmp_path, max_tokens=300, too_long="drop")
    assert kept.audit["dropped"] == {"too_long": 1}
    with pytest.raises(UserError, match=r"tokens, data\.max_tokens is 300"):
        made(rows, tmp_path, max_tokens=300, too_long="stop")


def test_a_record_is_dropped_once_whichever_side_is_too_long(tmp_path: Path) -> None:
    long = "word " * 100
    rows = [
        *pairs(10),
        {"prompt": "a", "chosen": long, "rejected": "short"},
        {"prompt": "b", "chosen": "short", "rejected": long},
        {"prompt": "c", "chosen": long, "rejected": long + "!"},
    ]
    found = made(rows, tmp_path, max_tokens=300)
    assert found.audit["dropped"] == {"too_long": 3}
    assert [entry["detail"].split(":")[0] for entry in found.ledger] == ["chosen", "chosen", "rejected"]
    assert found.train.sides["chosen"].row_ids == found.train.sides["rejected"].row_ids


def test_remarks_on_pairs(tmp_path: Path) -> None:
    rows = [
        *pairs(10),
        {"prompt": "Say 3.", "chosen": "3, gladly", "rejected": "no 3"},
        {"prompt": "Say 4.", "chosen": "no 4", "rejected": "4, gladly"},
        {"prompt": "x", "chosen": "a b", "rejected": "a  b"},
        {"prompt": "y", "chosen": "a", "rejected": "b", "margin": -2},
        {"prompt": "z", "chosen": "a", "rejected": "a"},
        {"prompt": "z", "chosen": "a", "rejected": " "},
        {"prompt": "z", "chosen": "", "rejected": "b"},
    ]
    found = made(rows, tmp_path, on_error="drop", validation=0)
    counts = {
        name: remark["count"]
        for name, remark in found.remarks.items()
        if isinstance(remark, dict) and "count" in remark
    }
    assert {name: number for name, number in counts.items() if number} == {
        "repeated": 1,
        "contradictions": 1,
        "whitespace_only": 1,
        "negative_margin": 1,
        "identical": 1,
        "empty_chosen": 1,
        "empty_rejected": 1,
    }
    assert found.remarks["negative_margin"]["places"][0].endswith("record 13 (line 1), field 'margin'")
    assert found.train.columns["margin"].tolist()[-1] == -2
    assert np.isnan(found.train.columns["margin"][0])


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen"),
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "inf"}, "margin"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "margin"),
    ],
)
def test_a_broken_pair_stops_with_file_record_and_field(record: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        made([*pairs(5), record], tmp_path)
    assert "rows.json, record 5" in caught.value.where
    assert caught.value.where.endswith(f"field '{field}'")


def test_judged_answers_keep_their_labels(tmp_path: Path) -> None:
    found = made(judged(), tmp_path, validation=0)
    assert found.kind == "judged"
    assert found.train.columns["is_good"].tolist() == [n % 3 > 0 for n in range(40)]
    assert (found.audit["good"], found.audit["bad"]) == (26, 14)
    turned = [{**judged(3)[1], "label": False}]
    assert made([*judged(), *turned], tmp_path, validation=0).remarks["contradictions"]["count"] == 1


def test_prompts_end_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = byte_level()
    rows = [{"prompt": f"Say {n}."} for n in range(20)]
    found = made(rows, tmp_path, stage="ppo", validation=0)
    assert found.kind == "prompts"
    assert tokenizer.decode(row(found.train.sides["prompt"], 3)).endswith("Say 3.\n\n### Response:")
    assert not found.train.sides["prompt"].supervised.any()
    same = made(pairs(20), tmp_path, stage="ppo", validation=0)
    assert np.array_equal(same.train.sides["prompt"].tokens, found.train.sides["prompt"].tokens)
    asked = [{"instruction": f"Say {n}.", "output": "x"} for n in range(20)]
    again = made(asked, tmp_path, stage="ppo", validation=0)
    assert np.array_equal(again.train.sides["prompt"].tokens, found.train.sides["prompt"].tokens)


def test_a_long_prompt_is_dropped_never_cut(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}."} for n in range(20)] + [{"prompt": "why " * 300}]
    found = made(rows, tmp_path, stage="ppo", max_tokens=300, too_long="cut")
    assert found.audit["dropped"] == {"too_long": 1}
    with pytest.raises(UserError, match="no record is left") as caught:
        made(rows[-1:], tmp_path, stage="ppo", max_tokens=300)
    assert "never cut" in caught.value.fix


SUPERVISED = [{"instruction": f"Say {n}.", "output": "x"} for n in range(20)]
TEXTS = [{"text": "once upon a time"} for _ in range(3)]


@pytest.mark.parametrize(
    ("rows", "stage", "words", "fits"),
    [
        (SUPERVISED, "dpo", "conversations with answers", "stage: sft"),
        (SUPERVISED, "reward", "conversations with answers", "stage: sft"),
        ([{"prompt": "a"}], "dpo", "prompts without answers", "stage: ppo"),
        (TEXTS, "reward", "plain text", "stage: sft"),
        (TEXTS, "ppo", "plain text", "stage: sft"),
        (judged(), "reward", "single answers with a thumb", "stage: dpo"),
    ],
)
def test_records_of_another_stage_are_refused_and_the_fitting_stage_is_named(
    rows: list[Any], stage: str, words: str, fits: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        made(rows, tmp_path, stage=stage)
    assert words in caught.value.what
    assert fits in caught.value.fix


@pytest.mark.parametrize(
    ("rows", "fits"), [(pairs(), "stage: reward or stage: dpo"), (judged(), "stage: dpo"), ([{"prompt": "a"}], "ppo")]
)
def test_supervised_training_refuses_what_has_no_answer_to_imitate(rows: list[Any], fits: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    with pytest.raises(UserError) as caught:
        prepare(run_of(write(tmp_path / "r.json", rows), "sft"), tokenizer, find_template("alpaca", tokenizer))
    assert fits in caught.value.fix


def test_two_kinds_in_one_run_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", pairs()), write(tmp_path / "b.json", judged())
    tokenizer = byte_level()
    with pytest.raises(UserError, match=r"among|two kinds"):
        prepare_answers(
            _of_two(first, second),
            tokenizer,
            find_template("alpaca", tokenizer),
        )


def _of_two(first: Path, second: Path) -> RunFile:
    data = DataSection(sources=[str(first), str(second)], workers=0)
    return RunFile(name="t", model=ModelSection(path="m"), data=data, stage="dpo")


@pytest.mark.parametrize(
    ("rows", "stage"), [(pairs(), "dpo"), (judged(), "dpo"), ([{"prompt": f"{n}"} for n in range(30)], "ppo")]
)
def test_a_second_reading_comes_from_the_cache_and_is_the_same(rows: list[Any], stage: str, tmp_path: Path) -> None:
    first, second = made(rows, tmp_path, stage=stage), made(rows, tmp_path, stage=stage)
    assert first.folder == second.folder
    assert isinstance(next(iter(second.train.sides.values())).tokens, np.memmap)
    tokenizer = byte_level()
    run = run_of(tmp_path / "rows.json", stage)
    fresh = prepare_answers(run, tokenizer, find_template("alpaca", tokenizer), use_cache=False)
    assert fresh.folder is None
    for side in ("train", "heldout"):
        for name, mine in getattr(fresh, side).sides.items():
            kept = getattr(second, side).sides[name]
            assert np.array_equal(mine.tokens, kept.tokens)
            assert np.array_equal(mine.supervised, kept.supervised)
            assert mine.row_ids == kept.row_ids
        for name, column in getattr(fresh, side).columns.items():
            assert np.array_equal(column, getattr(second, side).columns[name], equal_nan=column.dtype.kind == "f")
    assert (fresh.audit, fresh.ledger, fresh.remarks) == (second.audit, second.ledger, second.remarks)


def test_the_number_of_workers_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_ROWS", 20)
    monkeypatch.setattr(workers, "ROWS_PER_WORKER", 40)
    rows = [*pairs(100), *pairs(5)]
    alone, several = (made(rows, tmp_path, workers=n, cache=str(tmp_path / str(n))) for n in (0, 2))
    assert np.array_equal(alone.train.sides["rejected"].tokens, several.train.sides["rejected"].tokens)
    assert (alone.audit, alone.remarks) == (several.audit, several.remarks)
    assert alone.remarks["repeated"]["count"] == 5


def test_a_validation_file_is_held_out_and_what_training_shares_with_it_is_dropped(tmp_path: Path) -> None:
    held = write(tmp_path / "held.json", [pairs()[3], {"prompt": "Say 4.", "chosen": "other", "rejected": "one"}])
    found = made(pairs(), tmp_path, validation=str(held))
    assert len(found.heldout) == 2
    assert found.audit["dropped"] == {"in_validation": 1}
    assert found.remarks["heldout_in_training"]["count"] == 0
    assert found.remarks["asked_in_training"]["count"] == 1
