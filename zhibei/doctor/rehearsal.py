"""The rehearsal of a run: real weights, the worst batch, two steps, a save, and everything read back in a new process.

What it writes lies in a temporary folder beside the run directory (the same disk) and is gone afterwards. Knows what
to try and in which order; the experiments are in probes.py; fresh.py reads back, readback.py judges.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.resolve import ResolvedRun
from zhibei.doctor.checkup import Checkup, Found, found_of
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.policy_rehearsal import POLICY_STEPS, first_half
from zhibei.doctor.probes import (
    adapters,
    evaluation,
    find_worst,
    first_loss,
    packing,
    reference,
    split,
    two_steps,
    zero_rate,
)  # fmt: skip
from zhibei.doctor.readback import generated, reload, resumed
from zhibei.doctor.saving import memory, save
from zhibei.doctor.scene import Scene, Seen
from zhibei.train.beginning import require_writable, run_dir_of
from zhibei.train.materials import gather

BEFORE = ("load", "worst batch", "reference", "zero rate", "first loss", "packing", "split", "two steps", "adapters",
          "evaluation")  # fmt: skip
AFTER = ("memory", "save", "reload", "generate", "resume")
IN_MEMORY: dict[str, Callable[[Scene], Seen]] = {
    "worst batch": find_worst,
    "reference": reference,
    "zero rate": zero_rate,
    "first loss": first_loss,
    "packing": packing,
    "split": split,
    "two steps": two_steps,
    "adapters": adapters,
    "evaluation": evaluation,
}
NEEDED = ("worst batch", "zero rate")
"""Steps without which the later ones say nothing."""
NOT_OF: dict[str, tuple[str, ...]] = {
    "sft": ("reference",),
    # A reward model gives one number a row: no words to be likely, none to generate.
    "reward": ("reference", "first loss", "packing", "generate"),
    "dpo": ("first loss",),
}
"""Steps that a stage has nothing for."""


def steps_of(stage: str) -> tuple[str, ...]:
    """The names of a stage's steps, in their order."""
    if stage not in NOT_OF:
        return POLICY_STEPS
    return tuple(name for name in (*BEFORE, *AFTER) if name not in NOT_OF[stage])


STEPS = tuple(dict.fromkeys((*BEFORE, *POLICY_STEPS, *AFTER)))
"""The names of all steps of all stages; pitfalls of kind `rehearsal` name one of them in `by`."""


@dataclass(frozen=True)
class Step:
    """One step of a rehearsal: how long it took, what it saw, what it found."""

    name: str
    seconds: float
    detail: str
    findings: tuple[Found, ...] = ()
    figures: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return not any(found.blocks for found in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "detail": self.detail,
            "figures": dict(self.figures or {}),
        }


@dataclass(frozen=True)
class Rehearsal:
    """Every step that was taken. `checkup` holds the findings in the form of `zhibei check`."""

    steps: tuple[Step, ...]
    checkup: Checkup

    def as_dict(self) -> dict[str, Any]:
        """What `zhibei rehearse --json` prints and rehearsal.json holds."""
        return {
            "passed": not self.checkup.blocks,
            "seconds": round(sum(step.seconds for step in self.steps), 3),
            "steps": [step.as_dict() for step in self.steps],
            **self.checkup.as_dict(),
        }


def rehearse(resolved: ResolvedRun, *, on_step: Callable[[str, Step | None], None] = lambda *_: None) -> Rehearsal:
    """Try the run. `on_step` hears the name of each step when it begins, and again with its outcome.

    A step that fails does not stop the others, unless they need it. Raises UserError when there is no place to write.
    """
    stage = _Stage(resolved, on_step)
    with _temporary_folder(resolved) as folder:
        is_offline = resolved.run.stage in NOT_OF
        if (_first_half if is_offline else first_half)(stage, folder):
            # The new process needs the card; nothing of this one holds the model any more.
            _empty_gpu()
            answer: dict[str, Any] = {}
            stage.take("reload", lambda: reload(folder, answer))
            if "generate" in steps_of(resolved.run.stage):
                stage.take("generate", lambda: generated(folder, answer))
            stage.take("resume", lambda: resumed(folder, answer))
    return stage.outcome()


