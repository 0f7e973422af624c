"""The page of a run that learned from a reward: its reward and health board instead of losses."""

from __future__ import annotations

import json
from pathlib import Path

from zhibei.report.page import write_report
from zhibei.store.run_dir import RunDir


def test_the_page_shows_the_board(tmp_path: Path) -> None:
    records = [{"kind": "event", "step": 0, "event": "started", "text": "", "total_steps": 3, "time": 1.0}]
    for step in range(4):
        records.append({"kind": "evaluation", "step": step, "reward_mean": 0.1 * step, "time": 2.0})
    for step in range(1, 4):
        board = {"kl": 0.1 * step, "length_correlation": None, "entropy": 2.0, "answers": 16, "tokens": 90}
        records.append({"kind": "iteration", "step": step, "reward_mean": 0.25 * step, "time": 2.0, **board})
    records.append({"kind": "event", "step": 3, "event": "rolled back", "text": "to step 1", "time": 3.0})
    records.append({"kind": "event", "step": 3, "event": "finished", "text": "", "model_step": 2, "time": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(RunDir(tmp_path)).read_text(encoding="utf-8")
    for wanted in ("Reward and health board", "KL to the reference (k1)", "Entropy", "0.750", "0.250", "270 tokens"):
        assert wanted in text, wanted
    assert "rolled back at 3" in text
    assert "No step was recorded" not in text
    assert "Reward against length" not in text
    assert ">iteration</text>" in text
    assert "optimiser step</text>" not in text
    assert "step 2, which was written" in text  # its held-out reward, beside that of the last iteration
