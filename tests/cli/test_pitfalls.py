"""`zhibei pitfalls` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from zhibei.cli.app import run_command
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import AREAS, load_catalogue

Capture = pytest.CaptureFixture[str]
ONE = "lora-target-typo-ignored"


def test_the_list_has_every_pitfall_by_area(capsys: Capture) -> None:
    assert run_command(["pitfalls", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in document["pitfalls"]] == list(load_catalogue())
    assert sum(document["kinds"].values()) == len(CATALOGUE)
    assert run_command(["pitfalls", "--area", "lora"]) == 0
    out = capsys.readouterr().out
    assert ONE in out
    assert "learning-rate-too-high" not in out


def test_a_page_in_either_language(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    page = load_catalogue()[ONE]
    for arguments, variables, title in (
        ([], {"LANG": "en_US.UTF-8"}, page.english.title),
        ([], {"LANG": "zh_CN.UTF-8"}, page.chinese.title),
        (["--lang", "zh"], {"LANG": "C"}, page.chinese.title),
        ([], {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, page.english.title),
    ):
        for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert run_command(["pitfalls", ONE, *arguments]) == 0
        out = capsys.readouterr().out
        assert title in out
        assert "https://github.com/huggingface/peft/issues/1959" in out


def test_unknown_names_lead_to_the_nearest(capsys: Capture) -> None:
    assert run_command(["pitfalls", "lora-target-tipo-ignored"]) == 2
    assert ONE in capsys.readouterr().err
    assert run_command(["pitfalls", "--area", "lorra", "--json"]) == 2
    assert "lora" in json.loads(capsys.readouterr().out)["error"]["fix"]


def test_areas_can_all_be_asked_for(capsys: Capture) -> None:
    for area in AREAS:
        assert run_command(["pitfalls", "--area", area, "--json"]) == 0
        assert {one["area"] for one in json.loads(capsys.readouterr().out)["pitfalls"]} <= {area}


def test_neither_command_needs_torch_to_be_described() -> None:
    code = (
        "import sys; from zhibei.cli.app import run_command; run_command(['pitfalls', '--json']);"
        "import zhibei.cli.check, zhibei.doctor.checkup, zhibei.doctor.facts.gather;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
