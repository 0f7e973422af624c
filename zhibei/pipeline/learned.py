"""What reward model and policy of a quickstart learned, read from their runs. Knows records, trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zhibei.losses.intervals import wilson
from zhibei.store.manifest import read_manifest, recorded
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir


def reward_of(run: RunDir) -> dict[str, Any]:
    """Accuracy on held-out pairs with its interval, and by where the worse answer comes from."""
    manifest = read_manifest(run.path)
    heldout = recorded(manifest, "finished.heldout") or {}
    by_origin: dict[str, list[int]] = {}
    for source, found in heldout.get("by_source", {}).items():
        counts = by_origin.setdefault(Path(source).stem.rpartition("-")[2], [0, 0])
        counts[0] += int(found["right"])
        counts[1] += int(found["total"])
    return {
        "pairs": heldout.get("pairs"),
        "accuracy": heldout.get("accuracy"),
        "low": heldout.get("accuracy_low"),
        "high": heldout.get("accuracy_high"),
        "by_origin": {
            origin: {"pairs": total, "accuracy": share.score, "low": share.low, "high": share.high}
            for origin, (right, total) in sorted(by_origin.items())
            for share in [wilson(right, total)]
        },
    }


def course_of(run: RunDir, true_scores: Mapping[int, float]) -> list[dict[str, Any]]:
    """Learned reward, KL and the true score at the beginning, at every evaluation and at the end of PPO."""
    records = read_metrics(run.metrics)
    kl = {int(record["step"]): record.get("kl") for record in records if record["kind"] == "iteration"}
    reward = {int(record["step"]): record["reward_mean"] for record in records if record["kind"] == "evaluation"}
    return [
        {"step": step, "learned_reward": reward[step], "kl": kl.get(step, 0.0), "true_score": true_scores.get(step)}
        for step in sorted(reward)
    ]
