"""The guard on names of arrays bites on a wrong rank and a wrong size, and lets the healthy pass."""

from __future__ import annotations

import numpy as np
import pytest

from tests.shape_names import WrongShape, shape_names_checked


def healthy(num_tokens: int) -> float:
    logits_BT = np.zeros((2, num_tokens))
    losses_B = logits_BT.sum(1)
    return losses_B.sum()


def wrong_rank() -> float:
    losses_BT = np.zeros(3)
    return losses_BT.sum()


def wrong_size() -> float:
    logits_BT = np.zeros((2, 3))
    targets_BT = np.zeros((2, 4))
    return logits_BT.sum() + targets_BT.sum()


def test_healthy_names_pass_and_sizes_may_differ_between_calls() -> None:
    with shape_names_checked(__file__):
        healthy(3)
        healthy(4)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong_rank, r"wrong_rank: losses_BT promises 2 dimensions and has the shape \(3,\)"),
        (wrong_size, "wrong_size: T is 3 in logits_BT and 4 in targets_BT"),
    ],
)
def test_broken_names_are_found(function, words: str) -> None:
    with pytest.raises(WrongShape, match=words), shape_names_checked(__file__):
        function()


def test_other_files_are_not_looked_at() -> None:
    with shape_names_checked("zhibei/losses"):
        wrong_rank()
