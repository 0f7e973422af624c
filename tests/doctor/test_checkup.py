"""A checkup shows every finding once, in the order of cost, obeys `accept`, and survives a check that crashes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.healthy import broken, healthy
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.doctor.checkup import MOST_PER_CHECK, Checkup, check
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.output import OutputFacts
from zhibei.doctor.pitfall import CATALOGUE, COSTS, Finding
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()
LEVELS = ("stop", "warning", "note")
TWO_FAULTS = ("sft.learning_rate=0.5", "sft.beta2=0.1")
REFUSAL = UserError("record 3 has no answer", expected="an answer", fix="fill it", where="rows.json, record 3")


def ids(found: Checkup) -> list[str]:
    return [one.id for one in found.findings]


def test_healthy_facts_have_no_finding_and_no_defect() -> None:
    found = check(healthy())
    assert (found.findings, found.accepted, found.defects, found.blocks) == ((), (), (), False)
    assert found.num_checks > 80


def test_findings_come_by_cost_and_then_by_level() -> None:
    facts = healthy(*TWO_FAULTS, "sft.epochs=30", "model.compile=true", "data.packing=false")
    order = [(COSTS.index(one.cost), LEVELS.index(one.finding.level)) for one in check(facts).findings]
    assert len(order) >= 4
    assert order == sorted(order)


def test_the_findings_are_plain_values() -> None:
    document = check(healthy(*TWO_FAULTS)).as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["blocks"]
    assert document["counts"]["stop"] == 1
    keys = {"id", "area", "cost", "level", "what", "where", "why", "to_do", "changes", "is_safe", "evidence"}
    assert all(one.keys() == keys for one in document["findings"])


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch) -> str:
    """A check that fails, in the place of a real one."""

    def find(facts: Facts) -> Iterable[Finding]:
        raise KeyError("no such fact")

    name = "learning-rate-too-high"
    monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], find=find))
    return name


def test_a_check_that_crashes_is_named_and_hides_nothing(crashing: str) -> None:
    found = check(healthy(*TWO_FAULTS))
    assert [defect.place for defect in found.defects] == [crashing]
    assert "KeyError: 'no such fact' (test_checkup.py:" in found.defects[0].error
    assert ids(found) == ["setting-far-from-published"]
    assert not found.blocks


def test_what_is_accepted_no_longer_stops() -> None:
    facts = healthy("sft.learning_rate=0.5", "accept=[learning-rate-too-high]")
    found = check(facts)
    assert not found.blocks
    assert ids(found) == []
    assert [one.id for one in found.accepted] == ["learning-rate-too-high"]


def test_an_unknown_name_in_accept_stops_with_the_nearest() -> None:
    (one,) = check(healthy("accept=[learning-rate-to-high]")).findings
    assert one.blocks
    assert "learning-rate-too-high" in one.finding.to_do
    assert one.finding.where == "command line"


def test_a_name_in_accept_that_silences_nothing_is_a_note() -> None:
    (one,) = check(healthy("accept=[learning-rate-too-high]")).findings
    assert one.finding.level == "note"
    facts = broken(healthy("accept=[learning-rate-too-high]"), "machine.is_described", True)
    assert check(facts).findings == ()
    assert check(replace(healthy("accept=[zero3-lora-empty-adapter]"))).findings == ()


def test_a_refusal_is_a_finding_that_cannot_be_accepted() -> None:
    facts = replace(healthy(), faults=(REFUSAL,))
    (one,) = check(facts).findings
    assert one.blocks
    assert (one.finding.what, one.finding.where, one.finding.to_do) == (REFUSAL.what, REFUSAL.where, REFUSAL.fix)


def test_one_cause_is_told_once_by_the_check_that_names_it() -> None:
    where = "sft.warmup_steps"
    refusal = UserError("never reached", expected="x", fix="y", where=where, pitfall="warmup-never-ends")
    facts = broken(replace(healthy("sft.warmup_steps=2000"), faults=(refusal, REFUSAL, REFUSAL)), "rows.num_steps", 100)
    assert ids(check(facts)) == ["warmup-never-ends", ""] or sorted(ids(check(facts))) == ["", "warmup-never-ends"]
    only_refused = check(replace(healthy(), faults=(refusal,)))
    assert ids(only_refused) == ["warmup-never-ends"]
    assert only_refused.findings[0].area == "config"


def test_a_check_that_finds_too_much_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(facts: Facts) -> Iterable[Finding]:
        return [Finding(f"row {number}", f"rows.json#{number}", "mend it") for number in range(50)]

    name = "learning-rate-too-high"
    monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], find=find))
    found = [one for one in check(healthy()).findings if one.id == name]
    assert len(found) == MOST_PER_CHECK + 1
    assert "42 more" in found[-1].finding.what


def test_an_area_alone() -> None:
    facts = healthy(*TWO_FAULTS, output=OutputFacts(Path("runs/x"), Path("."), is_writable=False))
    found = check(facts, area="lora")
    assert found.findings == ()
    assert found.num_checks < check(facts).num_checks


def test_as_an_error_one_refusal_is_itself_and_several_are_together() -> None:
    assert check(replace(healthy(), faults=(REFUSAL,))).as_error() is REFUSAL
    error = check(replace(healthy("sft.learning_rate=0.5"), faults=(REFUSAL,))).as_error()
    assert isinstance(error, SeveralErrors)
    assert {one.pitfall for one in error.errors} == {"", "learning-rate-too-high"}
    assert error.exit_code == 2
