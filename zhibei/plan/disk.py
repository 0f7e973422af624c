"""What a run writes to disk over its life, file by file, and the most that lies there at one time. Knows no paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zhibei.config.hand_over import GGUF_BITS, parts_of
from zhibei.config.run import RunFile
from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job, Rows

GIB = 2**30
BYTES_PER_TOKEN = 5  # data/prepared_cache.py: int32 ids and one flag
BYTES_PER_STEP = 700  # one record in metrics.jsonl, and its TensorBoard events
ITEM_BYTES_OF_BASES = 2  # a base below adapters is held in 16 bits on the disk, and so is what is merged of it
SMALL_FILES = 20 * 2**20  # tokenizer, manifest, report page, samples


@dataclass(frozen=True, slots=True)
class Saves:
    """How many checkpoints lie there: `most` while the newest is written, `last` at the end, beside the model."""

    most: int
    last: int


def saves_of(run: RunFile, num_steps: int | None) -> Saves:
    """The newest ones, the best one besides, and the one being written; no more than the run ever saves.

    A new checkpoint is complete before the oldest goes. `num_steps`: None where the length of the run is not known.
    """
    section = run.training
    has_best = section.keep_best and run.data.validation != 0
    kept = section.keep_checkpoints + has_best
    intervals = [section.save_every, *([section.evaluate_every] if has_best else [])]
    if not num_steps or None in intervals:
        return Saves(kept + 1, kept)
    # At its interval (0: at the end only), and after each evaluation that may be the best.
    saved = sum(-(-num_steps // every) if every else 1 for every in intervals)
    return Saves(min(kept + 1, saved), min(kept, saved))


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes by file. `peak_bytes`: while a checkpoint is written beside the kept ones, or at the end the model and
    what is made of it."""

    checkpoint_bytes: float
    saves: Saves
    model_bytes: float
    cache_bytes: float
    log_bytes: float
    handed_over_bytes: float = 0.0
    """All forms of hand_over, and the largest temporary copy beside them."""
    files: Mapping[str, float] = field(default_factory=dict)

    @property
    def checkpoints_bytes(self) -> float:
        """All checkpoints, while the newest is written."""
        return self.saves.most * self.checkpoint_bytes

    @property
    def finishing_bytes(self) -> float:
        """The checkpoints that are left at the end, and the finished model."""
        return self.saves.last * self.checkpoint_bytes + self.model_bytes

    @property
    def written_bytes(self) -> float:
        """The most that checkpoints, model and its other forms take at one time, in the run directory."""
        return max(self.checkpoints_bytes, self.finishing_bytes + self.handed_over_bytes)

    @property
    def peak_bytes(self) -> float:
        return self.written_bytes + self.cache_bytes + self.log_bytes

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB


def bytes_of_forms(forms: Sequence[str], *, num_parameters: int, item_bytes: int, is_merged: bool) -> float:
    """What hand_over leaves on the disk, with the largest temporary copy: Meta's files and weight differences of
    adapters (`is_merged`) are made from a merged model that is gone afterwards."""
    whole = float(num_parameters * item_bytes)
    kept = [num_parameters * GGUF_BITS[of] / 8 if kind == "gguf" else whole for kind, of in map(parts_of, forms)]
    needs_copy = is_merged and any(parts_of(form)[0] in ("meta", "delta") for form in forms)
    return sum(kept) + (whole if needs_copy else 0.0)


def disk_of(
    run: RunFile, job: Job, held: Holdings, rows: Rows, *, num_steps: int | None, num_parameters: int
) -> DiskPlan:
    """Checkpoints with weights that learn and optimiser states (train/resume.py), the finished model and its other
    forms, logs, cache.

    `num_steps`: None where the length of the run is not known. `num_parameters`: of the whole model.
    """
    learned = held.adapters if job.trains_adapters else held.weights
    checkpoint = learned + held.masters + held.states
    tokens = (rows.num_rows or 0) * rows.mean_tokens
    cache, logs = tokens * BYTES_PER_TOKEN, (num_steps or 1) * BYTES_PER_STEP + SMALL_FILES
    saves = saves_of(run, num_steps)
    forms = bytes_of_forms(
        run.hand_over,
        num_parameters=num_parameters,
        item_bytes=ITEM_BYTES_OF_BASES if job.trains_adapters else job.item_bytes,
        is_merged=job.trains_adapters,
    )
    files = {
        "one checkpoint": checkpoint,
        "all checkpoints at most": saves.most * checkpoint,
        "finished model": learned,
        **({"what is made of it (hand_over)": forms} if forms else {}),
        "prepared rows (cache)": cache,
        "logs and small files": logs,
    }
    return DiskPlan(checkpoint, saves, learned, cache, logs, forms, files)
