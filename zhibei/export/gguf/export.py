"""A trained model as GGUF files: what belongs in them, under which names, in which types. Knows no command line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.export.gguf.families import Family, extra_tensors, family_of, metadata
from zhibei.export.gguf.file import Planned, require_free, write_gguf
from zhibei.export.gguf.importance import Importance
from zhibei.export.gguf.kinds import BLOCKS, PLAIN, Kind, Shape, find_kind, types_of
from zhibei.export.gguf.pretokenizer import prove
from zhibei.export.gguf.quantizer import import_gguf, quantizer
from zhibei.export.gguf.source import Read, Source, open_source
from zhibei.export.gguf.vocabulary import Vocabulary, read_vocabulary
from zhibei.generate.gguf_words import terminator_of, with_default_system
from zhibei.store.files import read_json

SKIPPED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.bias$|\.masked_bias$")
Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Exported:
    """One model in one type. `paths` are its parts; `types` counts how many tensors have which type."""

    kind: str
    paths: tuple[Path, ...]
    num_bytes: int
    types: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    """All that is the same for every type: names, values, tensors, vocabulary."""

    source: Source
    family: Family
    values: Mapping[str, Any]
    tensors: Mapping[str, Read]
    shape: Shape
    vocabulary: Vocabulary
    notes: tuple[str, ...]


def export_gguf(
    source: str | Source,
    out: str | Path,
    *,
    types: Sequence[str] = ("Q8_0",),
    imatrix: Importance | None = None,
    split_bytes: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Exported]:
    """Write a model as GGUF, one file per type, for llama.cpp and what is built on it.

    source: a run directory, a Hugging Face folder or an adapter (which is merged while it is read), or what
    `open_source` gave. out: a folder, or for one type a name that ends with .gguf. types: of KINDS, in any spelling.
    imatrix: which columns matter, for types that weigh them. split_bytes: the most bytes of one part.

    Everything that can be refused is refused before the first byte is written: a family, tokenizer or pre-tokenizer
    that llama.cpp does not have, words without rows, types that need an importance matrix, files that exist.
    """
    kinds = [find_kind(name) for name in dict.fromkeys(types)]
    ready = prepare(open_source(source) if isinstance(source, str) else source)
    plans = [_plan(ready, kind, _path(Path(out), ready.source.name, kind, len(kinds)), imatrix) for kind in kinds]
    for plan in plans:
        _require_possible(plan, imatrix)
    return [_write(ready, plan, split_bytes, progress) for plan in plans]


def prepare(source: Source) -> Ready:
    """Names, metadata and vocabulary of a model; reads no weights.

    Raises UserError when llama.cpp cannot express the family, the tokenizer or a tensor.
    """
    family = family_of(source.config, where=f"{source.folder}/config.json")
    tensors = _named(source, family)
    num_rows = tensors["token_embd.weight"].shape[0]
    terminator = terminator_of(source.template) if source.template else ""
    vocabulary, notes = prove(
        read_vocabulary(source.tokenizer, num_rows=num_rows, terminator=terminator), source.tokenizer
    )
    config = {**source.config, "vocab_size": num_rows}
    values = {
        **_about(source),
        **metadata(family, config),
        **vocabulary.as_metadata(),
    }
    if family.adds_space is not None and vocabulary.engine == "llama":
        values["tokenizer.ggml.add_space_prefix"] = family.adds_space
    if source.template is not None:
        values["tokenizer.chat_template"] = with_default_system(source.template.as_jinja(), source.system)
    heads = int(config["num_attention_heads"])
    return Ready(
        source=source,
        family=family,
        values=values,
        tensors=tensors,
        shape=Shape(
            architecture=family.name,
            num_layers=int(config["num_hidden_layers"]),
            heads_per_kv=heads // int(config.get("num_key_value_heads") or heads),
            is_tied="output.weight" not in tensors,
        ),
        vocabulary=vocabulary,
        notes=(*source.notes, *family.notes(config), *vocabulary.notes, *notes),
    )


def _named(source: Source, family: Family) -> dict[str, Read]:
    """Tensors under llama.cpp's names and in its layout. Without a head of its own llama.cpp takes the embedding."""
    gguf = import_gguf()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, int(source.config["num_hidden_layers"]))
    found: dict[str, Read] = {}
    for name, tensor in source.tensors.items():
        if SKIPPED.search(name):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError(
                f"tensor {name} has no place in llama.cpp's {family.name} models",
                expected="the tensors of the family and no others",
                fix="if it is a head or an adapter of its own, remove or merge it first",
                where=str(source.folder),
                pitfall="gguf-arch-unsupported",
            )
        found[new] = Read(tensor.shape, _turned(name, tensor, family, source.config))
    for name, values in extra_tensors(source.config).items():
        found[name] = Read(values.shape, lambda values=values: values)
    missing = [name for name in ("token_embd.weight", "output_norm.weight") if name not in found]
    if missing:
        raise UserError(
            f"the weights have no {' and no '.join(missing)}",
            expected="a whole language model",
            fix="zhibei verify says what else is missing; copy the folder again",
            where=str(source.folder),
        )
    return dict(sorted(found.items(), key=_order))


