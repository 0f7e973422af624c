"""The audit section: every figure is shown, the mask preview marks exactly what is learned, low shares stand out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.fake_run import AUDIT, EVIL
from tests.report.test_page import read
from zhibei.data.audit import audit_rows
from zhibei.report.audit import LABELS, NESTED, PICTURED, audit
from zhibei.report.bars import bar_svg
from zhibei.report.html import Markup, escape
from zhibei.report.inputs import read_inputs
from zhibei.store.run_dir import RunDir


def section(tmp_path: Path, found: Any) -> Markup:
    run_dir = RunDir(tmp_path)
    run_dir.audit.write_text(json.dumps(found))
    body = audit(read_inputs(run_dir)).body
    read(body)
    return body


def test_every_figure_of_the_audit_is_on_the_page(tmp_path: Path) -> None:
    body = section(tmp_path, AUDIT)
    for text in ("18,857", "2,431,902", "913,337", "37.56%", "100.00%", "min 1, max 1", "llama-2-7b", "equal", "1,019"):
        assert text in body
    assert "future_figure" in body
    assert escape(f"a notice about {EVIL}") in body


def test_the_names_the_audit_uses_are_known_here() -> None:
    source = Path(audit_rows.__code__.co_filename).read_text("utf-8")
    inside = source[source.index("    audit = {") : source.index('    audit["notices"]')]
    written = set(re.findall(r'^        "(\w+)":', inside, flags=re.MULTILINE)) | {"notices"}
    assert written - {*LABELS, *NESTED, *PICTURED} == set()


def test_marked_text_is_exactly_what_is_learned(tmp_path: Path) -> None:
    pieces = [["<s>Hi <b>", False], ["you</s>", True], ["<s>more", False]]
    body = section(tmp_path, {"previews": [{"row": "a#1", "tokens": 9, "tokens_supervised": 2, "pieces": pieces}]})
    assert re.findall("<mark>(.*?)</mark>", body) == ["you&lt;/s&gt;"]
    assert "&lt;s&gt;Hi &lt;b&gt;<mark>" in body


def test_terminators_that_are_not_learned_stand_out(tmp_path: Path) -> None:
    assert "bad-text" in section(tmp_path, {"terminators_supervised_share": 0.5})
    assert "bad-text" not in section(tmp_path, {"terminators_supervised_share": 1.0})


def test_bars_are_as_high_as_their_counts() -> None:
    drawn = bar_svg([(0, 16, 10), (16, 32, 40), (32, 64, 0)], unit_en="tokens", unit_zh="tokens")
    heights = [float(height) for height in re.findall(r'class="bar".*? height="([0-9.]+)"', drawn)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.3)
    assert heights[2] == 0
    assert re.findall("<title>(.*?)</title>", drawn) == ["0 – 15: 10", "16 – 31: 40", "32 – 63: 0"]


@pytest.mark.parametrize(
    "found",
    [
        {"lengths": {"mean": 0.0, "percentiles": {}, "histogram": []}},
        {"lengths": [1, 2]},
        {"lengths": {"histogram": [{"from": "a"}, 3]}},
        {"previews": [{"pieces": [["a"], 3, ["a", "b"]]}, 3], "longest_rows": 4, "sources": [1], "notices": "text"},
        {"dropped": [], "tokens": None, "supervised_share": "all"},
    ],
)
def test_an_audit_of_another_shape_never_stops_the_page(found: Any, tmp_path: Path) -> None:
    section(tmp_path, found)


def test_percentiles_are_shown_as_recorded(tmp_path: Path) -> None:
    percentiles = {"0": 3, "50": int(np.median([3, 17, 29])), "100": 29}
    body = section(tmp_path, {"lengths": {"mean": 16.3, "percentiles": percentiles, "histogram": []}})
    assert re.findall('<td class="number">(.*?)</td>', body) == ["3", "17", "29", "16.3"]
