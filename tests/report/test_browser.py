"""The page in a real browser, where one is installed: our script runs under its own policy, no other does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.fake_run import EVIL, fake_run
from zhibei.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def dom_after_scripts(path: Path, *, fragment: str = "") -> str:
    """The document as the browser has it once scripts have run."""
    browser = next((found for found in map(shutil.which, BROWSERS) if found), None)
    if browser is None:
        pytest.skip("no Chromium here")
    profile = f"--user-data-dir={path.parent / 'profile'}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", profile]
    command = [browser, *options, "--dump-dom", f"{path.as_uri()}{fragment}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        pytest.skip(f"Chromium does not start here: {error}")


def test_our_script_runs_and_an_injected_one_does_not(tmp_path: Path) -> None:
    path = write_report(fake_run(tmp_path / "run", num_steps=100))
    assert '<html lang="zh-Hans">' in dom_after_scripts(path, fragment="#zh")
    evil = "<script>document.documentElement.lang = 'evil'</script>"
    injected = tmp_path / "injected.html"
    injected.write_text(path.read_text("utf-8").replace("</main>", f"{evil}</main>"), encoding="utf-8")
    assert 'lang="evil"' not in dom_after_scripts(injected)
    unguarded = tmp_path / "unguarded.html"
    unguarded.write_text(injected.read_text("utf-8").replace("Content-Security-Policy", "nothing"), encoding="utf-8")
    assert 'lang="evil"' in dom_after_scripts(unguarded)


def test_hostile_rows_become_no_elements(tmp_path: Path) -> None:
    dom = dom_after_scripts(write_report(fake_run(tmp_path / "run", num_steps=100)))
    assert "<img" not in dom
    assert dom.count("<script") == 1
    assert "&lt;script&gt;alert" in dom
    assert EVIL not in dom
