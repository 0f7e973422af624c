"""Writes checkpoints while training goes on, each rank its own files, and makes them count when all are done. Knows
ranks and files, not what the tensors mean.

A save has three parts: `begin` (rank 0 makes the folder; every rank copies what it holds into host memory), the writing
(a thread of each rank, without any message between ranks), and `settle` (all report; rank 0 commits). Until then the
older checkpoint is the newest sound one, whatever dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zhibei.config.errors import UserError, as_told, from_told
from zhibei.model.ranks import Ranks
from zhibei.store.checkpoint import Draft, step_path
from zhibei.store.checkpoint_files import Groups, share_bytes, write_share
from zhibei.store.host_memory import GIB, read_memory
from zhibei.train.snapshot import Snapshot

Background = Literal["auto", True, False]
MEMORY_SHARE = 0.5
"""`auto` copies what is saved when it takes at most this share of the host memory that is free."""


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. `seconds` from its beginning, of which training waited for `waited_seconds`."""

    path: Path
    step: int
    num_bytes: int
    seconds: float
    waited_seconds: float
    best_step: int | None
    in_background: bool


@dataclass
class _Pending:
    """What has begun and is not committed. `lines` or `problem` is set by the writer when it is done."""

    path: Path
    step: int
    best_step: int | None
    began: float
    waited: float = 0.0
    draft: Draft | None = None
    thread: threading.Thread | None = None
    lines: list[dict[str, Any]] | None = None
    problem: UserError | None = None


class Saver:
    """Saves into one folder of checkpoints; at most one save is under way. Every rank calls the same methods.

    Leaving the `with` block waits for the writer. What it wrote counts where this process is alone; of several ranks
    the others may be gone, so that only `settle` makes it count.
    """

    def __init__(self, checkpoints: Path, ranks: Ranks, *, background: Background = False) -> None:
        self.checkpoints, self.ranks, self.background = checkpoints, ranks, background
        self._snapshot = Snapshot()
        self._pending: _Pending | None = None
        self._fits: bool | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pending is None:
            return
        if not self.ranks.are_several and (kind is None or issubclass(kind, Exception)):
            self.settle()
            return
        if self._pending.thread is not None:
            self._pending.thread.join()
        if self._pending.draft is not None:
            self._pending.draft.abandon()
        self._pending = None

    @property
    def step(self) -> int | None:
        """The step whose save has begun and is not settled; the same on every rank."""
        return None if self._pending is None else self._pending.step

    @property
    def is_in_background(self) -> bool:
        """Whether what has begun is written while training goes on; the same on every rank."""
        return self._pending is not None and self._pending.thread is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's writer is still at work."""
        return self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive()

    def begin(
        self,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        *,
        best_step: int | None = None,
        may_go_on: bool = True,
    ) -> None:
        """Start saving this rank's share. `may_go_on`: training goes on meanwhile; otherwise all is written when this
        returns. An earlier save must be settled. Raises UserError on every rank when there is too little space."""
        if self._pending is not None:
            raise RuntimeError(f"step {self._pending.step} is still being saved")
        began = time.monotonic()
        ranks = self.ranks
        own = {"groups": [name for name, tensors in groups.items() if tensors], "bytes": self._bytes_of(groups)}
        told = ranks.gathered(own)
        names = list(dict.fromkeys(name for each in told for name in each["groups"]))
        needed = sum(each["bytes"] for each in told)
        found: list[Draft] = []

        def draft() -> str:
            found.append(
                Draft(self.checkpoints, step, groups=names, state=state, needed_bytes=needed, world=ranks.world)
            )
            return str(found[0].folder)

        folder = Path(ranks.first_does(draft))
        path = step_path(self.checkpoints, step)
        pending = _Pending(path, step, best_step, began, draft=found[0] if found else None)
        self._pending = pending
        shown = {group: tensors for group, tensors in groups.items() if tensors}
        if may_go_on and self._copies(own["bytes"]):
            held = self._snapshot.take(shown)
            pending.thread = threading.Thread(target=self._write, args=(pending, folder, held), name="checkpoint")
            pending.thread.start()
        else:
            self._write(pending, folder, shown)
        pending.waited = time.monotonic() - began

    def _bytes_of(self, groups: Groups) -> int:
        return share_bytes(groups, rank=self.ranks.rank, world=self.ranks.world)

    def _copies(self, num_bytes: int) -> bool:
        """Whether what is saved is copied, so that training can go on; the same on every rank."""
        if isinstance(self.background, bool):
            return self.background
        if self._fits is None:
            _, free_gib = read_memory()
            fits = num_bytes * self.ranks.per_node <= MEMORY_SHARE * free_gib * GIB
            self._fits = self.ranks.sum_on_host(float(fits))[0] == self.ranks.world
        return self._fits

    def _write(self, pending: _Pending, folder: Path, groups: Groups) -> None:
        """Fill this rank's files. What goes wrong is kept for `settle`, which tells everybody."""
        ranks, purpose = self.ranks, f"checkpoint {pending.path.name}"
        try:
            if not folder.is_dir():
                raise UserError(
                    f"the folder that rank 0 has made for {purpose} is not there",
                    expected="a run directory on a file system that all nodes share",
                    fix="put the run where every node sees it (output, or the working directory)",
                    where=str(folder),
                )
            pending.lines = write_share(folder, groups, purpose=purpose, rank=ranks.rank, world=ranks.world)
        except UserError as problem:
            pending.problem = problem
        except Exception as problem:
            pending.problem = UserError(
                f"{purpose} could not be written: {type(problem).__name__}: {problem}",
                expected="a folder that can be written",
                fix="what was saved before is untouched; resume from it",
                where=str(folder.parent),
            )

    def settle(self) -> Saved | None:
        """Wait for every rank's writer, and commit; None when nothing is under way.

        Raises UserError on every rank when one of them could not write, naming step and rank. Nothing is left then.
        """
        pending, ranks = self._pending, self.ranks
        if pending is None:
            return None
        since = time.monotonic()
        if pending.thread is not None:
            pending.thread.join()
        self._pending = None
        told = ranks.gathered([pending.lines, None if pending.problem is None else as_told(pending.problem)])

        def commit() -> int:
            draft = pending.draft
            assert draft is not None
            failed = [(rank, problem) for rank, (_, problem) in enumerate(told) if problem is not None]
            if failed:
                draft.abandon()
                raise _as_error(pending.path.name, *failed[0], is_alone=not ranks.are_several)
            lines = [line for lines, _ in told for line in lines]
            draft.commit(lines)
            return sum(line["bytes"] for line in lines)

        num_bytes = ranks.first_does(commit)
        now = time.monotonic()
        return Saved(
            pending.path,
            pending.step,
            num_bytes,
            seconds=now - pending.began,
            waited_seconds=pending.waited + now - since,
            best_step=pending.best_step,
            in_background=pending.thread is not None,
        )


def _as_error(name: str, rank: int, told: Mapping[str, Any], *, is_alone: bool) -> UserError:
    problem = from_told(told)
    what = problem.what if name in problem.what else f"{name}: {problem.what}"
    problem.what = what if is_alone else f"rank {rank}: {what}"
    return problem
