"""Tensors that ranks hold in parts, for files: each rank's share of a checkpoint, the rows of it that a rank reads, and
whole ones (for models that others load), gathered one at a time.

Knows parts and files, not what a tensor means. Values pass through host memory; no GPU memory is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from zhibei.config.errors import UserError
from zhibei.model.ranks import Ranks, own_part
from zhibei.model.sharding import rows_held
from zhibei.store.parts import Part, StoredTensors
from zhibei.store.shards import LazyTensor, Writable


def as_whole(
    tensors: Mapping[str, torch.Tensor], divided: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, Writable]:
    """The same names with whole tensors, put together when their turn comes (on rank 0; every rank must take part).

    `divided` are the parameters of the model: a tensor `NAME` or `NAME::KIND` (optimiser state) of the shape of this
    rank's part belongs to the parameter of that name. `dtype` is what divided floating tensors are written in.
    """
    found: dict[str, Writable] = {}
    for key, tensor in tensors.items():
        like = divided.get(key.split("::")[0])
        part = own_part(tensor)
        if isinstance(like, DTensor) and part.ndim and part.shape == own_part(like).shape:
            kind = part.dtype if dtype is None or not part.dtype.is_floating_point else dtype
            found[key] = LazyTensor(kind, tuple(like.shape), functools.partial(gather, part, like, kind))
        else:
            found[key] = tensor
    return found


def gather(part: torch.Tensor, like: DTensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole tensor on the first rank of each row of the mesh; the others get an empty one."""
    mesh = like.device_mesh
    group, size = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    longest = -(-like.shape[0] // size)
    own = part.detach().to("cpu", dtype)
    padded = torch.zeros(longest, *own.shape[1:], dtype=dtype)
    padded[: len(own)] = own
    is_first = dist.get_rank(group) == 0
    held = [torch.empty_like(padded) for _ in range(size)] if is_first else None
    dist.gather(padded, held, group=group, group_dst=0)
    return torch.cat(held)[: like.shape[0]] if held is not None else torch.empty(0, dtype=dtype)


def share_of(
    tensors: Mapping[str, torch.Tensor], divided: Mapping[str, torch.Tensor], ranks: Ranks
) -> dict[str, Writable | Part]:
    """What this rank writes of tensors that all ranks write together; names as for `as_whole`.

    Of a divided tensor each rank writes its rows, or where there are copies of them (hybrid) the first that has them.
    What every rank holds whole is written by rank 0.
    """
    found: dict[str, Writable | Part] = {}
    for key, tensor in tensors.items():
        like = divided.get(key.split("::")[0])
        part = own_part(tensor)
        if isinstance(like, DTensor) and part.ndim and part.shape == own_part(like).shape:
            start, stop = rows_held(like)
            if start < stop and holds_first_copy(like):
                found[key] = Part(part, start, like.shape[0])
        elif ranks.is_first:
            found[key] = tensor
    return found


def holds_first_copy(divided: DTensor) -> bool:
    """Whether this rank is in the first row of the mesh; the other rows hold the same parts once more."""
    mesh = divided.device_mesh
    return mesh.ndim == 1 or mesh.get_local_rank(0) == 0


class OwnParts(Mapping[str, torch.Tensor]):
    """Of tensors in files, what this rank holds; nothing else of them is read. Names as for `as_whole`."""

    def __init__(self, stored: StoredTensors, divided: Mapping[str, torch.Tensor]) -> None:
        self._stored, self._divided = stored, divided

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        like = self._divided.get(name.split("::")[0])
        if isinstance(like, DTensor) and like.ndim and self._stored.shape(name) == tuple(like.shape):
            return self._stored.rows(name, *rows_held(like))
        return self._stored[name]


def written_by_first(
    ranks: Ranks, tensors: Mapping[str, Writable], write: Callable[[Mapping[str, Writable]], Any]
) -> Any:
    """What `write` gives on rank 0 (what JSON can hold). It may ask for the tensors in any order; the others give their
    parts of each. Raises on every rank what was raised there."""
    if not ranks.are_several:
        return write(tensors)
    names = list(tensors)
    problem: UserError | None = None
    found: Any = None
    if ranks.is_first:
        try:
            found = write({name: _announced(ranks, number, tensors[name]) for number, name in enumerate(names)})
        except UserError as error:
            problem = error
        finally:
            ranks.from_first(-1)
    else:
        while (number := ranks.from_first(None)) >= 0:
            tensor = tensors[names[number]]
            if isinstance(tensor, LazyTensor):
                tensor.read()

    def answer() -> Any:
        if problem is not None:
            raise problem
        return found

    return ranks.first_does(answer)


def _announced(ranks: Ranks, number: int, tensor: Writable) -> Writable:
    """The same tensor, which tells the others that it is being read."""
    if not isinstance(tensor, LazyTensor):
        return tensor

    def read() -> torch.Tensor:
        ranks.from_first(number)
        return tensor.read()

    return LazyTensor(tensor.dtype, tensor.shape, read)
