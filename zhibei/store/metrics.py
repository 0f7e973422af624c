"""The figures of a run: metrics.jsonl always, TensorBoard and Weights & Biases beside it. Knows no training.

One JSON object per line with `kind`, `step`, `time`. JSON has no NaN or infinity: such a value is written as null, and
the record gets `not_finite: {"loss": "nan"}` (also "inf", "-inf"), which `read_metrics` turns back into floats.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from zhibei.config.errors import UserError
from zhibei.store.files import disk_error, write_text_atomic
from zhibei.store.run_dir import RunDir


class Mirror(Protocol):
    """Another place that gets the numbers of each record."""

    def write(self, scalars: Mapping[str, float], *, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes TensorBoard events; steps after the resumed one are hidden, so that curves do not fork."""

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # late: an optional dependency

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends records to Weights & Biases, or keeps them locally with WANDB_MODE=offline."""

    def __init__(self, folder: Path, *, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # late: an optional dependency  # pyright: ignore[reportMissingImports]
        except ImportError as problem:
            raise UserError(
                f"log.wandb is {project!r}, but wandb is not installed",
                expected="the wandb package",
                fix='pip install "zhibei[wandb]", or log.wandb: null',
                where="run file, log.wandb",
            ) from problem
        id_file = folder / "wandb_id.txt"
        run_id = id_file.read_text("utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project, name=run_name, config=dict(config), dir=str(folder), id=run_id, resume="allow"
        )
        write_text_atomic(id_file, str(self._run.id) + "\n")

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        # `step=` of wandb refuses to go backwards; as an ordinary value it also survives a resume from an older step.
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """Appends the records of a run to metrics.jsonl, each on disk for other readers at once, and mirrors the numbers.

    `notes` says what a person should know, such as that TensorBoard is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        resume_at_step: int | None = None,
    ) -> None:
        """`resume_at_step=N`: records after step N are moved out of metrics.jsonl, because those steps run again."""
        self.notes: list[str] = []
        self._path = RunDir(run_dir).metrics
        run_dir.mkdir(parents=True, exist_ok=True)
        if resume_at_step is not None:
            self.notes += rewind_metrics(self._path, step=resume_at_step)
        self._mirrors: list[Mirror] = []
        if wandb:
            self._mirrors.append(WeightsAndBiases(run_dir, project=wandb, run_name=run_name, config=config or {}))
        if tensorboard:
            purge_step = None if resume_at_step is None else resume_at_step + 1
            try:
                self._mirrors.append(TensorBoard(RunDir(run_dir).tensorboard, purge_step=purge_step))
            except ImportError:
                self.notes.append(
                    'TensorBoard is not installed; only metrics.jsonl is written (pip install "zhibei[track]")'
                )
        self._file = open(self._path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 see close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record with `kind` and `step`; `time` (seconds since 1970) is added when absent."""
        stamped = {"kind": record["kind"], "step": record["step"], "time": time.time(), **record}
        try:
            self._file.write(as_line(stamped))
            self._file.flush()
        except OSError as problem:
            raise disk_error(problem, purpose="metrics.jsonl", where=self._path) from problem
        scalars = {
            f"{record['kind']}/{name}": float(value)
            for name, value in record.items()
            if name not in ("kind", "step", "time") and isinstance(value, (int, float))
        }
        if scalars:
            for mirror in self._mirrors:
                mirror.write(scalars, step=int(record["step"]))

    def close(self) -> None:
        """Flush everything; a second call does nothing."""
        mirrors, self._mirrors = self._mirrors, []
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        for mirror in mirrors:
            mirror.close()


def as_line(record: Mapping[str, Any]) -> str:
    """One JSON line; values that JSON cannot spell become null and are named in `not_finite`."""
    not_finite = {
        name: str(float(value))
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    clean = {name: None if name in not_finite else value for name, value in record.items()}
    if not_finite:
        clean["not_finite"] = not_finite
    return json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n"


def read_metrics(path: Path, *, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """All records of metrics.jsonl. A last line cut by a killed process is left out, and said in `notes`.

    UserError for a damaged line anywhere else.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
                raise ValueError("not an object with kind and step")
        except ValueError as problem:
            if number == len(lines) and not line.endswith(b"\n"):
                if notes is not None:
                    notes.append(f"{path.name}, line {number}: cut in the middle (the process was killed); left out")
                break
            raise UserError(
                f"not a metrics record: {problem}",
                expected="one JSON object per line",
                fix="remove the line",
                where=f"{path}, line {number}",
            ) from problem
        for name, spelling in record.pop("not_finite", {}).items():
            record[name] = float(spelling)
        records.append(record)
    return records


def rewind_metrics(path: Path, *, step: int) -> list[str]:
    """Drop the records after `step` and a torn last line, so that a resumed run goes on from one curve.

    A last record that only lost its line end gets it back. What is dropped is appended to `metrics.dropped.jsonl`
    beside it. Returns notes for a person.
    """
    notes: list[str] = []
    records = read_metrics(path, notes=notes)
    kept = [record for record in records if record["step"] <= step]
    dropped = [record for record in records if record["step"] > step]
    if dropped:
        with open(path.with_name("metrics.dropped.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(as_line(record) for record in dropped)
        notes.append(f"{len(dropped)} records after step {step} moved to metrics.dropped.jsonl; these steps run again")
    if dropped or notes or (records and not path.read_bytes().endswith(b"\n")):
        write_text_atomic(path, "".join(as_line(record) for record in kept))
    return notes
