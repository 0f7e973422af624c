"""Marks of unfinished work that die with the process that made them. Knows no tensors and no checkpoint format."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zhibei.config.errors import UserError

# Some cluster file systems have no locks. There, process numbers must do.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def hold_lock(path: Path, *, patience_seconds: float = 5.0) -> Iterator[None]:
    """Hold an exclusive lock file while the block runs. The kernel frees it when the process dies, even by SIGKILL.

    Process numbers alone would not do: containers start every process with the same few numbers.
    UserError when another thread or process holds it for longer than `patience_seconds`: a cleaner is soon gone.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in NO_LOCKS:
                break
            os.close(descriptor)
            if problem.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            raise UserError(
                "another thread or process is writing the same thing right now",
                expected="one writer",
                fix="wait for it, or stop the other run of the same name",
                where=str(path),
            ) from problem
        if _is_same_file(descriptor, path):
            break
        os.close(descriptor)  # a cleaner removed the name between opening and locking
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


@contextmanager
def take_over(path: Path, *, pid: int) -> Iterator[bool]:
    """Whether the writer behind a lock file is dead; while the block runs nobody else can become the writer.

    Without the lock file (the writer died just before making or after removing it) the process number decides.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield not is_running(pid)
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            yield problem.errno in NO_LOCKS and not is_running(pid)
            return
        yield _is_same_file(descriptor, path)
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool:
    """Whether a process of this number exists; it may be another one than the one that was meant."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
