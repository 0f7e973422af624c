"""Writing a GGUF file, or several parts of one, tensor by tensor. Knows values and tensors, no models.

A file is written aside, under its own name in a hidden folder beside its place, flushed to the disk and then moved;
what stood there before is never overwritten.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.export.gguf.kinds import row_bytes
from zhibei.export.gguf.quantizer import import_gguf, quantizer
from zhibei.store.files import disk_error, require_space, sync_folder


@dataclass(frozen=True)
class Planned:
    """One tensor: its shape [rows, ..., width], its type, its fp32 values when read, and what weighs its columns."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], np.ndarray]
    importance: np.ndarray | None = None

    @property
    def num_bytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * row_bytes(self.type, self.shape[-1])


def add_values(writer: Any, values: Mapping[str, Any]) -> None:
    """Metadata by the kind of each value: truth, whole number, fraction, text or a list of one of these."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def require_free(path: Path) -> None:
    """Raises UserError when a file of this name, or a part of one, is there."""
    taken = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-?????-of-?????.gguf"))
    if taken:
        raise UserError(
            "the file exists already",
            expected="a new name; nothing that exists is overwritten",
            fix="choose another name, or remove the file first",
            where=str(taken[0]),
        )


def write_gguf(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    tensors: Sequence[Planned],
    *,
    split_bytes: int | None = None,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> list[Path]:
    """Write one file, in parts of at most `split_bytes` when given; its paths: `x.gguf`, or `x-00001-of-00003.gguf` and
    so on, as llama.cpp names them.

    Memory is that of one tensor in fp32 and its bytes. Raises UserError for a full disk or a name that is taken.
    """
    require_free(path)
    total = sum(tensor.num_bytes for tensor in tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise disk_error(problem, purpose=path.name, where=path) from problem
    require_space(path.parent, needed_bytes=int(total * 1.01) + 2**20, purpose=f"writing {path.name}")
    with _aside(path) as folder:
        writer = import_gguf().GGUFWriter(folder / path.name, architecture, split_max_size=split_bytes or 0)
        add_values(writer, values)
        for tensor in tensors:
            number = import_gguf().GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(_bytes_of(tensor))
            progress(tensor.name, number, len(tensors))
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
        names = sorted(part.name for part in folder.iterdir())
        for name in names:
            os.replace(folder / name, path.with_name(name))
        sync_folder(path.parent)
    return [path.with_name(name) for name in names]


def _bytes_of(tensor: Planned) -> np.ndarray:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise RuntimeError(f"{tensor.name} has shape {values.shape}, {tensor.shape} was announced")
    if not np.isfinite(values).all():
        raise UserError(
            f"{tensor.name} holds NaN or infinity",
            expected="finite weights",
            fix="zhibei verify names the damaged tensors; use an older checkpoint",
        )
    if tensor.type == "F32":
        return np.ascontiguousarray(values, dtype=np.float32)
    rows = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, values.shape[-1])
    return quantizer(tensor.type)(rows, tensor.importance)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    try:
        yield folder
    except OSError as problem:
        raise disk_error(problem, purpose=path.name, where=path) from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)
