"""The head of a safetensors file: which tensors it holds, of which dtype and shape, and where. Knows no torch.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from zhibei.config.errors import UserError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4,
    "U64": 8, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one value, by the dtype as a header spells it."""


@dataclass(frozen=True)
class TensorEntry:
    """One line of a safetensors header. start and end count from the first byte of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The head of one safetensors file; `file_bytes` is the size it promises."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the head of a safetensors file without touching its data; UserError when it is not sound."""

    def broken(what: str) -> UserError:
        return UserError(
            what,
            expected="a complete safetensors file",
            fix="the file was cut or damaged; use an older checkpoint or fetch it again",
            where=str(path),
        )

    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise broken(f"only {len(prefix)} bytes long")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise broken(f"header of {header_bytes:,} bytes announced; this is no safetensors file")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise broken(f"header truncated to {len(text):,} of {header_bytes:,} bytes")
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        entries = {
            name: TensorEntry(item["dtype"], tuple(item["shape"]), *item["data_offsets"])
            for name, item in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise broken(f"header is not readable: {problem}") from problem
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end or entry.end < entry.start:
            raise broken(f"tensor {name} starts at byte {entry.start} of the data instead of {end}")
        end = entry.end
    return Header(entries, metadata, 8 + header_bytes, 8 + header_bytes + end)
