"""Meta's consolidated.*.pth and params.json, written from and made into Hugging Face folders. Knows files, not runs.

A .pth file is a pickle. It is read with torch's `weights_only` reader, which builds tensors and plain containers and
refuses everything else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.export.meta_form import (
    NO_PARAMETER,
    SHARD_COUNTS,
    Sizes,
    config_of,
    names_of,
    params_of,
    refusal,
    rope_note,
    sizes_of_config,
    to_halves,
    to_pairs,
    turned_heads,
)
from zhibei.store.files import read_json, require_space, write_json_atomic
from zhibei.store.shards import LazyTensor, TensorFolder, num_bytes, read_tensors, save_tensors
from zhibei.store.tensor_names import head_name

Progress = Callable[[int, int], Any]


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder holds weights in Meta's form."""
    return (folder / "params.json").is_file() and bool(list(folder.glob("consolidated.*.pth")))


def write_meta(
    source: Path, folder: Path, *, num_shards: int = 1, progress: Progress = lambda done, total: None
) -> tuple[str, ...]:
    """Write a whole Hugging Face LLaMA in Meta's form into an existing folder, read it back, and compare every bit.

    Host memory: a few matrices; those of one file wait in temporary files beside it, as torch writes a file from all of
    its tensors at once. Returns notes for a person. Raises UserError for models that have no such form, and when what
    was written does not read back the same.
    """
    config = read_json(source / "config.json")
    why = refusal(config, num_shards) if num_shards in SHARD_COUNTS else f"{num_shards} files"
    if why:
        raise UserError(
            f"no Meta form: {why}",
            expected=f"a LLaMA without biases, in {', '.join(map(str, SHARD_COUNTS))} files that divide it evenly",
            fix="write it in one file (--shards 1), or hand it over as hf or gguf",
            where=str(source / "config.json"),
        )
    sizes, tensors = sizes_of_config(config), read_tensors(source, stem="model")
    _require_names(tensors, sizes, is_tied=head_name(tensors) is None)
    total = sum(entry.end - entry.start for entry in map(tensors.spec, tensors))
    require_space(folder, needed_bytes=total + total // num_shards, purpose="Meta's files and one file's matrices")
    for rank in range(num_shards):
        with TemporaryDirectory(prefix=".matrices-", dir=folder) as waiting:
            parts = _shard(tensors, sizes, rank=rank, num_shards=num_shards)
            shard = {theirs: _in_file(part, Path(waiting) / str(n)) for n, (theirs, part) in enumerate(parts)}
            torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
            del shard
        progress(rank + 1, num_shards)
    write_json_atomic(folder / "params.json", params_of(config))
    _require_same(tensors, folder, sizes)
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        return rope_note(config)
    return (
        *rope_note(config),
        "there is no tokenizer.model beside the weights, and Meta's programs read no tokenizer.json",
    )


def _require_names(tensors: TensorFolder, sizes: Sizes, *, is_tied: bool) -> None:
    wanted = set(names_of(sizes)) - ({"lm_head.weight"} if is_tied else set())
    odd = sorted((wanted ^ set(tensors)) - {name for name in tensors if NO_PARAMETER.search(name)})
    if odd:
        what = "is missing" if odd[0] in wanted else "has no place in Meta's form"
        raise UserError(
            f"tensor {odd[0]} {what}",
            expected="the tensors of a LLaMA and no others",
            fix="zhibei verify says what is wrong with the folder; merge adapters first",
            where="model.safetensors",
        )


def _shard(tensors: TensorFolder, sizes: Sizes, *, rank: int, num_shards: int) -> Any:
    """(Meta's name, this file's part of the matrix), one after the other."""
    for ours, (theirs, dim) in names_of(sizes).items():
        values = tensors.read_unmapped(ours if ours in tensors else "model.embed_tokens.weight")
        if heads := turned_heads(ours, sizes):
            values = to_pairs(values, heads)
        yield theirs, values if dim is None else values.chunk(num_shards, dim)[rank]


def _in_file(values: torch.Tensor, place: Path) -> torch.Tensor:
    """The same values in a mapped file, so that the system can take their memory back."""
    mapped = torch.from_file(str(place), shared=True, size=values.numel(), dtype=values.dtype)
    return mapped.view(values.shape).copy_(values)


def _require_same(tensors: TensorFolder, folder: Path, sizes: Sizes) -> None:
    """Read what was written and compare every tensor bit for bit."""
    read = MetaTensors(folder, sizes)
    for ours in tensors:
        if not NO_PARAMETER.search(ours) and not _are_same(read.whole(ours), tensors.read_unmapped(ours)):
            raise _differs(ours, folder)


def _are_same(written: torch.Tensor, meant: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    return written.dtype == meant.dtype and torch.equal(
        written.contiguous().view(torch.uint8), meant.contiguous().view(torch.uint8)
    )


def _differs(name: str, folder: Path) -> UserError:
    return UserError(
        f"{name} does not read back as it was written",
        expected="every matrix equal bit for bit",
        fix="write it again, on another disk if there is one (zhibei doctor tries this one); the model it was made of "
        "is untouched. If it fails again, it is a fault of zhibei: please report it",
        where=str(folder),
    )


class MetaTensors:
    """The matrices of a Meta folder under transformers' names, put together from all files, one when asked for."""

    def __init__(self, folder: Path, sizes: Sizes | None = None) -> None:
        files = sorted(folder.glob("consolidated.*.pth"))
        if len(files) not in SHARD_COUNTS or [path.name for path in files] != [
            f"consolidated.{rank:02d}.pth" for rank in range(len(files))
        ]:
            raise UserError(
                f"{len(files)} files consolidated.*.pth: {', '.join(path.name for path in files)}",
                expected="consolidated.00.pth and on, 1, 2, 4 or 8 of them",
                fix="copy the missing files",
                where=str(folder),
            )
        self.shards = [_read_pth(path) for path in files]
        self.params = read_json(folder / "params.json")
        self.sizes = sizes or self._sizes(folder)
        self.names = names_of(self.sizes)

    def _sizes(self, folder: Path) -> Sizes:
        try:
            heads = int(self.params["n_heads"])
            first = self.shards[0]
            embedding, width = first["tok_embeddings.weight"].shape, int(self.params["dim"])
            by_vocabulary = embedding[1] == width and len(self.shards) > 1
            vocabulary = embedding[0] * (len(self.shards) if by_vocabulary else 1)
            mlp = first["layers.0.feed_forward.w1.weight"].shape[0] * len(self.shards)
            return Sizes(
                width, int(self.params["n_layers"]), heads, int(self.params.get("n_kv_heads") or heads), mlp, vocabulary
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise UserError(
                f"not a LLaMA in Meta's form: {problem!r}",
                expected="params.json with dim, n_layers, n_heads, and matrices of the released names",
                fix="copy params.json and the files of one model into one folder",
                where=str(folder),
            ) from problem

    def whole(self, ours: str) -> torch.Tensor:
        """One matrix in transformers' form. Raises UserError when a file lacks it or has another shape."""
        theirs, dim = self.names[ours]
        try:
            parts = [shard[theirs] for shard in self.shards]
            if ours == "model.embed_tokens.weight" and len(parts) > 1:
                dim = 0 if parts[0].shape[1] == self.sizes.width else 1
            values = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
            heads = turned_heads(ours, self.sizes)
            return to_halves(values, heads) if heads else values
        except (KeyError, RuntimeError) as problem:
            raise UserError(
                f"{theirs} is missing or of another shape: {problem}",
                expected="files of one model, all of them",
                fix="copy the files again",
                where="consolidated.*.pth",
            ) from problem

    def shape(self, ours: str) -> tuple[int, ...]:
        """Of the whole matrix, from the heads of the files."""
        theirs, dim = self.names[ours]
        first = self.shards[0].get(theirs)
        if first is None:
            return tuple(self.whole(ours).shape)  # raises with the name
        if ours == "model.embed_tokens.weight":
            return self.sizes.vocabulary, self.sizes.width
        return tuple(size * len(self.shards) if place == dim else size for place, size in enumerate(first.shape))

    def dtype(self, ours: str) -> torch.dtype:
        return self.shards[0][self.names[ours][0]].dtype


def _read_pth(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as problem:  # torch raises UnpicklingError, RuntimeError, EOFError and others
        raise UserError(
            f"cannot be read as plain tensors: {str(problem).strip().splitlines()[0]}",
            expected="a .pth file that holds tensors and nothing else",
            fix="copy the file again; a file that holds program code is never opened",
            where=str(path),
        ) from problem
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(
            "holds something else than named tensors",
            expected="the weights of a model",
            fix="name the folder with consolidated.00.pth of the model itself",
            where=str(path),
        )
    return found


def read_meta(folder: Path, out: Path, *, progress: Progress = lambda done, total: None) -> tuple[str, ...]:
    """Write a Meta folder's model as config.json and safetensors into an existing folder; returns notes.

    The files are mapped, and matrices put together one at a time. Raises UserError for what is no LLaMA in Meta's form.
    """
    meta = MetaTensors(folder)
    names = list(meta.names)
    known = {theirs for theirs, _ in meta.names.values()}
    strange = [name for name in meta.shards[0] if name not in known and not NO_PARAMETER.search(name)]
    if strange:
        raise UserError(
            f"{strange[0]} has no place in a LLaMA of {meta.sizes.num_layers} layers",
            expected="the matrices of a LLaMA and no others",
            fix="check that params.json belongs to these files",
            where=str(folder),
        )
    is_tied = meta.shape("lm_head.weight") == meta.shape("model.embed_tokens.weight") and torch.equal(
        meta.whole("lm_head.weight"), meta.whole("model.embed_tokens.weight")
    )
    if is_tied:
        names.remove("lm_head.weight")
    tensors = {
        name: LazyTensor(shape=meta.shape(name), dtype=meta.dtype(name), read=partial(meta.whole, name))
        for name in names
    }
    total = sum(map(num_bytes, tensors.values()))
    require_space(out, needed_bytes=total, purpose="the converted model")
    done = [0]

    def telling(tensor: LazyTensor) -> torch.Tensor:
        done[0] += num_bytes(tensor)
        progress(done[0], total)
        return tensor.read()

    counted = {name: LazyTensor(one.dtype, one.shape, partial(telling, one)) for name, one in tensors.items()}
    save_tensors(out, counted, stem="model")
    config, note = config_of(meta.params, vocabulary=meta.sizes.vocabulary, mlp=meta.sizes.mlp_width, is_tied=is_tied)
    dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    write_json_atomic(out / "config.json", {**config, "dtype": dtype})
    return (note,)


def same_as_meta(meta_folder: Path, folder: Path) -> int:
    """Compare a converted folder with Meta's files bit for bit; the number of matrices. Raises UserError when one is
    not the same."""
    meta, tensors = MetaTensors(meta_folder), read_tensors(folder, stem="model")
    for name in tensors:
        if not _are_same(meta.whole(name), tensors.read_unmapped(name)):
            raise _differs(name, folder)
    return len(tensors)