def _turned(name: str, tensor: Read, family: Family, config: Mapping[str, Any]) -> Callable[[], np.ndarray]:
    return lambda: family.transform(name, tensor.read(), config)


def _order(entry: tuple[str, Read]) -> tuple[int, int, str]:
    """Embedding, layers by number, then the end: the order in which a model is read."""
    name = entry[0]
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith(("token_embd", "rope_")) else 2), 0, name


def _about(source: Source) -> dict[str, Any]:
    """Who the model is, for people: name, licence, what it was made from."""
    values: dict[str, Any] = {"general.type": "model", "general.name": source.name, "general.quantization_version": 2}
    run = source.found.run
    manifest = read_json(run.manifest) if run and run.manifest.is_file() else {}
    base = manifest.get("base")
    if isinstance(base, dict) and base.get("path"):
        values |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": Path(str(base["path"])).name,
            "general.base_model.0.repo_url": str(base.get("source") or base["path"]),
        }
    values["general.finetune"] = str(manifest.get("method") or "")
    for name, value in _model_card(source.folder).items():
        values[f"general.{name}"] = value
    return {key: value for key, value in values.items() if value != ""}


CARD_HEAD = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
CARD_LINES = {"license": "license", "license_name": "license.name", "license_link": "license.link"}


def _model_card(folder: Path) -> dict[str, Any]:
    """The licence in the head of the model card (README.md), where there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    head = CARD_HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    lines = dict(line.split(":", 1) for line in (head.group(1) if head else "").splitlines() if ":" in line)
    found = {new: lines.get(old, "").strip().strip("'\"") for old, new in CARD_LINES.items()}
    return {name: value for name, value in found.items() if value}


def _path(out: Path, name: str, kind: Kind, num_kinds: int) -> Path:
    if out.suffix == ".gguf":
        if num_kinds > 1:
            raise UserError(
                f"{num_kinds} types do not fit into one file",
                expected="a folder, or one type",
                fix=f"write {out.with_suffix('')}",
                where=str(out),
            )
        return out
    return out / f"{name}-{kind.name}.gguf"


@dataclass(frozen=True)
class _Plan:
    """One file that is to be written."""

    kind: Kind
    path: Path
    values: Mapping[str, Any]
    tensors: Sequence[Planned]


def _plan(ready: Ready, kind: Kind, path: Path, imatrix: Importance | None) -> _Plan:
    shape = replace(ready.shape, has_importance=imatrix is not None)
    types = types_of(kind, {name: tensor.shape for name, tensor in ready.tensors.items()}, shape)
    means = imatrix.means if imatrix else {}
    return _Plan(
        kind=kind,
        path=path,
        values={
            **ready.values,
            "general.file_type": kind.number,
            **(imatrix.as_metadata() if imatrix else {}),
        },
        tensors=[
            Planned(name, tensor.shape, types[name], tensor.read, means.get(name))
            for name, tensor in ready.tensors.items()
        ],
    )


def _require_possible(plan: _Plan, imatrix: Importance | None) -> None:
    for name in sorted({tensor.type for tensor in plan.tensors}):
        quantizer(name)
    if plan.kind.wants_importance and imatrix is None:
        raise UserError(
            f"{plan.kind.name} needs an importance matrix: at so few bits the columns that matter must be known",
            expected="an importance matrix from text that is like what the model is for",
            fix="name such a text (--imatrix-from TEXT), or take a type that needs none, e.g. Q4_K_M",
            where="types",
        )
    if imatrix is not None:
        imatrix.require_fits({tensor.name: tensor.shape for tensor in plan.tensors})
    require_free(plan.path)


def _write(ready: Ready, plan: _Plan, split_bytes: int | None, progress: Progress) -> Exported:
    paths = write_gguf(
        plan.path,
        ready.family.name,
        plan.values,
        plan.tensors,
        split_bytes=split_bytes,
        progress=lambda name, done, total: progress(f"{plan.kind.name}: {name}", done, total),
    )
    counts = Counter(tensor.type for tensor in plan.tensors)
    return Exported(
        kind=plan.kind.name,
        paths=tuple(paths),
        num_bytes=sum(one.stat().st_size for one in paths),
        types=dict(counts.most_common()),
        notes=(*ready.notes, *_kind_notes(plan.kind, plan.tensors)),
    )


def _kind_notes(kind: Kind, tensors: Sequence[Planned]) -> tuple[str, ...]:
    """Matrices whose rows are no multiple of the type's block."""
    block = BLOCKS.get(kind.type, 256)
    odd = [one for one in tensors if one.type != "F32" and one.shape[-1] % block] if kind.name not in PLAIN else []
    if not odd:
        return ()
    instead = ", ".join(sorted({one.type for one in odd}))
    return (
        f"{len(odd)} of {len(tensors)} tensors have rows that are no multiple of {block} values and are written as "
        f"{instead}: the file is larger than {kind.name} usually is",
    )
