"""What was made of a run stands on its page, the newest of each place, and markup in it stays text."""

from __future__ import annotations

from pathlib import Path

from zhibei.report.inputs import read_inputs
from zhibei.report.page import sections_of, write_report
from zhibei.store.ledger import write_ledger
from zhibei.store.run_dir import RunDir

PARITY = {
    "kl_mean": 0.00012, "kl_max": 0.5, "top1_agreement": 0.991, "perplexity_change": 0.0034, "num_tokens": 2033,
    "rows_from": "held-out rows of the run", "tokenizer": {"num_equal": 18, "num_asked": 18},
    "template": {"num_equal": 8, "num_asked": 8},
    "reference": {"bytes_on_disk": 2048}, "other": {"bytes_on_disk": 1024},
    "limits": {"kl_mean": 0.005, "top1_agreement": 0.97, "perplexity_change": 0.01},
}  # fmt: skip


def test_the_page_shows_the_newest_of_each_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert "handed_over" not in sections_of(read_inputs(run))
    older = {**PARITY, "kl_mean": 0.9}
    entries = [("merge", "/a/merged", older), ("merge", "/a/merged", PARITY), ("meta", "/a/<b>meta", None)]
    write_ledger(run.handed_over, [{"what": what, "path": path, "parity": parity} for what, path, parity in entries])
    assert list(sections_of(read_inputs(run))).count("handed_over") == 1
    text = write_report(run).read_text()
    for shown in ("0.00012", "99.100%", "0.340%", "2.0 KiB → 1.0 KiB", "18 / 18", "held-out rows of the run"):
        assert shown in text
    assert ">0.9<" not in text
    assert "<b>meta" not in text
    assert "&lt;b&gt;meta" in text
