"""What inspection counts is what was put into the file: lengths, languages, duplicates, broken rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhibei.data.dedup import near_duplicates, signatures, similarity, word_runs
from zhibei.data.inspect import Said, distribution, inspect_file
from zhibei.data.languages import script_of

VOCABULARY = [f"word{number}" for number in range(3000)]


def documents(number: int, seed: int = 0) -> list[list[str]]:
    generator = random.Random(seed)
    return [generator.choices(VOCABULARY, k=60) for _ in range(number)]


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    rows = documents(600)
    planted = {}
    for copy in range(60):
        words = list(rows[copy])
        words[copy % 60] = "changed"
        planted[len(rows)] = copy
        rows.append(words)
    found = near_duplicates([" ".join(words) for words in rows])
    assert {later: first for first, later, _ in found.pairs} == planted
    assert all(alike >= 0.8 for _, _, alike in found.pairs)


def test_minhash_agrees_with_the_exact_similarity() -> None:
    words = documents(1)[0] * 5
    for keep in (0.5, 0.8, 0.95):
        cut = int(len(words) * keep)
        pair = word_runs(
            [" ".join(f"{w}{i}" for i, w in enumerate(words)), " ".join(f"{w}{i}" for i, w in enumerate(words[:cut]))]
        )
        estimate = (signatures(pair)[0] == signatures(pair)[1]).mean()
        assert abs(estimate - similarity(*pair)) < 4 * 0.5 / np.sqrt(64)


@given(st.lists(st.text(max_size=30), max_size=12))
def test_any_texts_can_be_compared(texts: list[str]) -> None:
    found = near_duplicates([*texts, "a b c d", "a b c d"])
    assert (len(texts), len(texts) + 1, 1.0) in found.pairs or any("a b c d" in text.lower() for text in texts)
    for first, later, alike in found.pairs:
        assert first < later
        assert 0.8 <= alike <= 1


def test_chinese_is_compared_by_characters() -> None:
    text = "保持健康的三个提示是均衡饮食锻炼身体和充足睡眠每天都要坚持下去"
    assert near_duplicates([text, text[:-1] + "来", "完全不同的另一句话说的是别的事情"]).pairs[0][:2] == (0, 1)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello there", "Latin"),
        ("Größe 12", "Latin"),
        ("Привет, мир", "Cyrillic"),
        ("保持健康 (health)", "Han"),
        ("これは日本語の文です", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("مرحبا بالعالم", "Arabic"),
        ("Γειά σου", "Greek"),
        ("नमस्ते", "Devanagari"),
        ("123 + 4 = 127", "none"),
        ("", "none"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=80))
def test_the_bars_hold_every_value_once(values: list[int]) -> None:
    found = distribution(values)
    assert sum(each["count"] for each in found["bins"]) == len(values)
    assert [each["from"] for each in found["bins"][1:]] == [each["to"] + 1 for each in found["bins"][:-1]]
    assert found["bins"][0]["from"] <= min(values) <= found["bins"][0]["to"]
    assert found["bins"][-1]["from"] <= max(values) <= found["bins"][-1]["to"]
    assert found["percentiles"]["50"] == sorted(values)[(len(values) - 1) // 2]


def test_everything_in_one_file(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add the two numbers.", "input": "2, 3", "output": "5"},
        {"instruction": "Add the two numbers.", "input": "2, 3", "output": "5"},
        {"instruction": "Add the two numbers.", "input": "2, 3", "output": "five"},
        {"instruction": "Name it.", "input": "<noinput>", "output": "N/A"},
        {"instruction": "Name it.", "input": None, "output": ""},
        {"instruction": "给出三个提示", "output": "吃好睡好运动", "id": 7},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n{")
    found = inspect_file(path, count_tokens=lambda texts: [len(text.split()) for text in texts])
    json.dumps(found, allow_nan=False)
    assert (found["records"], found["broken"]["count"], found["format"]) == (5, 2, "alpaca")
    assert [entry["line"] for entry in found["broken"]["examples"]] == [5, 7]
    fields = {field["name"]: field for field in found["fields"]}
    assert fields["input"]["present"] == pytest.approx(5 / 6)
    assert fields["input"]["filled"] == pytest.approx(4 / 6)
    assert fields["input"]["types"] == {"text": 4, "null": 1}
    assert found["duplicates"]["exact"] == 1
    assert found["duplicates"]["questions_with_several_answers"] == 1
    assert {rule["rule"]: rule["count"] for rule in found["suspicious"]["rules"]} == {
        "no_input_phrase": 1,
        "placeholder_answer": 1,
    }
    assert found["suspicious"]["rules"][0]["examples"][0]["where"] == f"{path}, record 3 (line 4)"
    assert found["lengths"]["characters"]["answers"]["max"] == 6
    assert found["lengths"]["tokens"]["whole"]["max"] == 7
    assert found["turns"] == {"1": 5}


def test_what_two_files_share_is_counted(tmp_path: Path) -> None:
    asked = [f"What is the number after {number}?" for number in range(10)]
    for name, chosen, answer in (("a", asked[:6], "It is."), ("b", asked[4:], "It is."), ("c", asked[:3], "Other.")):
        rows = [json.dumps({"prompt": question, "completion": answer}) for question in chosen]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    earlier: list[Said] = []
    found = [inspect_file(tmp_path / f"{name}.jsonl", earlier=earlier) for name in "abc"]
    shared = [
        [(Path(each["file"]).stem, each["records"], each["questions"]) for each in f["shared_with"]] for f in found
    ]
    assert shared == [[], [("a", 2, 2)], [("a", 0, 3)]]
