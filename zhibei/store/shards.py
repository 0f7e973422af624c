"""Named tensors streamed to and from safetensors files, one tensor in host memory at a time. Knows no model and no run.

Layout of a file (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header padded
with spaces to a multiple of 8 bytes, then the data. Larger item sizes come first, so that every tensor starts aligned.
The library's `save_file` wants all tensors in memory at once; this writer holds one.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zhibei.config.errors import UserError
from zhibei.store.files import HashedFile, write_json_atomic
from zhibei.store.headers import TensorEntry, read_header

DEFAULT_SHARD_BYTES = 5 * 10**9

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made only when its turn to be written comes: gathered, dequantised or read from elsewhere."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


Writable = torch.Tensor | LazyTensor


@dataclass(frozen=True)
class WrittenFile:
    """One finished file: name inside its folder, size, SHA-256, and the names of its tensors."""

    name: str
    num_bytes: int
    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ShardPlan:
    """One file to be written: its name, its bytes, and the names in the order in which they are asked for."""

    file_name: str
    names: tuple[str, ...]
    header: bytes

    def num_bytes(self, tensors: Mapping[str, Writable]) -> int:
        return len(self.header) + sum(num_bytes(tensors[name]) for name in self.names)


def num_bytes(tensor: Writable) -> int:
    """Bytes of a tensor's values on disk."""
    count = 1
    for size in tensor.shape:
        count *= size
    return count * tensor.dtype.itemsize


def plan_shards(
    tensors: Mapping[str, Writable], *, stem: str, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[ShardPlan]:
    """Which tensor goes into which file, from shapes and dtypes alone.

    Files are `<stem>.safetensors`, or `<stem>-00001-of-00003.safetensors` and so on, as transformers names them.
    A tensor larger than `max_shard_bytes` gets a file of its own. Tensors that are the same memory are written once.
    """
    tied = tied_names(tensors)
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise UserError(
                f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot hold",
                expected=f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}",
                fix="convert it first",
            )
        if name in tied:
            continue
        if shards[-1] and shard_bytes + num_bytes(tensor) > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes(tensor)
    plans = []
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        ordered = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
        aliases = {alias: name for alias, name in tied.items() if name in set(names)}
        plans.append(
            ShardPlan(f"{stem}{part}.safetensors", tuple(ordered), _header_bytes(tensors, ordered, aliases=aliases))
        )
    return plans


