"""The comparison page: the best figure is marked, settings that differ are listed, foreign files are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.fake_run import fake_run
from tests.report.test_page import read
from zhibei.config.errors import UserError
from zhibei.report.compare import settings_of, write_comparison
from zhibei.report.inputs import read_inputs
from zhibei.report.training import key_figures


def test_two_runs_on_one_page(tmp_path: Path) -> None:
    first, second = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", num_steps=200, seed=1)
    second.resolved.write_text(second.resolved.read_text().replace("2e-05  # planned", "1e-4  # command line"))
    page = write_comparison([first, second], tmp_path / "out" / "compare.html").read_text("utf-8")
    read(page)
    best = min(key_figures(read_inputs(run))["best_heldout_loss"] for run in (first, second))
    assert f'<b class="good-text">{best:.4f}</b>' in page
    assert '<span class="code">sft.learning_rate</span></td><td><span class="code text">2e-05</span>' in page
    assert '<span class="code text">1e-4</span>' in page
    assert '<span class="code">seed</span>' not in page


def test_settings_are_read_as_written() -> None:
    text = '# head\nname: a  # a.yaml:1\n\nmodel:\n  path: "a  # b"  # default\n  # idle: no effect; why\n'
    assert settings_of(text) == {"name": "a", "model.path": '"a  # b"'}


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, num_steps=100) for name in "ab"]
    path = tmp_path / "mine.html"
    path.write_text("my own page")
    with pytest.raises(UserError):
        write_comparison(runs, path)
    assert path.read_text() == "my own page"
    ours = write_comparison(runs, tmp_path / "ours.html")
    assert write_comparison(runs, ours) == ours


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_number_of_runs_is_bounded(count: int, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_comparison([fake_run(tmp_path / "a", num_steps=100)] * count, tmp_path / "page.html")