def _first_half(stage: _Stage, folder: Path) -> bool:
    """Everything that needs the model in memory. Whether it was saved in the end."""
    scenes: list[Scene] = []

    def load() -> Seen:
        materials = gather(stage.resolved)
        scenes.append(Scene(materials, folder=folder))
        learning, everything = materials.model.num_parameters()
        return Seen(f"{learning:,} of {everything:,} parameters learn, {materials.precision} on {materials.device}")

    if not stage.take("load", load):
        return False
    scene = scenes[0]
    for name, probe in IN_MEMORY.items():
        if name not in steps_of(stage.resolved.run.stage):
            continue
        passed = stage.take(name, functools.partial(probe, scene))
        if not passed and name in NEEDED:
            return False
    stage.take("memory", lambda: memory(scene))
    return stage.take("save", lambda: save(scene, folder))


class _Stage:
    """Takes steps, times them, and turns whatever goes wrong into findings."""

    def __init__(self, resolved: ResolvedRun, on_step: Callable[[str, Step | None], None]) -> None:
        self.resolved, self.on_step = resolved, on_step
        self.steps: list[Step] = []
        self.catalogue = load_catalogue()

    def take(self, name: str, work: Callable[[], Seen]) -> bool:
        """Whether the step went through; what it found is kept either way."""
        self.on_step(name, None)
        started = time.monotonic()
        found: list[Found] = []
        try:
            seen = work()
            found = [self._found(pitfall, finding) for pitfall, finding in seen.problems]
        except UserError as error:
            seen, found = Seen(error.what), [found_of(error, self.catalogue)]
        except Exception as error:
            seen = Seen(f"{type(error).__name__}: {error}")
            found = [self._found(*_failure(error, name, stage=self.resolved.run.stage))]
        wanted = self.resolved.run.accept
        kept = tuple(one for one in found if one.id not in wanted or not one.id)
        step = Step(name, time.monotonic() - started, seen.detail, kept, seen.figures)
        self.steps.append(step)
        self.on_step(name, step)
        return step.passed

    def _found(self, pitfall: str, finding: Finding) -> Found:
        entry = self.catalogue.get(pitfall)
        if entry is None:
            return Found("", "rehearsal", "launch", finding)
        return Found(entry.id, entry.area, entry.cost, finding, entry.english.title, entry.english.why)

    def outcome(self) -> Rehearsal:
        findings = tuple(found for step in self.steps for found in step.findings)
        return Rehearsal(tuple(self.steps), Checkup(findings, num_checks=len(self.steps)))


def _failure(error: Exception, step: str, *, stage: str) -> tuple[str, Finding]:
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        text = str(error).splitlines()[0]
        return "oom-on-longest-batch-late", Finding(
            what=f"out of memory at step '{step}' of the rehearsal: {text}",
            where=f"{stage}.micro_batch_tokens",
            to_do=f"lower {stage}.micro_batch_tokens or data.max_tokens, set model.activation_checkpointing: full, "
            "or ask zhibei plan for what fits",
        )
    return "", Finding(
        what=f"step '{step}' of the rehearsal failed: {type(error).__name__}: {error}",
        where="rehearsal",
        to_do="report it with this message; rehearse: never goes without",
    )


@contextmanager
def _temporary_folder(resolved: ResolvedRun) -> Iterator[Path]:
    """A folder on the disk the run will write to, gone afterwards."""
    require_writable(run_dir_of(resolved.run))
    parent = run_dir_of(resolved.run).path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    folder = Path(tempfile.mkdtemp(prefix=f".rehearsal-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty_gpu() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
