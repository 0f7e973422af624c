"""The number of threads is what was measured to be best, and the fewest that are about as good."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from zhibei.generate import threads


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({16: 0.4, 8: 0.3, 4: 0.2, 2: 0.1, 1: 0.05}, 1),
        ({16: 0.10, 8: 0.10, 4: 0.13, 2: 0.2, 1: 0.4}, 8),
        ({16: 0.10, 8: 0.18, 4: 0.3, 2: 0.6, 1: 0.9}, 16),
        ({2: 0.100, 1: 0.109}, 1),
        ({6: 0.3, 3: 0.2, 1: 0.4}, 3),
    ],
)
def test_the_fewest_threads_near_the_best_time_are_taken(seconds: dict[int, float], expected: int) -> None:
    assert threads.chosen(max(seconds), lambda number: seconds[number]) == expected


def test_a_large_model_is_not_held_up_by_trials() -> None:
    asked: list[int] = []

    def slow(number: int) -> float:
        asked.append(number)
        return 3.0

    assert threads.chosen(16, slow) == 16
    assert asked == [16]


def test_a_small_model_is_measured_and_nothing_else_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        assert threads.threads_for(model, rows=2) in (1, 2)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert threads.threads_for(model, rows=2) is None
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert threads.threads_for(model, rows=2) is None, "what the user says counts"
    finally:
        torch.set_num_threads(before)
