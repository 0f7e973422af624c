"""Other forms of a trained model: Meta's files, weight differences, low-rank adapters, and the ways back.

Each form is proved on its new folder before that gets its name: Meta's files and differences by reading them back and
comparing values, models by logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zhibei.config.errors import UserError
from zhibei.export.difference import apply_difference, make_difference, require_recovered
from zhibei.export.extraction import extract_adapter
from zhibei.export.hand_over import (
    HandedOver,
    Proving,
    default_export,
    export_hf,
    folder_side,
    prove,
    reference_of,
)
from zhibei.export.hub_folder import MADE_FROM, TOKENIZER, complete_folder, name_of, new_folder, write_merged
from zhibei.export.meta_weights import is_meta_folder, read_meta, same_as_meta, write_meta
from zhibei.export.probes import TEXTS
from zhibei.export.proof import note_hand_over
from zhibei.export.sources import find_merge, local_folder
from zhibei.model.device import choose_device
from zhibei.model.locate import Located, locate
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.manifest import model_fingerprint, read_manifest, recorded
from zhibei.text.tokenizer import load_tokenizer

DTYPE_WORDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Wanted:
    """What a person asked of an export; a setting that a form does not use is refused by `zhibei export`."""

    base: str | None = None
    out: Path | None = None
    dtype: str = "as-base"
    shards: int = 1
    rank: int = 16
    new_rows: str = "zeros"
    proving: Proving = field(default_factory=Proving)


@contextmanager
def whole_weights(path: str, wanted: Wanted) -> Iterator[tuple[Path, Located]]:
    """The folder of whole weights behind a path; an adapter is merged into a temporary one beside its destination."""
    located = locate(path, base=wanted.base)
    if located.adapter is None:
        yield local_folder(located.weights), located
        return
    source = find_merge([path], base=wanted.base)
    parent = (wanted.out or default_export(located, "whole")).parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merging-", dir=parent) as folder:
        write_merged(source, Path(folder), progress=partial(wanted.proving.progress, "merge"))
        yield Path(folder), located


def to_hf(path: str, wanted: Wanted) -> HandedOver:
    """A complete Hugging Face folder with a model card, of a run, a folder, an adapter or Meta's files."""
    if is_meta_folder(Path(path)):
        return from_meta(path, wanted)
    return export_hf(path, base=wanted.base, out=wanted.out, dtype=wanted.dtype, proving=wanted.proving)


def to_meta(path: str, wanted: Wanted) -> HandedOver:
    """consolidated.*.pth and params.json of a LLaMA, read back and compared bit for bit, with tokenizer.model."""
    located = locate(path, base=wanted.base)
    place = wanted.out or default_export(located, "meta")
    with whole_weights(path, wanted) as (weights, _), new_folder(place, purpose="Meta's files") as folder:
        notes = write_meta(weights, folder, num_shards=wanted.shards, progress=partial(wanted.proving.progress, "meta"))
        proof = "every matrix was read back and is equal bit for bit"
        record = {"what": "meta", "source": name_of(located), "shards": wanted.shards, "proof": proof}
        write_json_atomic(folder / MADE_FROM, record)
    note_hand_over(located.run, "meta", place, None)
    return HandedOver(place, None, None, notes=(proof, *notes))


def from_meta(path: str, wanted: Wanted) -> HandedOver:
    """A Hugging Face folder of Meta's files. A SentencePiece tokenizer.model is converted; LLaMA 3's comes from
    `--base`, a folder with the tokenizer of the same model."""
    source = Path(path)
    place = wanted.out or source.resolve().with_name(f"{source.resolve().name}-hf")
    with new_folder(place, purpose="the converted model") as folder:
        notes = read_meta(source, folder, progress=partial(wanted.proving.progress, "convert"))
        notes = (*notes, *_tokenizer_of_meta(source, folder, wanted.base))
        write_json_atomic(folder / MADE_FROM, {"what": "from meta", "source": source.resolve().name})
        num_equal = same_as_meta(source, folder)
    proof = f"{num_equal} matrices were read back and are equal bit for bit"
    return HandedOver(place, None, None, notes=(proof, *notes))


