"""Weight differences as Alpaca and Vicuna were published: tuned minus base, and the way back. Knows folders of tensors.

Both ways are one addition per value, rounded once to the type of the file, as FastChat's make_delta and apply_delta
compute it. Where the tuned model has more rows of tokens, the base's new rows are zeros (Vicuna) or the mean of its
rows in fp32 (Stanford Alpaca).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.export.merge import asked_dtype, require_plain, with_dtype
from zhibei.store.files import read_json, require_space, write_json_atomic
from zhibei.store.shards import DTYPES, LazyTensor, TensorFolder, num_bytes, read_tensors, save_tensors
from zhibei.store.tensor_names import EMBEDDING, HEAD

NEW_ROWS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "zeros": lambda base_VD, num_new: base_VD.new_zeros(num_new, base_VD.shape[1]),
    "mean": lambda base_VD, num_new: base_VD.mean(dim=0, keepdim=True).expand(num_new, -1),
}
Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Difference:
    """What adding the difference back gives. `num_off` of its values are not those of the tuned model, because the
    difference was rounded; `largest` is by how much at most."""

    recovered_sha256: str
    recovered_dtype: str
    num_values: int
    num_off: int
    largest: float


def make_difference(
    tuned: Path,
    base: Path,
    folder: Path,
    *,
    dtype: str = "as-base",
    new_rows: str = "zeros",
    progress: Progress = lambda done, total: None,
) -> Difference:
    """Write tuned minus base into an existing folder (weights and config.json), and say what adding it back gives.

    `dtype` fp32 keeps more bits than the models have. Raises UserError when the two are not of one shape.
    """
    mine, theirs = _both(tuned, base, new_rows)
    wanted = asked_dtype(dtype)
    types = {name: wanted or DTYPES[mine.spec(name).dtype] for name in mine}

    def minus(name: str) -> torch.Tensor:
        below = _fitting(theirs, name, mine.spec(name).shape, new_rows)
        return (mine.read_unmapped(name).float() - below).to(types[name])

    tensors = {name: LazyTensor(types[name], mine.spec(name).shape, partial(minus, name)) for name in mine}
    _save(folder, tensors, progress)
    config = read_json(tuned / "config.json")
    write_json_atomic(folder / "config.json", config if wanted is None else with_dtype(config, _word(wanted)))
    written, sha256 = read_tensors(folder, stem="model"), hashlib.sha256()
    result = _main([DTYPES[mine.spec(name).dtype] for name in mine])
    num_values, num_off, largest = 0, 0, 0.0
    for name in sorted(mine):
        original = mine.read_unmapped(name)
        again = _sum(written, theirs, name, dtype=result, new_rows=new_rows)
        _add_to(sha256, name, again)
        off = (again.float() - original.float()).abs()
        num_values, num_off = num_values + off.numel(), num_off + int(torch.count_nonzero(off))
        largest = max(largest, float(off.max()) if off.numel() else 0.0)
    return Difference(sha256.hexdigest(), _word(result), num_values, num_off, largest)


def apply_difference(
    difference: Path,
    base: Path,
    folder: Path,
    *,
    dtype: str = "as-base",
    new_rows: str = "zeros",
    progress: Progress = lambda done, total: None,
) -> str:
    """Write base plus difference into an existing folder; the SHA-256 of all its tensors.

    `dtype` as-base is the base's type. Raises UserError when the two do not fit; `require_recovered` says whether the
    result is the one that `make_difference` noted.
    """
    mine, theirs = _both(difference, base, new_rows)
    wanted = asked_dtype(dtype)
    types = {name: wanted or DTYPES[theirs.spec(name).dtype] for name in mine}

    def plus(name: str) -> torch.Tensor:
        return _sum(mine, theirs, name, dtype=types[name], new_rows=new_rows)

    tensors = {name: LazyTensor(types[name], mine.spec(name).shape, partial(plus, name)) for name in mine}
    _save(folder, tensors, progress)
    config = read_json(difference / "config.json")
    write_json_atomic(folder / "config.json", with_dtype(config, _word(_main(list(types.values())))))
    return tensors_sha256(read_tensors(folder, stem="model"))


def require_recovered(sha256: str, expected_sha256: str, *, where: str) -> None:
    """Raises UserError when base plus difference is not what its maker noted: the base is then another one."""
    if sha256 != expected_sha256:
        raise UserError(
            f"base plus difference has SHA-256 {sha256[:16]}..., and {expected_sha256[:16]}... is expected",
            expected="the base that the difference was taken from",
            fix="name the very same weights with --base, in the same type (16 bits converted to 32 are others)",
            where=where,
        )


def tensors_sha256(tensors: TensorFolder) -> str:
    """SHA-256 over name, type, shape and values of all tensors, in order of name: not of how files are cut."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        _add_to(sha256, name, tensors.read_unmapped(name))
    return sha256.hexdigest()


def _add_to(sha256: Any, name: str, values: torch.Tensor) -> None:
    sha256.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
    sha256.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _both(mine: Path, base: Path, new_rows: str) -> tuple[TensorFolder, TensorFolder]:
    if new_rows not in NEW_ROWS:
        raise UserError(
            f"there is no way {new_rows} to fill new rows",
            expected=f"one of {', '.join(NEW_ROWS)}",
            fix="leave it out",
            where="--new-rows",
        )
    for folder in (mine, base):
        require_plain(read_json(folder / "config.json"), folder)
    return _matching(read_tensors(mine, stem="model"), read_tensors(base, stem="model"), where=str(mine))


def _matching(mine: TensorFolder, theirs: TensorFolder, *, where: str) -> tuple[TensorFolder, TensorFolder]:
    problems = [f"tensor {name} is in one of the two only" for name in sorted(set(mine) ^ set(theirs))]
    for name in sorted(set(mine) & set(theirs)):
        a, b = mine.spec(name).shape, theirs.spec(name).shape
        longer = bool(EMBEDDING.search(name) or HEAD.search(name)) and a[1:] == b[1:] and a[0] > b[0]
        if a != b and not longer:
            problems.append(f"tensor {name} has shape {list(a)}, in the base {list(b)}")
    if problems:
        raise UserError(
            problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            expected="a model and the base it was tuned from",
            fix="name the right base with --base",
            where=where,
        )
    return mine, theirs


def _fitting(theirs: TensorFolder, name: str, shape: Sequence[int], new_rows: str) -> torch.Tensor:
    """The base's tensor in fp32, with new rows where the other has more."""
    below = theirs.read_unmapped(name).float()
    more = shape[0] - below.shape[0] if below.ndim else 0
    return torch.cat([below, NEW_ROWS[new_rows](below, more)]) if more else below


def _sum(mine: TensorFolder, theirs: TensorFolder, name: str, *, dtype: torch.dtype, new_rows: str) -> torch.Tensor:
    return (mine.read_unmapped(name).float() + _fitting(theirs, name, mine.spec(name).shape, new_rows)).to(dtype)


def _save(folder: Path, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    total, done = sum(map(num_bytes, tensors.values())), [0]
    require_space(folder, needed_bytes=total, purpose="the weights")

    def telling(tensor: LazyTensor) -> torch.Tensor:
        done[0] += num_bytes(tensor)
        progress(done[0], total)
        return tensor.read()

    save_tensors(
        folder,
        {name: LazyTensor(one.dtype, one.shape, partial(telling, one)) for name, one in tensors.items()},
        stem="model",
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _main(types: list[torch.dtype]) -> torch.dtype:
    """The type that most tensors have."""
    return max(set(types), key=lambda one: (types.count(one), str(one)))
