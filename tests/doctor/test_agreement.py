"""What ranks say of themselves before they train: alike, and each way in which they can differ."""

import copy
from typing import Any

import pytest

from tests.train.small_run import small_run
from zhibei.config.errors import UserError
from zhibei.doctor.agreement import MOST_SKEW_SECONDS, disagreement, own_facts

WEIGHTS, ROWS = "a" * 64, [["/data/rows.json", 1000, "b" * 64]]


def rank(number: int, **figures: Any) -> dict[str, Any]:
    """Two ranks on each node."""
    is_first = number % 2 == 0
    return {
        "rank": number,
        "host": "node-a" if number < 2 else "node-b",
        "local_rank": number % 2,
        "launch": "id",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "peft": "0.21"},
        "fault": None,
        "run": {"sft.epochs": 3, "name": "x"},
        "data": copy.deepcopy(ROWS) if is_first else None,
        "model": WEIGHTS if is_first else None,
        "device": f"cuda GPU-{number}",
        **figures,
    }


def told(*, skew: float = 0.0, **of_rank_2: Any) -> list[tuple[dict[str, Any], float] | None]:
    return [(rank(0), 0.0), (rank(1), 0.1), (rank(2, **of_rank_2), skew), (rank(3), 0.0)]


FAULT = UserError("no such file", expected="a file", fix="copy it", where="data.json").as_dict()


def test_ranks_that_are_alike_may_train():
    assert disagreement(told(), seconds=60) is None
    assert disagreement(told(skew=MOST_SKEW_SECONDS / 2), seconds=60) is None
    assert disagreement([(rank(n, device="cpu"), 0.0) for n in range(4)], seconds=60) is None


@pytest.mark.parametrize(
    ("figures", "parts"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.1", "peft": "0.21"}}, ("torch", "2.12.1", "2.13.0")),
        ({"run": {"sft.epochs": 4, "name": "x"}}, ("sft.epochs", "4", "3")),
        ({"data": [["/data/rows.json", 999, "b" * 64]]}, ("/data/rows.json", "999", "1,000")),
        ({"data": [["/data/rows.json", 1000, "c" * 64]]}, ("bbbbbbbbbbbb", "cccccccccccc")),
        ({"data": []}, ("0 data files", "1")),
        ({"model": "d" * 64}, ("dddddddddddd", "aaaaaaaaaaaa")),
        ({"device": "cpu"}, ("cpu", "cuda")),
        ({"host": "node-a", "device": "cuda GPU-1"}, ("the same card", "GPU-1")),
        ({"fault": FAULT}, ("no such file",)),
        ({"skew": 40.0}, ("40 s ahead of",)),
        ({"skew": -40.0}, ("40 s behind",)),
    ],
)
def test_a_difference_is_named_with_rank_host_and_both_values(figures, parts):
    error = disagreement(told(**figures), seconds=60)
    assert error is not None
    for part in ("rank 2", figures.get("host", "node-b"), *parts):
        assert part in error.what


def test_a_fault_of_every_rank_is_told_as_it_is():
    everywhere = [(rank(number, fault=FAULT), 0.0) for number in range(4)]
    error = disagreement(everywhere, seconds=60)
    assert error is not None
    assert error.what == "no such file"
    of_the_files = [(rank(number, fault=FAULT if number % 2 == 0 else None), 0.0) for number in range(4)]
    error = disagreement(of_the_files, seconds=60)
    assert error is not None
    assert error.what == "no such file", "only the first rank of a node looks at files"


def test_ranks_that_do_not_come_are_named_and_so_are_those_that_did():
    error = disagreement([(rank(0), 0.0), (rank(1), 0.0), None, None], seconds=60)
    assert error is not None
    assert error.what == "ranks 2, 3 did not come within 60 s; these are here: node-a: 0, 1"


def test_what_a_rank_says_of_itself_is_the_same_twice_and_differs_with_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    first = own_facts(small_run(tmp_path), None)
    assert first["fault"] is None
    assert first["launch"]
    again = own_facts(small_run(tmp_path), None)
    assert again == first
    other = own_facts(small_run(tmp_path, rows=[{"instruction": "a", "input": "", "output": "b"}] * 40), None)
    error = disagreement([(first, 0.0), ({**other, "rank": 1, "host": "node-b"}, 0.0)], seconds=60)
    assert error is not None
    assert "rows.json" in error.what