def _tokenizer_of_meta(source: Path, folder: Path, given: str | None) -> tuple[str, ...]:
    if given:
        place = Path(given)
        for name in TOKENIZER:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
        return ()
    file = next((f for f in (source / "tokenizer.model", source.parent / "tokenizer.model") if f.is_file()), None)
    if file is None:
        return (
            "there is no tokenizer.model beside the weights: this folder has no tokenizer (--base FOLDER gives one)",
        )
    if file.read_bytes()[:1] != b"\n":  # a SentencePiece model begins with its first piece, field 1 of the protobuf
        return (f"{file} is LLaMA 3's list of byte pairs: name a folder with its tokenizer.json with --base FOLDER",)
    from transformers import LlamaTokenizerFast

    shutil.copyfile(file, folder / "tokenizer.model")
    LlamaTokenizerFast.from_pretrained(str(folder), legacy=True).save_pretrained(str(folder))
    return _against_pieces(file, folder)


def _against_pieces(file: Path, folder: Path) -> tuple[str, ...]:
    """Whether the converted tokenizer reads the probe texts as SentencePiece itself does."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return ("the converted tokenizer was not compared: pip install sentencepiece, and export again",)
    pieces, tokenizer = SentencePieceProcessor(model_file=str(file)), load_tokenizer(str(folder))
    plain = [text for text in TEXTS if not any(mark in text for mark in tokenizer.special_strings)]
    odd = [text for text in plain if list(pieces.encode(text)) != tokenizer.encode(text)]
    if not odd:
        return (f"the converted tokenizer reads {len(plain)} probe texts as SentencePiece does",)
    return (
        f"the converted tokenizer reads {len(odd)} of {len(plain)} probe texts unlike SentencePiece, whose model "
        f"rewrites spaces in its own way, e.g. {odd[0]!r}: give a folder with the right tokenizer.json, --base FOLDER",
    )


def to_difference(path: str, wanted: Wanted) -> HandedOver:
    """Tuned minus base, as Alpaca and Vicuna were published, with the SHA-256 of what adding it back gives."""
    located = locate(path, base=wanted.base if _is_adapter(path) else None)
    place = wanted.out or default_export(located, "delta")
    with whole_weights(path, wanted) as (weights, _), new_folder(place, purpose="the weight difference") as folder:
        base = _base_of(located, wanted)
        found = make_difference(
            weights, base, folder, dtype=wanted.dtype, new_rows=wanted.new_rows,
            progress=partial(wanted.proving.progress, "difference"),
        )  # fmt: skip
        complete_folder(folder, located, base=weights)
        fingerprint = {"name": base.name, "fingerprint": model_fingerprint(base)}
        write_json_atomic(
            folder / MADE_FROM, {"what": "delta", "base": fingerprint, "new_rows": wanted.new_rows, **asdict(found)}
        )
    note_hand_over(located.run, "delta", place, None)
    off = (
        f"{found.num_off:,} of {found.num_values:,} values differ from the tuned model, by {found.largest:.3g} at most"
    )
    exact = (
        "gives the tuned model bit for bit" if not found.num_off else f"gives the tuned model but for rounding: {off}"
    )
    return HandedOver(
        place, None, None,
        notes=(
            f"base plus difference {exact}",
            f"whoever has the base makes the model with: zhibei export {place} --to recover --base BASE",
        ),
    )  # fmt: skip


def recover(path: str, wanted: Wanted) -> HandedOver:
    """The whole model of a weight difference and its base, checked by the SHA-256 that the difference carries."""
    difference = Path(path)
    if not (difference / "config.json").is_file() or wanted.base is None:
        raise UserError(
            "a weight difference needs its base" if wanted.base is None else "no config.json here",
            expected="a folder with a weight difference, and --base with the base that it was taken from",
            fix=f"zhibei export {path} --to recover --base PATH",
            where="--base" if wanted.base is None else path,
        )
    noted: dict[str, Any] = read_json(difference / MADE_FROM) if (difference / MADE_FROM).is_file() else {}
    base = local_folder(locate(wanted.base).weights)
    place = wanted.out or difference.resolve().with_name(f"{difference.resolve().name}-recovered")
    dtype = DTYPE_WORDS.get(str(noted.get("recovered_dtype")), "as-base") if wanted.dtype == "as-base" else wanted.dtype
    is_checked = bool(noted.get("recovered_sha256")) and wanted.dtype == "as-base"
    with new_folder(place, purpose="the recovered model") as folder:
        sha256 = apply_difference(
            difference, base, folder, dtype=dtype, new_rows=noted.get("new_rows", wanted.new_rows),
            progress=partial(wanted.proving.progress, "recover"),
        )  # fmt: skip
        if is_checked:
            require_recovered(sha256, str(noted["recovered_sha256"]), where=path)
        complete_folder(folder, Located(str(difference.resolve())), base=difference)
        write_json_atomic(folder / MADE_FROM, {"what": "recover", "base": base.name, "sha256": sha256})
    checked = "equals what its maker noted" if is_checked else "was not noted by its maker: nothing to compare with"
    return HandedOver(place, None, None, notes=(f"SHA-256 of all tensors {sha256} {checked}",))


def to_adapter(path: str, wanted: Wanted) -> HandedOver:
    """A LoRA of rank `--rank` that brings the base closest to a model tuned in full, layer by layer (SVD)."""
    located = locate(path)
    if located.adapter is not None:
        raise UserError(
            f"{path} is an adapter already",
            expected="a model tuned in full",
            fix=f"use its PEFT folder as it is: {located.adapter}; zhibei merge makes a whole model of it",
            where="--to adapter",
        )
    base, weights = _base_of(located, wanted), local_folder(located.weights)
    place = wanted.out or default_export(located, f"adapter-r{wanted.rank}")
    how = wanted.proving
    with new_folder(place, purpose="the adapter") as folder:
        found = extract_adapter(
            weights, base, folder, rank=wanted.rank, device=choose_device(how.device),
            progress=partial(how.progress, "decompose"),
        )  # fmt: skip
        for name in TOKENIZER:
            if (weights / name).is_file() and name != "tokenizer.model":
                shutil.copyfile(weights / name, folder / name)
        write_json_atomic(folder / MADE_FROM, {"what": "adapter", "source": name_of(located), **asdict(found)})
        report = prove(reference_of([path], base=None, proving=how), folder_side(folder, place, how), folder,
                       kind="adapter", proving=how)  # fmt: skip
    note_hand_over(located.run, "adapter", place, report)
    least = min(found.energy, key=lambda name: found.energy[name])
    notes = [
        f"rank {wanted.rank} keeps {found.kept:.1%} of the layers' squared difference on average, least in {least} "
        f"({found.energy[least]:.1%}); every layer is in {MADE_FROM}"
    ]
    if found.left_out:
        notes.append(
            f"{len(found.left_out)} tensors differ and are no linear layers: left out, e.g. {found.left_out[0]}"
        )
    return HandedOver(place, None, report, notes=tuple(notes))


def _is_adapter(path: str) -> bool:
    folder = Path(path)
    return any((place / "adapter_config.json").is_file() for place in (folder, folder / "model"))


def _base_of(located: Located, wanted: Wanted) -> Path:
    """`--base`, else the base that an adapter or a manifest names. Raises UserError when nothing does."""
    named = wanted.base
    if named is None and located.adapter is not None:
        named = located.weights
    if named is None and located.run is not None and located.run.manifest.is_file():
        base = recorded(read_manifest(located.run.path), "base")
        named = None if not isinstance(base, dict) or base.get("adapter") else base.get("path")
    if not named:
        raise UserError(
            "it is not known which base this was tuned from",
            expected="the base's folder",
            fix="add --base PATH",
            where="--base",
        )
    return local_folder(locate(named).weights)


FORMS: dict[str, Callable[[str, Wanted], HandedOver]] = {
    "hf": to_hf,
    "meta": to_meta,
    "delta": to_difference,
    "recover": recover,
    "adapter": to_adapter,
}
"""Every form but GGUF, which is made by `zhibei.export.gguf.hand_over`."""
