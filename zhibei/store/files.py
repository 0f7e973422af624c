"""Files that are whole or absent: atomic JSON and text, hashes, free space. Knows no checkpoint and no manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError

CHUNK_BYTES = 16 * 2**20
GIB = 2**30
NEW_FILE_NAME = re.compile(r"\.new-(\d+)-\d+-.+")  # what `write_json_atomic` fills before it renames


class HashedFile:
    """A new file whose SHA-256 is computed while it is written, and which is on the disk when `close` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()
        # Unbuffered: every write is one large block, and a buffer would copy it once more.
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 closed by close()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            _write_whole(self._file, chunk)
            self._sha256.update(chunk)
        self.num_bytes += len(view)

    def close(self) -> str:
        """Flush to the disk and return the hash of everything written."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        """Close without a promise; the file is about to be removed."""
        self._file.close()


def _write_whole(file: Any, chunk: memoryview) -> None:
    """An unbuffered write may take only part of the data, e.g. when the disk fills up."""
    while len(chunk):
        written = file.write(chunk)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.name))
        chunk = chunk[written:]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as `sha256sum` prints it."""
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for chunk in iter(lambda: file.read(CHUNK_BYTES), b""):
            sha256.update(chunk)
    return sha256.hexdigest()


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def drop_from_page_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages, so that the next read comes from the disk. Best effort; Linux only."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder (creations, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:  # some network file systems refuse to sync a folder; there is nothing better to do
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where `folder` is, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_space(folder: Path, *, needed_bytes: int, purpose: str) -> None:
    """UserError when fewer than `needed_bytes` are free where `folder` lies; nothing has been written yet."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise UserError(
            f"the disk is too full for {purpose}: {needed_bytes:,} bytes needed, {free:,} bytes free",
            expected=f"at least {needed_bytes:,} bytes ({needed_bytes / GIB:.2f} GiB) free",
            fix="free some space, lower sft.keep_checkpoints, or put `runs` on a larger disk; nothing was changed",
            where=str(folder),
        )


def disk_error(problem: OSError, *, purpose: str, where: Path) -> UserError:
    """What a failed write means for a person."""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    reason = "the disk or quota is full" if full else (problem.strerror or str(problem))
    space = f"; {free_bytes(where):,} bytes free" if full else ""
    return UserError(
        f"could not write {purpose}: {reason}{space}",
        expected="a folder that can be written, with enough space",
        fix=(
            "free some space (or lower sft.keep_checkpoints), then resume"
            if full
            else "check permissions and health of the disk, then resume"
        )
        + "; what was saved before is untouched",
        where=str(problem.filename or where),
    )


def as_json(value: Any) -> str:
    """Strict JSON for people and programs. NaN and infinity have no spelling in JSON: ValueError."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a JSON file that is the old one or the new one at every moment, also after a power cut."""
    # Half a surrogate pair has no UTF-8 spelling; as `\ud800` it is proper JSON.
    _write_atomic(path, as_json(value).encode("utf-8", errors="backslashreplace"))


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file that is the old one or the new one at every moment."""
    _write_atomic(path, text.encode("utf-8"))


def _write_atomic(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".new-{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise disk_error(problem, purpose=path.name, where=path.parent) from problem


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError when it is absent, cut or not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as problem:
        raise UserError(
            f"cannot be read: {problem.strerror}",
            expected="a readable JSON file",
            fix="check the path, or that the run that writes this file got that far",
            where=str(path),
        ) from problem
    except ValueError as problem:
        raise UserError(
            f"not JSON: {problem}",
            expected="a JSON file as zhibei writes it",
            fix="the file was cut or edited; restore it from a copy",
            where=str(path),
        ) from problem
