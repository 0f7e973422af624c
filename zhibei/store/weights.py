"""Is a set of safetensors files complete, indexed, finite and of the announced sizes? Knows no architecture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.config.errors import UserError
from zhibei.store.files import read_json
from zhibei.store.headers import ITEM_BYTES, TensorEntry, read_header

if TYPE_CHECKING:
    import torch

CHUNK_ITEMS = 2**24


@dataclass
class FileFindings:
    """What was found about one file. `problems` make it unsound, `notes` are worth saying."""

    path: Path
    num_bytes: int = 0
    num_tensors: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_weights(path: Path, *, is_finite_checked: bool = True) -> tuple[FileFindings, dict[str, TensorEntry]]:
    """Check one safetensors file: head, size, and that every value is finite; and its tensors by name.

    Values are read in blocks of at most 2^24, so the largest tensor does not matter.
    """
    findings = FileFindings(path)
    try:
        findings.num_bytes = path.stat().st_size
        header = read_header(path)
    except OSError as problem:
        findings.problems.append(problem.strerror or "cannot be read")
        return findings, {}
    except UserError as problem:
        findings.problems.append(problem.what)
        return findings, {}
    findings.num_tensors = len(header.entries)
    if header.file_bytes != findings.num_bytes:
        what = "truncated to" if findings.num_bytes < header.file_bytes else "grown to"
        findings.problems.append(f"{what} {findings.num_bytes:,} of {header.file_bytes:,} bytes")
        return findings, header.entries
    for name, entry in header.entries.items():
        item_bytes = ITEM_BYTES.get(entry.dtype)
        if item_bytes is not None and math.prod(entry.shape) * item_bytes != entry.end - entry.start:
            findings.problems.append(f"tensor {name}: {entry.end - entry.start} bytes for shape {list(entry.shape)}")
    if is_finite_checked and not findings.problems:
        findings.problems += not_finite(path, header.entries)
    return findings, header.entries


def not_finite(path: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    """One line for each tensor that holds NaN or infinity, with how many."""
    # Imported here: sizes, names and the index are checked without torch.
    from safetensors import SafetensorError, safe_open

    from zhibei.store.shards import DTYPES

    problems = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for name, entry in entries.items():
                dtype = DTYPES.get(entry.dtype)
                if dtype is None or not dtype.is_floating_point:
                    continue
                num_nan, num_infinite = _count_not_finite(file.get_tensor(name))
                if num_nan or num_infinite:
                    size = math.prod(entry.shape)
                    problems.append(f"tensor {name}: {num_nan:,} NaN and {num_infinite:,} infinite of {size:,} values")
    except (SafetensorError, OSError) as problem:
        problems.append(f"cannot be read: {problem}")
    return problems


def _count_not_finite(tensor: torch.Tensor) -> tuple[int, int]:
    import torch

    num_nan = num_infinite = 0
    for block in tensor.reshape(-1).split(CHUNK_ITEMS):
        if block.dtype.itemsize == 1:  # float8 has few operations of its own
            block = block.to(torch.float32)
        if not bool(torch.isfinite(block).all()):
            num_nan += int(torch.isnan(block).sum())
            num_infinite += int(torch.isinf(block).sum())
    return num_nan, num_infinite


@dataclass
class WeightsFindings:
    """All weight files of a folder with one stem, and their tensors together."""

    files: list[FileFindings]
    entries: dict[str, TensorEntry]


def inspect_weight_files(folder: Path, *, stem: str, is_finite_checked: bool = True) -> WeightsFindings:
    """Check `<stem>.safetensors`, or its shards against their index: every tensor once, where the index says.

    Without `is_finite_checked` only heads, sizes and the index are read, and torch is not imported.
    """
    index_path = folder / f"{stem}.safetensors.index.json"
    paths = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])
    files: list[FileFindings] = []
    holders: dict[str, str] = {}
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        findings, found = inspect_weights(path, is_finite_checked=is_finite_checked)
        for name in found:
            if name in holders:
                findings.problems.append(f"tensor {name} is also in {holders[name]}")
            holders[name] = path.name
        entries.update(found)
        files.append(findings)
    if index_path.is_file():
        files.append(_against_index(index_path, holders, {path.name for path in paths}))
    elif len(paths) > 1:
        missing = FileFindings(index_path, problems=[f"missing, although there are {len(paths)} files of weights"])
        files.append(missing)
    return WeightsFindings(files, entries)


def _against_index(index_path: Path, holders: Mapping[str, str], present: set[str]) -> FileFindings:
    findings = FileFindings(index_path, num_bytes=index_path.stat().st_size)
    try:
        weight_map: dict[str, str] = dict(read_json(index_path)["weight_map"])
    except UserError as problem:
        findings.problems.append(problem.what)
        return findings
    except (KeyError, TypeError, ValueError):
        findings.problems.append("no weight_map in it")
        return findings
    findings.num_tensors = len(weight_map)
    for file_name in sorted(set(weight_map.values()) - present):
        num_lost = Counter(weight_map.values())[file_name]
        findings.problems.append(f"names {file_name}, which is missing ({num_lost:,} tensors)")
    for file_name in sorted(present - set(weight_map.values())):
        findings.problems.append(f"does not name {file_name}, which is here: files of two saves were mixed")
    wrong = [
        f"tensor {name} should be in {file_name} and is {'in ' + holders[name] if name in holders else 'nowhere'}"
        for name, file_name in weight_map.items()
        if file_name in present and holders.get(name) != file_name
    ]
    unknown = [f"tensor {name} in {holders[name]} is not in the index" for name in holders if name not in weight_map]
    findings.problems += _first([*wrong, *unknown])
    return findings


def _first(lines: list[str], *, most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more such tensors"]


def inspect_json(path: Path) -> tuple[FileFindings, Any]:
    """Check that a file is JSON; its content, or None."""
    findings = FileFindings(path)
    try:
        findings.num_bytes = path.stat().st_size
        return findings, json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        findings.problems.append("missing")
    except (OSError, ValueError) as problem:
        findings.problems.append(f"not readable JSON: {problem}")
    return findings, None
