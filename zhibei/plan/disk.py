"""What a run writes to disk over its life, file by file, and the most that lies there at one time. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job, Rows

GIB = 2**30
BYTES_PER_TOKEN = 5  # data/prepared_cache.py: int32 ids and one flag
BYTES_PER_STEP = 700  # one record in metrics.jsonl, and its TensorBoard events
SMALL_FILES = 20 * 2**20  # tokenizer, manifest, report page, samples


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes by file. `peak_bytes`: while a checkpoint is written beside the kept ones, or the model at the end."""

    checkpoint_bytes: float
    num_checkpoints: int
    """At most so many lie there at once: the newest ones, the best one, and the one being written."""
    model_bytes: float
    cache_bytes: float
    log_bytes: float
    files: Mapping[str, float] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> float:
        writing = self.num_checkpoints * self.checkpoint_bytes
        finishing = (self.num_checkpoints - 1) * self.checkpoint_bytes + self.model_bytes
        return max(writing, finishing) + self.cache_bytes + self.log_bytes

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB


def disk_of(
    job: Job, held: Holdings, rows: Rows, *, num_steps: int, keep_checkpoints: int, keep_best: bool
) -> DiskPlan:
    """Checkpoints with weights that learn and optimiser states (train/resume.py), the finished model, logs, cache."""
    learned = held.adapters if job.trains_adapters else held.weights
    checkpoint = learned + held.masters + held.states
    tokens = (rows.num_rows or 0) * rows.mean_tokens
    model = held.adapters if job.trains_adapters else held.weights
    cache, logs = tokens * BYTES_PER_TOKEN, num_steps * BYTES_PER_STEP + SMALL_FILES
    number = keep_checkpoints + keep_best + 1
    files = {
        "one checkpoint": checkpoint,
        "all checkpoints at most": number * checkpoint,
        "finished model": model,
        "prepared rows (cache)": cache,
        "logs and small files": logs,
    }
    return DiskPlan(checkpoint, number, model, cache, logs, files)
