"""Chunks of records encoded in other processes, in order. Knows chunks, not what is in them.

A worker is a fresh interpreter that runs this module and talks over its pipes. Nothing of the caller's main module is
imported again (so a script needs no `__main__` guard), and torch is never loaded.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, TypeVar

from zhibei.config.errors import UserError
from zhibei.data.encode import Wording
from zhibei.data.records import Record

Numbered = tuple[int, int, Record]
Result = TypeVar("Result")
Encode = Callable[[Sequence[Numbered], Wording], Result]
"""A function at the top of a module, so that a worker can find it by its name."""

CHUNK_ROWS = 500
# Starting a worker costs about half a second; fewer rows than this are done sooner here.
ROWS_PER_WORKER = 4000
CHUNKS_AHEAD = 2
WORKER = "from zhibei.data.workers import serve; serve()"


def num_workers(asked: int | None) -> int:
    """As many as asked; else one per core this process may use."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    numbered: Iterable[Numbered], wording: Wording, *, workers: int, encode: Encode[Result]
) -> Iterator[Result]:
    """What `encode` makes of chunks of records, in the order of the records, whatever the number of workers; 0 and 1
    work in this process."""
    chunks = _chunks(numbered)
    if workers < 2:
        yield from (encode(chunk, wording) for chunk in chunks)
        return
    waiting: list[list[Numbered]] = []
    for chunk in chunks:
        waiting.append(chunk)
        if len(waiting) * CHUNK_ROWS >= ROWS_PER_WORKER:
            break
    else:
        yield from (encode(chunk, wording) for chunk in waiting)
        return
    yield from _in_workers(_chain(waiting, chunks), pickle.dumps((encode, wording)), workers=workers)


def _chunks(numbered: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    chunk: list[Numbered] = []
    for one in numbered:
        chunk.append(one)
        if len(chunk) == CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _chain(first: Sequence[list[Numbered]], rest: Iterator[list[Numbered]]) -> Iterator[list[Numbered]]:
    yield from first
    yield from rest


def _in_workers(chunks: Iterator[list[Numbered]], task: bytes, *, workers: int) -> Iterator[Any]:
    """Each thread owns one process; a bounded queue of futures keeps the order and the memory small."""
    pool = _Processes(task)
    pending: deque[Future[Any]] = deque()
    executor = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="zhibei-prepare")
    try:
        for chunk in chunks:
            pending.append(executor.submit(pool.encode, chunk))
            if len(pending) >= workers * CHUNKS_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.stop()
        executor.shutdown(wait=True, cancel_futures=True)
        pool.stop()  # a thread may have started its process just after the first one


class _Processes:
    """One worker process per thread that asks; all of them end with `stop`."""

    def __init__(self, task: bytes) -> None:
        self.task = task
        self.of_thread = threading.local()
        self.all: list[subprocess.Popen[bytes]] = []
        self.lock = threading.Lock()

    def encode(self, chunk: list[Numbered]) -> Any:
        process = getattr(self.of_thread, "process", None) or self._start()
        assert process.stdin
        assert process.stdout
        try:
            _send(process.stdin, pickle.dumps(chunk))
            answer = _receive(process.stdout)
        except (OSError, ValueError) as error:
            raise _worker_died(process) from error
        if answer is None:
            raise _worker_died(process)
        result = pickle.loads(answer)
        if isinstance(result, dict):
            raise UserError(**result)
        if isinstance(result, str):
            raise RuntimeError(f"a worker that prepares rows failed:\n{result}")
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        with self.lock:
            self.all.append(process)
        assert process.stdin
        _send(process.stdin, self.task)
        self.of_thread.process = process
        return process

    def stop(self) -> None:
        with self.lock:
            for process in self.all:
                process.kill()
            for process in self.all:
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe:
                        _close(pipe)


def _close(pipe: IO[bytes]) -> None:
    with suppress(OSError):  # the process is gone and left something unsent
        pipe.close()


def _worker_died(process: subprocess.Popen[bytes]) -> UserError:
    code = process.wait()
    return UserError(
        f"a process that prepares rows died (exit code {code})",
        expected="enough memory for all workers",
        fix="set data.workers to a smaller number; data.workers: 0 prepares the rows in this process",
        where="data.workers",
    )


def _send(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(struct.pack("<Q", len(content)))
    pipe.write(content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """One message, or None when the other side is gone."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    content = pipe.read(struct.unpack("<Q", head)[0])
    return content if len(content) == struct.unpack("<Q", head)[0] else None


def serve() -> None:
    """The worker's side: first what is to be done, then chunk after chunk until the pipe closes.

    What comes in and goes out are pickles between two processes of one program; no file is ever unpickled.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing a library prints may end up between the answers
    first = _receive(source)
    if first is None:
        return
    encode, wording = pickle.loads(first)
    with suppress(BrokenPipeError):  # the parent is gone: nobody waits for the answer
        while (content := _receive(source)) is not None:
            _send(sink, pickle.dumps(_answer(pickle.loads(content), encode, wording)))


def _answer(chunk: list[Numbered], encode: Encode[Any], wording: Wording) -> Any:
    try:
        return encode(chunk, wording)
    except UserError as error:
        return error.as_dict()
    except Exception:  # a defect travels to the parent as text, since not every exception can be pickled
        import traceback

        return traceback.format_exc()
