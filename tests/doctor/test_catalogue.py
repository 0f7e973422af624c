"""The catalogue is complete, its pages are whole in both languages, and what it names as proof exists."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.shared_data import REPOSITORY, shared_path
from zhibei.doctor.page import as_markdown, as_text, cover_of, page_of
from zhibei.doctor.pitfall import CATALOGUE, COSTS, Pitfall, pages_of
from zhibei.doctor.pitfalls import AREAS, load_catalogue
from zhibei.doctor.watchdogs import WATCHDOGS

load_catalogue()
KNOWN = Path(__file__).with_name("known_pitfalls.txt")
ENTRIES = [pytest.param(entry, id=name) for name, entry in CATALOGUE.items()]
CHINESE = re.compile("[\u4e00-\u9fff]")


def known_ids() -> dict[str, list[str]]:
    """Ids by area, as the file beside this one lists them."""
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {area: names.split() for area, _, names in (line.partition(":") for line in lines)}


def test_every_known_pit_is_in_the_catalogue_under_its_area() -> None:
    wanted = {(area, name) for area, names in known_ids().items() for name in names}
    assert wanted - {(entry.area, name) for name, entry in CATALOGUE.items()} == set()
    assert len(wanted) == 217


def test_the_list_of_known_pits_is_that_of_the_shared_file() -> None:
    file = shared_path("pitfalls.jsonl")
    listed = Counter(name for names in known_ids().values() for name in names)
    assert listed == Counter(json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines())


def test_every_area_has_pitfalls_and_every_pitfall_an_area() -> None:
    assert {entry.area for entry in CATALOGUE.values()} == set(AREAS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_pages_are_whole_in_both_languages(entry: Pitfall) -> None:
    english, chinese = page_of(entry, "en"), page_of(entry, "zh")
    for page, ends, least in ((english, ".!?)", 40), (chinese, "。！？）”", 12)):
        assert page.title.strip()[-1] in ends, page.title
        assert len(page.why) >= least, page.why
        assert len(page.fix) >= 4, page.fix
    assert not CHINESE.search(english.title + english.fix)
    assert all(CHINESE.search(text) for text in (chinese.title, chinese.why, chinese.fix))
    assert len(english.title) <= 140
    assert entry.cost in COSTS


@pytest.mark.parametrize("entry", ENTRIES)
def test_how_it_is_covered_is_said_as_its_kind_demands(entry: Pitfall) -> None:
    assert (entry.find is not None) == (entry.kind == "check")
    assert bool(entry.proof) or entry.kind not in ("gate", "construction")
    assert bool(entry.because) or entry.kind not in ("construction", "explained")
    assert bool(entry.by) == (entry.kind in ("rehearsal", "watchdog"))
    assert "{" not in cover_of(entry)


def test_rehearsals_and_watchdogs_name_what_exists() -> None:
    from zhibei.doctor.rehearsal import STEPS

    named = {kind: {one.by for one in CATALOGUE.values() if one.kind == kind} for kind in ("rehearsal", "watchdog")}
    assert named["rehearsal"] <= set(STEPS)
    assert named["watchdog"] <= set(WATCHDOGS)


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the test functions of a file, without importing it."""
    path = REPOSITORY / file
    if not path.is_file():
        return frozenset()
    found = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    return frozenset(node.name for node in found if node.name.startswith("test_"))


@pytest.mark.parametrize("entry", [one for one in ENTRIES if one.values[0].proof])  # type: ignore[union-attr]
def test_proofs_are_tests_that_exist(entry: Pitfall) -> None:
    for proof in entry.proof:
        file, _, name = proof.partition("::")
        assert name.partition("[")[0] in functions_of(file), proof


def test_the_check_of_proofs_bites() -> None:
    assert "test_no_such_test" not in functions_of("tests/doctor/test_catalogue.py")
    assert functions_of("tests/doctor/no_such_file.py") == frozenset()


@pytest.mark.parametrize("entry", ENTRIES)
def test_both_forms_of_a_page_hold_all_of_it(entry: Pitfall) -> None:
    for language in ("en", "zh"):
        page = page_of(entry, language)
        text = as_text(entry, language)
        assert all(part in text for part in (entry.id, page.title, page.why, page.fix))
        assert all(part in as_markdown(entry) for part in (page.title, page.why, page.fix))


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("Title.\n\nWhy: a\n\nFix: b", "为何"),
        ("Title.\n\nFix: b\n\n题。\n\n为何：a\n\n办法：b", "Why"),
        ("Title.\n\nFix: b\n\nWhy: a\n\n题。\n\n为何：a\n\n办法：b", "order"),
    ],
)
def test_an_incomplete_page_is_refused(text: str, lacks: str) -> None:
    with pytest.raises(ValueError, match=lacks):
        pages_of(text, "a-pitfall")


def test_a_line_break_in_chinese_leaves_no_space() -> None:
    _, chinese = pages_of("T.\n\nWhy: a\n\nFix: b\n\n题。\n\n为何：甲\n乙 bf16 丙\n丁\n\n办法：戊", "a-pitfall")
    assert chinese.why == "甲乙 bf16 丙丁"


def test_most_of_the_known_pits_are_found_or_impossible() -> None:
    known = {name for names in known_ids().values() for name in names}
    kinds = Counter(CATALOGUE[name].kind for name in known if name in CATALOGUE)
    assert sum(kinds.values()) == len(known)
    assert kinds["explained"] <= 0.25 * len(known), kinds
