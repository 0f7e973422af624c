"""Adapters and their base become one whole model, tensor by tensor. Knows folders and shapes; needs no GPU.

Host memory: one tensor of the base, its merged copy and some rows in fp32; never a model, never a whole file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.export.adapters import Adapter, Change, Replacement, changed, finite, mixed_changes
from zhibei.export.sources import MergeSource
from zhibei.store.files import read_json, require_space, write_json_atomic
from zhibei.store.shards import DTYPES, LazyTensor, TensorFolder, num_bytes, read_tensors, save_tensors
from zhibei.store.tensor_names import HEAD, embedding_name, head_name

ASKED_DTYPES = {"as-base": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 4 * 10**9
Changes = dict[str, list[tuple[Adapter, Change]]]


@dataclass(frozen=True)
class Merged:
    """What merging wrote. `dtype` is that of most bytes; `num_changed` of `num_tensors` differ from the base."""

    num_tensors: int
    num_changed: int
    num_bytes: int
    dtype: str
    seconds: float
    notes: tuple[str, ...] = ()


def merge_weights(
    source: MergeSource,
    folder: Path,
    *,
    dtype: str = "as-base",
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Merged:
    """Write `config.json` and the merged weights into an existing folder.

    Each value is computed in fp32 and rounded once. Raises UserError for a quantised base, an adapter that does not fit
    it, values beyond the asked type, and a disk that is too full.
    """
    start = time.monotonic()
    wanted = asked_dtype(dtype)
    config = read_json(source.base / "config.json")
    require_plain(config, source.base)
    base, changes = read_tensors(source.base, stem="model"), mixed_changes(list(source.adapters))
    num_changed = len(changes)
    plan = plan_merge(base, config, changes, dtype=wanted, is_tied=tie_of(source.base, config))
    total = sum(num_bytes(tensor) for tensor in plan.tensors.values())
    require_space(folder, needed_bytes=total, purpose="the merged model")
    save_tensors(folder, counted(plan.tensors, progress), stem="model", max_shard_bytes=max_shard_bytes)
    main = main_dtype(plan.tensors.values())
    write_json_atomic(folder / "config.json", with_dtype(plan.config, main))
    return Merged(len(plan.tensors), num_changed, total, main, time.monotonic() - start, plan.notes)


@dataclass(frozen=True)
class MergePlan:
    """The tensors to be written, each computed when its turn comes, and the config that fits them."""

    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    notes: tuple[str, ...]


def plan_merge(
    base: TensorFolder, config: Mapping[str, Any], changes: Changes, *, dtype: torch.dtype | None, is_tied: bool
) -> MergePlan:
    """Which tensor is computed from what. Only heads of files are read, and what was trained in full.

    Where embedding and head of the base are one tensor and an adapter changes one of them only, they become two: that
    is what base and adapter compute beside one another.
    """
    embedding, head = embedding_name(base) or "", head_name(base) or ""
    origins = {name: name for name in base if name not in base.tied}
    notes: tuple[str, ...] = ()
    if is_tied:
        origins.pop(head, None)
        asked_head = next((name for name in changes if HEAD.search(name) and ".layers." not in name), "")
        if _stays_tied(base, changes, embedding, asked_head):
            changes = {name: found for name, found in changes.items() if name != asked_head}
        else:
            head, is_tied = asked_head or head or "lm_head.weight", False
            origins[head] = embedding
            notes = (f"{embedding} and {head}, one tensor in the base, are two now: the adapter changed one of them",)
    if strangers := [name for name in changes if name not in origins]:
        raise _stranger(strangers[0], changes[strangers[0]][0][0])
    tensors = {name: _output(base, origin, name, changes.get(name, []), dtype) for name, origin in origins.items()}
    ends = [tensors[name] for name in (embedding, "" if is_tied else head) if name in tensors]
    return MergePlan(tensors, _fitting_config(config, ends, is_tied=is_tied), notes)


def _stays_tied(base: TensorFolder, changes: Changes, embedding: str, head: str) -> bool:
    mine, theirs = changes.get(embedding, []), changes.get(head, [])
    if not mine and not theirs:
        return True
    if mine and any(adapter.config.get("ensure_weight_tying") for adapter, _ in mine):
        return True
    own, other = _whole_tensor(mine), _whole_tensor(theirs)
    if own is not None and other is not None:
        return own.shape == other.shape and torch.equal(own, other)
    # New tokens make embedding and head longer together.
    return own is not None and not theirs and own.shape[0] != base.spec(embedding).shape[0]


def _whole_tensor(found: list[tuple[Adapter, Change]]) -> torch.Tensor | None:
    for adapter, change in found:
        if isinstance(change, Replacement):
            return adapter.tensors.read_unmapped(change.tensor)
    return None


def _stranger(name: str, adapter: Adapter) -> UserError:
    return UserError(
        f"the adapter changes {name}, which the base does not have",
        expected="the base that the adapter was trained on",
        fix="name that base with --base",
        where=str(adapter.folder),
        pitfall="adapter-on-wrong-base",
    )


def _output(
    base: TensorFolder, origin: str, name: str, changes: list[tuple[Adapter, Change]], asked: torch.dtype | None
) -> LazyTensor:
    entry = base.spec(origin)
    stored = DTYPES[entry.dtype]
    is_plain = stored.is_floating_point and stored.itemsize > 1
    if changes and not is_plain:
        raise UserError(
            f"{origin} of the base is stored as {entry.dtype}",
            expected="weights in 16 or 32 bits",
            fix="name the 16-bit weights of the same model with --base",
            where=str(changes[0][0].folder),
            pitfall="qlora-on-gptq-awq-cannot-merge",
        )
    dtype = asked if asked is not None and is_plain else stored
    shape = entry.shape
    for adapter, change in changes:
        if isinstance(change, Replacement):
            shape = adapter.tensors.spec(change.tensor).shape

    def read() -> torch.Tensor:
        values = base.read_unmapped(origin)
        if changes:
            return changed(values, changes, dtype=dtype, name=name)
        return finite(values.to(dtype), name) if dtype != stored else values

    return LazyTensor(dtype, tuple(shape), read)


def _fitting_config(config: Mapping[str, Any], ends: list[LazyTensor], *, is_tied: bool) -> dict[str, Any]:
    """config.json with the number of rows that embedding and head have now, and whether they are one tensor."""
    rows = {tensor.shape[0] for tensor in ends}
    if len(rows) > 1:
        raise UserError(
            f"embedding and head would have {' and '.join(f'{count:,}' for count in sorted(rows))} rows",
            expected="one row for each token in both",
            fix="the adapter was trained with new tokens and saved one of the two only: train it again with both",
            where="vocab_size",
        )
    inner = dict(config["text_config"]) if isinstance(config.get("text_config"), dict) else dict(config)
    if rows:
        inner["vocab_size"] = max(rows)
    changed_config = {**config, "text_config": inner} if isinstance(config.get("text_config"), dict) else inner
    if not is_tied:
        changed_config["tie_word_embeddings"] = False
        if "text_config" in changed_config:
            inner["tie_word_embeddings"] = False
    return changed_config


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json that names the type of the weights, under the key it uses already."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def main_dtype(tensors: Iterable[LazyTensor]) -> str:
    """The type of most bytes, as torch spells it."""
    count: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        count[name] = count.get(name, 0) + num_bytes(tensor)
    return max(count, key=lambda name: count[name])


def counted(tensors: Mapping[str, LazyTensor], progress: Callable[[int, int], Any]) -> dict[str, LazyTensor]:
    """The same tensors; `progress` hears of (bytes made so far, bytes of all)."""
    total, done = sum(num_bytes(tensor) for tensor in tensors.values()), [0]

    def telling(tensor: LazyTensor) -> torch.Tensor:
        values = tensor.read()
        done[0] += num_bytes(tensor)
        progress(done[0], total)
        return values

    return {name: replace(tensor, read=partial(telling, tensor)) for name, tensor in tensors.items()}


def asked_dtype(name: str) -> torch.dtype | None:
    """None is the type that the base has. Raises UserError for a name that is none."""
    if name not in ASKED_DTYPES:
        raise UserError(
            f"there is no type {name}",
            expected=f"one of {', '.join(ASKED_DTYPES)}",
            fix="leave it out: as-base",
            where="--dtype",
        )
    return ASKED_DTYPES[name]


def require_plain(config: Mapping[str, Any], base: Path) -> None:
    """Raises UserError for a base that is stored quantised."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
        raise UserError(
            f"the base is stored quantised ({method or 'quantization_config'}): nothing can be merged into it exactly",
            expected="the 16-bit weights of the same model",
            fix="name them with --base PATH",
            where=str(base / "config.json"),
            pitfall="qlora-on-gptq-awq-cannot-merge",
        )


def tie_of(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the family makes embedding and head one tensor; what config.json leaves out, the family's class knows."""
    text = config.get("text_config")
    for place in (text if isinstance(text, dict) else {}, config):
        if "tie_word_embeddings" in place:
            return bool(place["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(str(folder), local_files_only=True).tie_word_embeddings)
    except (OSError, ValueError, KeyError, AttributeError):
        return head_name(read_tensors(folder, stem="model")) is None
