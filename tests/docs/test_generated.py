"""The generated documentation is what the code says today, and the check for that bites."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.shared_data import REPOSITORY
from zhibei.cli.app import COMMANDS
from zhibei.config.effects import STAGES
from zhibei.config.read import recipe_names
from zhibei.config.run import AnsweringSection, TrainingSection
from zhibei.config.words import leaf_fields
from zhibei.doctor.pitfalls import load_catalogue


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPOSITORY / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_current(generate: ModuleType) -> None:
    assert generate.stale() == [], "run: python docs/generate.py"


def test_a_changed_document_is_found(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, changed = REPOSITORY / "LICENSE", REPOSITORY / "CHANGELOG.md"
    texts = {healthy: healthy.read_text(), changed: changed.read_text() + "more"}
    monkeypatch.setattr(generate, "documents", lambda: texts)
    monkeypatch.setattr(generate, "PITFALL_PAGES", REPOSITORY / "docs" / "no such folder")
    assert generate.stale() == [changed]


def test_a_page_of_a_pitfall_that_is_no_more_is_found(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generate, "PITFALL_PAGES", tmp_path)
    monkeypatch.setattr(generate, "documents", lambda: {tmp_path / "kept.md": "x"})
    for name in ("kept.md", "gone.md"):
        (tmp_path / name).write_text("x")
    assert generate.stale() == [tmp_path / "gone.md"]


def test_every_pitfall_has_its_page_and_its_two_lines_in_the_index(generate: ModuleType) -> None:
    pages, index = generate.pitfall_pages(), generate.pitfall_index()
    catalogue = load_catalogue()
    assert {path.stem for path in pages} == {*catalogue, "README"}
    assert all(index.count(f"]({name}.md)") == 2 for name in catalogue)
    assert all(one.chinese.title in index and one.english.title in index for one in catalogue.values())


def _as_any_stage(key: str) -> str:
    section, _, name = key.partition(".")
    is_shared = name in TrainingSection.model_fields or name in AnsweringSection.model_fields
    return f"STAGE.{name}" if section in STAGES and is_shared else key


def _cells(page: str) -> set[str]:
    return set(re.findall(r"\| `[^`]+` \|", page))


def test_run_file_page_has_every_field_and_recipes_page_every_recipe(generate: ModuleType) -> None:
    page = generate.run_file_page()
    # What every stage takes is told once, under STAGE.
    missing = [key for key, _ in leaf_fields() if not {f"| `{key}` |", f"| `{_as_any_stage(key)}` |"} & _cells(page)]
    assert missing == []
    assert all(f"## {name}\n" in generate.recipes_page() for name in recipe_names())


def test_the_file_map_has_every_file(generate: ModuleType) -> None:
    lines = generate.file_map().splitlines()
    there = [path for path in (REPOSITORY / "zhibei").glob("*/*.py") if path.name != "__init__.py"]
    assert all(any(line.split()[:1] == [path.name] for line in lines) for path in there)
    assert [line for line in lines if len(line.split()) < 2 and line != "```"] == []


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readme_has_the_two_commands_and_every_verb(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    assert re.findall(r"^make \w+", text, re.MULTILINE) == ["make demo", "make test"]
    assert all(f"`zhibei {verb}`" in text for verb in COMMANDS)


def test_files_the_tour_names_exist() -> None:
    text = (REPOSITORY / "docs" / "tour.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|md))`", text)
    assert len(named) >= 15
    roots = (REPOSITORY, REPOSITORY / "zhibei")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "CHANGELOG.md"])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REPOSITORY / name).read_text())
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_licence_is_the_apache_text() -> None:
    text = Path(REPOSITORY / "LICENSE").read_text()
    assert text.split("\n")[1].strip() == "Apache License"
    assert "Version 2.0, January 2004" in text
