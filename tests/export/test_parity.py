"""Parity: the figures equal their definitions, equal sides are equal, and each kind of difference is caught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from zhibei.config.errors import UserError
from zhibei.export.parity import compare
from zhibei.export.parity_limits import LIMITS, limits_for
from zhibei.text.messages import Message

ROWS = [[1, 2, 3, 4, 5], [2, 2], [0, 5, 1]]
CHAT = [[Message("user", "hello")], [Message("system", "be kind"), Message("user", "hello")]]


@dataclass
class Stub:
    """A side whose logits are a table of the last token, plus something."""

    name: str = "reference"
    vocabulary: int = 6
    noise: float = 0.0
    shift: int = 0
    refuses_system: bool = True
    bytes_on_disk: int = 100
    is_open: bool = False

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        self.is_open = True
        table = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
        table = table + self.noise * np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
        return [table[list(row)][:, : self.vocabulary] for row in rows]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) + self.shift for letter in text]

    def render(self, messages: Sequence[Message]) -> list[int]:
        if messages[0].role == "system" and self.refuses_system:
            raise UserError("no system slot", expected="", fix="")
        return self.encode(messages[-1].content)

    def close(self) -> None:
        self.is_open = False


def against(other: Stub):
    return compare(Stub(), other, rows=ROWS, conversations=CHAT, probes=["a", "bc"])


def test_a_side_is_the_same_as_itself():
    report = against(Stub("other"))
    assert (report.kl_mean, report.kl_max, report.top1_agreement, report.perplexity_change) == (0, 0, 1, 0)
    assert report.num_tokens == 4 + 1 + 2
    assert report.tokenizer.is_whole
    assert report.template.is_whole, "refused by both is the same"
    report.require(LIMITS["same"])
    json.dumps(report.as_dict(LIMITS["same"]), allow_nan=False)


def test_the_figures_are_their_definitions():
    mine, theirs = Stub(), Stub("other", noise=0.3)
    report = against(theirs)
    kl, agreeing, nll = [], [], []
    for row in ROWS:
        p, q = (np.exp(side.logits([row])[0].astype(float)) for side in (mine, theirs))
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        for t in range(len(row) - 1):
            kl.append(sum(p[t] * (np.log(p[t]) - np.log(q[t]))))
            agreeing.append(p[t].argmax() == q[t].argmax())
            nll.append((-np.log(p[t, row[t + 1]]), -np.log(q[t, row[t + 1]])))
    ours, other = np.exp(np.mean(nll, axis=0))
    assert report.kl_mean == pytest.approx(np.mean(kl))
    assert report.kl_max == pytest.approx(np.max(kl))
    assert report.top1_agreement == np.mean(agreeing)
    assert report.reference.perplexity == pytest.approx(ours)
    assert report.perplexity_change == pytest.approx(other / ours - 1)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Stub("other", noise=0.3), id="logits"),
        pytest.param(Stub("other", shift=1), id="tokenizer and template"),
        pytest.param(Stub("other", refuses_system=False), id="template that accepts more"),
    ],
)
def test_every_kind_of_difference_fails(other: Stub):
    report = against(other)
    assert report.failures(LIMITS["same"])
    with pytest.raises(UserError, match="is not the model"):
        report.require(LIMITS["same"])


def test_nothing_stays_open_whatever_happens():
    mine, theirs = Stub(), Stub("other", noise=float("nan"))
    with pytest.raises(UserError, match="NaN or infinity"):
        compare(mine, theirs, rows=ROWS)
    assert not mine.is_open
    assert not theirs.is_open


def test_the_first_is_closed_before_the_second_loads():
    mine, theirs = Stub(), Stub("other")
    seen = []
    compare(mine, theirs, rows=ROWS, progress=lambda name, done, total: seen.append((name, mine.is_open)))
    assert ("other", False) in seen
    assert ("other", True) not in seen


def test_a_longer_vocabulary_is_compared_where_both_have_logits():
    rows = [[0, 1, 2, 3]]
    report = compare(Stub(vocabulary=6), Stub("other", vocabulary=5), rows=rows)
    assert report.kl_mean == 0
    assert "first 5" in report.notes[0]
    with pytest.raises(UserError, match="rows hold token 5"):
        compare(Stub(), Stub("other", vocabulary=5), rows=ROWS)


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="no row has two tokens"):
        compare(Stub(), Stub("other"), rows=[[1], []])


def test_limits_loosen_with_fewer_bits_and_know_variants():
    order = ["same", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
    found = [limits_for(kind) for kind in order]
    for tighter, looser in pairwise(found):
        assert tighter.kl_mean < looser.kl_mean
        assert tighter.top1_agreement > looser.top1_agreement
    assert limits_for("Q4_K_M") == limits_for("q4-k-s") == LIMITS["q4_k"]
    assert limits_for("IQ4_XS") == LIMITS["iq4"]
    with pytest.raises(UserError, match="q9"):
        limits_for("q9_z")


def test_a_better_perplexity_is_no_failure():
    report = replace(against(Stub("other")), perplexity_change=-0.5)
    assert report.failures(LIMITS["same"]) == []
