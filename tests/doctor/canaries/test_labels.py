"""Canaries of labels: what the audit of all rows says."""

from __future__ import annotations

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfalls.labels import cutoff_drops_eos, max_length_drop_not_counted

FINE = healthy()
CUT = ("data.too_long=cut",)


def audited(*overrides: str, **counts: object) -> Facts:
    facts = healthy(*overrides)
    assert facts.rows is not None
    return broken(facts, "rows.audit", {**facts.rows.audit, **counts})


def rewriting(*overrides: str, **counts: object) -> Facts:
    return broken(audited(*overrides, **counts), "template.rewrites_earlier_turns", True)


CANARIES: Canaries = {
    "cutoff-drops-eos": (
        [
            audited(*CUT, rows_cut=15600, terminators_supervised=36400),
            audited(*CUT, rows_cut=4000, terminators_supervised=48000),
        ],
        [
            FINE,
            audited(*CUT, rows_cut=90, terminators_supervised=51910),
            # Long conversations: half of the answers are cut away whole, and few rows break off inside of one.
            audited(*CUT, rows_cut=2000, answers=400_000, terminators=400_000, terminators_supervised=200_000),
        ],
    ),
    "max-length-drop-not-counted": (
        [
            audited(dropped={"too_long": 31000}, rows_kept=21000),
            audited(dropped={"too_long": 2000, "broken": 3}, rows_kept=49997),
        ],
        [FINE, audited(dropped={"too_long": 300}, rows_kept=51700), audited(dropped={"broken": 9000})],
    ),
    "truncation-removes-all-targets": (
        [audited(rows_without_supervision=900), audited(rows_without_supervision=1)],
        [FINE],
    ),
    "mask-by-prefix-length-on-non-prefix-template": (
        [rewriting(answers=180_000), rewriting("data.supervise=turns", answers=180_000)],
        [
            FINE,
            audited(answers=180_000),
            rewriting(),
            rewriting("data.supervise=last_answer", answers=180_000),
        ],
    ),
    "supervised-share-implausible": (
        [audited(supervised_share=0.001), audited(supervised_share=0.995)],
        [
            FINE,
            audited(supervised_share=0.02),
            audited(supervised_share=0.9),
            audited("data.supervise=everything", supervised_share=0.999),
            audited(supervised_share=1.0, answers=0, terminators=0, terminators_supervised=0),
        ],
    ),
}


def test_a_large_share_stops_and_a_small_one_warns() -> None:
    cut, dropped = CANARIES["cutoff-drops-eos"][0], CANARIES["max-length-drop-not-counted"][0]
    levels = [[one.level for one in cutoff_drops_eos(facts)] for facts in cut]
    levels += [[one.level for one in max_length_drop_not_counted(facts)] for facts in dropped]
    assert levels == [["stop"], ["warning"], ["stop"], ["warning"]]