def tied_names(tensors: Mapping[str, Writable]) -> dict[str, str]:
    """{later name: first name} of tensors that are one and the same memory, such as tied embeddings."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, LazyTensor) or tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _header_bytes(tensors: Mapping[str, Writable], names: list[str], *, aliases: dict[str, str]) -> bytes:
    metadata = {"format": "pt"} | ({"tied": json.dumps(aliases)} if aliases else {})
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        end = offset + num_bytes(tensors[name])
        header[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_tensors(
    folder: Path, tensors: Mapping[str, Writable], *, stem: str, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[WrittenFile]:
    """Write `<stem>.safetensors`, or several files and `<stem>.safetensors.index.json`, as transformers expects them.

    Of tied tensors the first is in the files, as `save_pretrained` does it. Fill a `whole_folder` with it, so that a
    full disk or a kill leaves nothing half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_shards(tensors, stem=stem, max_shard_bytes=max_shard_bytes)
    written = write_shards(folder, tensors, plans=plans)
    if len(written) > 1:
        total = sum(num_bytes(tensors[name]) for plan in plans for name in plan.names)
        weight_map = {name: plan.file_name for plan in plans for name in plan.names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomic(folder / f"{stem}.safetensors.index.json", index)
    return written


def write_shards(folder: Path, tensors: Mapping[str, Writable], *, plans: list[ShardPlan]) -> list[WrittenFile]:
    """Write planned files into an existing folder. OSError when the disk is full: the caller removes the folder.

    The tensors are asked for file by file in the order of `ShardPlan.names`, each exactly once.
    """
    written = []
    for plan in plans:
        file = HashedFile(folder / plan.file_name)
        try:
            file.write(plan.header)
            for name in plan.names:
                file.write(host_bytes(name, tensors[name]))
        except BaseException:
            file.abandon()
            raise
        sha256 = file.close()
        written.append(WrittenFile(plan.file_name, file.num_bytes, sha256, plan.names))
    return written


def host_bytes(name: str, tensor: Writable) -> memoryview:
    """The values of one tensor in host memory, row-major."""
    value = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    if tuple(value.shape) != tuple(tensor.shape) or value.dtype != tensor.dtype:
        raise RuntimeError(
            f"tensor {name} was announced as {tensor.dtype} {tuple(tensor.shape)} and came as "
            f"{value.dtype} {tuple(value.shape)}"
        )
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class TensorFolder(Mapping[str, torch.Tensor]):
    """The tensors of some safetensors files as one mapping; each is read from the disk when asked for.

    Names that were tied when written give the same values again. Values are private copies in host memory.
    """

    def __init__(self, files: list[Path], *, without: Collection[str] = ()) -> None:
        """`without`: names that are left out, wherever they are."""
        self._files: dict[str, Path] = {}
        self._entries: dict[str, TensorEntry] = {}
        self.tied: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            header = read_header(path)
            if path.stat().st_size != header.file_bytes:
                raise UserError(
                    f"truncated: {path.stat().st_size:,} of {header.file_bytes:,} bytes",
                    expected="a complete safetensors file",
                    fix="use an older checkpoint or fetch the file again",
                    where=str(path),
                )
            entries = {name: entry for name, entry in header.entries.items() if name not in without}
            for name in entries:
                if name in self._files:
                    raise UserError(
                        f"tensor {name} is also in {self._files[name].name}",
                        expected="every tensor once",
                        fix="files of two different saves were mixed; fetch the folder again",
                        where=str(path),
                    )
                self._files[name] = path
            self._entries.update(entries)
            self.tied.update(json.loads(header.metadata.get("tied", "{}")))

    def __getitem__(self, name: str) -> torch.Tensor:
        name = self.tied.get(name, name)
        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(str(path), framework="pt")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise UserError(
                f"tensor {name} cannot be read: {problem}",
                expected="a sound safetensors file",
                fix="use an older checkpoint or fetch the file again",
                where=str(path),
            ) from problem

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self.tied

    def __len__(self) -> int:
        return len(self._files) + len(self.tied)

    def read_unmapped(self, name: str, *, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or some of its rows, by ordinary reads. Nothing else of its file stays in memory beside it, as
        pages of a mapping would."""
        name = self.tied.get(name, name)
        path, entry = self._files[name], self._entries[name]
        shape, skipped = list(entry.shape), 0
        count = entry.end - entry.start
        if rows is not None:
            row_bytes = count // max(shape[0], 1)
            shape[0], skipped, count = rows[1] - rows[0], rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        values = torch.empty(count, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(read_header(path).data_start + entry.start + skipped)
            view, num_read = values.numpy().data, 0
            while num_read < len(view):
                more = file.readinto(view[num_read:])
                if not more:
                    raise UserError(
                        f"tensor {name} ends early",
                        expected="a complete safetensors file",
                        fix="fetch the file again",
                        where=str(path),
                    )
                num_read += more
        return values.view(DTYPES[entry.dtype]).reshape(shape)

    def spec(self, name: str) -> TensorEntry:
        """dtype, shape and place of a tensor, without reading it."""
        return self._entries[self.tied.get(name, name)]


def read_tensors(folder: Path, *, stem: str | None = None) -> TensorFolder:
    """All tensors of a folder's safetensors files (only `<stem>*.safetensors` when given), read lazily."""
    files = sorted(path for path in folder.glob("*.safetensors") if stem is None or _is_of_stem(path.name, stem))
    if not files:
        raise UserError(
            "no safetensors file here" if stem is None else f"no {stem}*.safetensors here",
            expected="safetensors files (pickle files such as .bin and .pt are never opened)",
            fix="check the path",
            where=str(folder),
        )
    return TensorFolder(files)


def _is_of_stem(file_name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors", file_name) is not None
