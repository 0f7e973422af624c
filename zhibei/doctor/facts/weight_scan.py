"""NaN, zeros and wild values in safetensors files, found on the bits, without torch. Knows no architecture.

A float's bits without the sign grow with its size, and NaN and infinity are the largest of all. So one maximum over
the bits of a tensor says whether it is finite, whether it is all zero, and how large its largest value is.
Layouts: IEEE 754 for F16, F32 and F64; BF16 is the upper half of F32; F8 as in arXiv:2209.05433 (E4M3 has no infinity).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.headers import TensorEntry, read_header

# dtype of a header -> (numpy view, bits without the sign, first bits that are not finite)
LAYOUTS: dict[str, tuple[type, int, int]] = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
}
BLOCK_BYTES = 2**20
SAMPLES_PER_TENSOR = 5
SAMPLE_BYTES = 64 * 2**10
DEFAULT_SECONDS = 1.0
DEFAULT_BYTES = 2**34
CACHE_NAME = Path("doctor") / "weight-scans.json"
CACHED_FILES = 200


@dataclass(frozen=True, slots=True)
class Scan:
    """`largest` maps float tensors to their largest absolute value: NaN where one is not finite.

    `share` is the share of all float bytes that were read, now or before (scans of unchanged files are remembered).
    """

    largest: Mapping[str, float]
    share: float

    @property
    def non_finite(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.largest.items() if not np.isfinite(value))

    @property
    def zero(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.largest.items() if value == 0)


@dataclass(frozen=True, slots=True)
class _Tensor:
    path: Path
    name: str
    entry: TensorEntry
    data_start: int

    @property
    def num_bytes(self) -> int:
        return self.entry.end - self.entry.start


def scan_weights(
    paths: Sequence[Path],
    *,
    cache: Path | None = None,
    seconds: float = DEFAULT_SECONDS,
    max_bytes: int = DEFAULT_BYTES,
) -> Scan:
    """Read tensors whole until time or bytes are used up, and blocks of every other one, first and last included.

    What was read whole is remembered under `cache` by path, size, time and inode, so the next scan goes on where this
    one stopped. Files with a broken head are left out: `store.weights` names them.
    """
    known = _Known(cache)
    tensors = [tensor for path in paths for tensor in _float_tensors(path)]
    largest: dict[str, float] = {}
    seen_bytes = read_bytes = 0
    end = time.monotonic() + seconds
    for tensor in sorted(tensors, key=lambda one: one.num_bytes):
        remembered = known.of(tensor)
        if remembered is not None:
            largest[tensor.name], seen_bytes = remembered, seen_bytes + tensor.num_bytes
            continue
        until = end if read_bytes + tensor.num_bytes <= max_bytes else 0.0
        value, num_bytes, is_whole = _largest(tensor, until=until)
        largest[tensor.name] = value
        read_bytes += num_bytes
        seen_bytes += num_bytes
        if is_whole:
            known.note(tensor, value)
    known.keep()
    total = sum(tensor.num_bytes for tensor in tensors)
    return Scan(largest, seen_bytes / total if total else 0.0)


def _float_tensors(path: Path) -> list[_Tensor]:
    try:
        header = read_header(path)
    except (UserError, OSError):
        return []
    if path.stat().st_size < header.file_bytes:
        return []
    return [
        _Tensor(path, name, entry, header.data_start)
        for name, entry in header.entries.items()
        if entry.dtype in LAYOUTS and entry.end > entry.start
    ]


def bits_of(path: Path, entry: TensorEntry, *, data_start: int) -> np.ndarray:
    """The values of a float tensor as unsigned integers, mapped from the file and read only where touched."""
    view = LAYOUTS[entry.dtype][0]
    count = (entry.end - entry.start) // np.dtype(view).itemsize
    offset = data_start + entry.start
    if offset % np.dtype(view).itemsize == 0:
        return np.memmap(path, dtype=view, mode="r", offset=offset, shape=(count,))
    # Old writers did not align tensors; bytes can be mapped anywhere and viewed after copying.
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(entry.end - entry.start,))
    return np.frombuffer(raw.tobytes(), dtype=view)


def _largest(tensor: _Tensor, *, until: float) -> tuple[float, int, bool]:
    """(largest absolute value or NaN, bytes read, was it read whole): block by block until the clock, then samples."""
    view, mask, limit = LAYOUTS[tensor.entry.dtype]
    bits = bits_of(tensor.path, tensor.entry, data_start=tensor.data_start)
    item_bytes = np.dtype(view).itemsize
    top = count = reached = 0
    for start, stop in _blocks(len(bits), item_bytes=item_bytes, until=until):
        top = max(top, int((bits[start:stop] & view(mask)).max()))
        count += max(0, stop - max(start, reached))
        reached = max(reached, stop)
        if top >= limit:
            return float("nan"), count * item_bytes, False
    return as_float(top, tensor.entry.dtype), count * item_bytes, count == len(bits)


def _blocks(count: int, *, item_bytes: int, until: float) -> Iterator[tuple[int, int]]:
    sample, size = SAMPLE_BYTES // item_bytes, BLOCK_BYTES // item_bytes
    is_small = count <= SAMPLES_PER_TENSOR * sample
    for start in range(0, count, size):
        if not is_small and time.monotonic() >= until:
            break
        yield start, min(start + size, count)
    else:
        return
    last = count - sample
    for number in range(SAMPLES_PER_TENSOR):
        start = last * number // (SAMPLES_PER_TENSOR - 1)
        yield start, start + sample


def as_float(bits: int, dtype: str) -> float:
    """The value behind the bits of one float."""
    return float(as_floats(np.array([bits], dtype=LAYOUTS[dtype][0]), dtype)[0])


def as_floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Values behind the bits of floats, as float32 (float64 for F64)."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
        fraction_bits = 7 - exponent_bits
        exponent = (bits & 0x7F) >> fraction_bits
        fraction = (bits & (2**fraction_bits - 1)).astype(np.float32) / 2**fraction_bits
        scale = np.exp2(np.maximum(exponent, 1).astype(np.float32) - bias)
        return np.where(bits & 0x80, -1.0, 1.0) * scale * (fraction + (exponent > 0))
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(
        np.float64 if dtype == "F64" else np.float32
    )


class _Known:
    """What earlier scans read whole: {path: {"stamp": [size, time, inode], "largest": {tensor: value or null}}}."""

    def __init__(self, root: Path | None) -> None:
        self.path = root / CACHE_NAME if root is not None else None
        self.files: dict[str, dict[str, Any]] = {}
        self.is_changed = False
        with suppress(OSError, UserError):  # no cache yet, or a broken one: everything is read again
            loaded = read_json(self.path) if self.path is not None else {}
            self.files = loaded if isinstance(loaded, dict) else {}

    def _file(self, path: Path) -> dict[str, Any]:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        place = str(path.resolve())
        found = self.files.get(place)
        if not (isinstance(found, dict) and found.get("stamp") == stamp and isinstance(found.get("largest"), dict)):
            self.files.pop(place, None)
            self.files[place] = {"stamp": stamp, "largest": {}}
        return self.files[place]

    def of(self, tensor: _Tensor) -> float | None:
        values = self._file(tensor.path)["largest"]
        return float(values[tensor.name]) if isinstance(values.get(tensor.name), (int, float)) else None

    def note(self, tensor: _Tensor, value: float) -> None:
        """Only finite tensors are remembered: what is broken is looked at again each time."""
        if np.isfinite(value):
            self._file(tensor.path)["largest"][tensor.name] = value
            self.is_changed = True

    def keep(self) -> None:
        """Without a cache (a full or read-only disk) everything is read again next time: slower, never wrong."""
        if self.path is None or not self.is_changed:
            return
        newest = dict(list(self.files.items())[-CACHED_FILES:])
        with suppress(OSError, UserError):
            write_json_atomic(self.path, newest)
