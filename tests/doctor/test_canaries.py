"""Every check trips on what is broken and is silent on what is sound; no check is without both."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest

from tests.doctor import canaries
from tests.doctor.canaries import Canaries
from tests.doctor.healthy import healthy
from zhibei.doctor.pitfall import CATALOGUE, Finding
from zhibei.doctor.pitfalls import AREAS, load_catalogue

load_catalogue()
CHECKS = [name for name, entry in CATALOGUE.items() if entry.find is not None]


def canaries_of(area: str) -> Canaries:
    """What the files of an area state together."""
    found: Canaries = {}
    for name in sorted(module.name for module in iter_modules(canaries.__path__)):
        if name == f"test_{area}" or name.startswith(f"test_{area}_"):
            stated: Canaries = import_module(f"tests.doctor.canaries.{name}").CANARIES
            assert not stated.keys() & found.keys(), f"{area}: two files state the same canaries"
            found |= stated
    return found


CANARIES = {name: case for area in AREAS for name, case in canaries_of(area).items()}
BROKEN = [(name, number) for name, (broken, _) in CANARIES.items() for number in range(len(broken))]
SOUND = [(name, number) for name, (_, sound) in CANARIES.items() for number in range(len(sound))]


def found_by(name: str, number: int, *, side: int) -> list[Finding]:
    find = CATALOGUE[name].find
    assert find is not None, f"{name} is no check"
    return list(find(CANARIES[name][side][number]))


@pytest.mark.parametrize("area", AREAS)
def test_every_check_has_canaries_and_every_canary_a_check(area: str) -> None:
    checks = {name for name in CHECKS if CATALOGUE[name].area == area}
    stated = canaries_of(area)
    assert checks == stated.keys()
    assert [name for name, (broken, sound) in stated.items() if not broken or not sound] == []


@pytest.mark.parametrize(("name", "number"), BROKEN)
def test_what_is_broken_trips_its_check(name: str, number: int) -> None:
    findings = found_by(name, number, side=0)
    assert findings, f"{name}: broken case {number} trips nothing"
    assert [one for one in findings if not (one.what.strip() and one.where.strip() and one.to_do.strip())] == []


@pytest.mark.parametrize(("name", "number"), SOUND)
def test_what_is_sound_does_not(name: str, number: int) -> None:
    assert found_by(name, number, side=1) == []


@pytest.mark.parametrize("name", CHECKS)
def test_healthy_facts_trip_no_check(name: str) -> None:
    find = CATALOGUE[name].find
    assert find is not None
    assert list(find(healthy())) == []
