"""Complete Hugging Face folders: weights of a model or of base and adapters, and all that belongs beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.export.card import write_card
from zhibei.export.merge import Merged, merge_weights
from zhibei.export.sources import MergeSource
from zhibei.generate.gguf_words import with_default_system
from zhibei.model.locate import Located
from zhibei.model.wording import add_stop_ids, choose_template, tokenizer_place, trained_system
from zhibei.store.files import read_json, require_space, write_json_atomic, write_text_atomic
from zhibei.store.folders import whole_folder
from zhibei.store.manifest import model_fingerprint, read_manifest
from zhibei.text.template import Template
from zhibei.text.tokenizer import load_tokenizer

TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
ABOUT_THE_MODEL = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.py")
MADE_FROM = "made_from.json"
COPY_BYTES = 16 * 2**20


def complete_folder(folder: Path, located: Located, *, base: Path) -> None:
    """Put everything beside the weights: generation settings and licences of the base, tokenizer and template of the
    run, and the ids at which its answers end."""
    for pattern in ABOUT_THE_MODEL:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    place = Path(tokenizer_place(located))
    place = place if place.is_dir() else base
    for name in TOKENIZER:
        if (place / name).is_file():
            shutil.copyfile(place / name, folder / name)
    if (place / "additional_chat_templates").is_dir():
        shutil.copytree(place / "additional_chat_templates", folder / "additional_chat_templates")
    if not any((folder / name).is_file() for name in TOKENIZER):
        return
    tokenizer = load_tokenizer(str(folder))
    # SentencePiece's own file belongs to the same pieces; other programs ask for it.
    is_missing = place != base and (base / "tokenizer.model").is_file() and not (folder / "tokenizer.model").exists()
    if is_missing and load_tokenizer(str(base)).spec == tokenizer.spec:
        shutil.copyfile(base / "tokenizer.model", folder / "tokenizer.model")
    if not (folder / "generation_config.json").is_file():
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        write_json_atomic(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    if located.run is not None:
        template, _ = choose_template(located, tokenizer, asked=None)
        add_stop_ids(folder, tokenizer.stop_ids(template.terminator))
        _put_system_into_template(folder, template, trained_system(located))


def _put_system_into_template(folder: Path, template: Template, system: str | None) -> None:
    """Programs that read this folder know no run: its template begins conversations as the training rows began."""
    if system is None:
        return
    write_text_atomic(folder / "chat_template.jinja", with_default_system(template.as_jinja(), system))
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        write_json_atomic(folder / "tokenizer_config.json", settings)


def write_merged(
    source: MergeSource,
    folder: Path,
    *,
    dtype: str = "as-base",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Merged:
    """A complete folder of base and adapters: weights, config, tokenizer, template, generation settings, record."""
    merged = merge_weights(source, folder, dtype=dtype, progress=progress)
    complete_folder(folder, source.located, base=source.base)
    run = source.run
    record = {
        "what": "merge",
        "base": {"name": source.base.name, "fingerprint": model_fingerprint(source.base)},
        "adapters": [
            {"name": adapter.folder.resolve().parent.name if run else adapter.folder.name, "weight": adapter.weight}
            for adapter in source.adapters
        ],
        "run_id": read_manifest(run.path).get("run_id") if run is not None and run.manifest.is_file() else None,
        **asdict(merged),
    }
    write_json_atomic(folder / MADE_FROM, record)
    return merged


def copy_model(source: Path, folder: Path, *, progress: Callable[[int, int], Any] = lambda done, total: None) -> None:
    """Copy config and safetensors weights. Raises UserError for pickled weights and a disk that is too full."""
    files = [source / "config.json", *sorted(source.glob("model*.safetensors")), *source.glob("model*.index.json")]
    if len(files) < 2 or not files[0].is_file():
        raise UserError(
            "no whole model here",
            expected="config.json and model*.safetensors",
            fix="name a run, an adapter or a Hugging Face folder with safetensors weights",
            where=str(source),
        )
    total, done = sum(file.stat().st_size for file in files), 0
    require_space(folder, needed_bytes=total, purpose="the exported model")
    for file in files:
        with open(file, "rb") as original, open(folder / file.name, "wb") as copy:
            while block := original.read(COPY_BYTES):
                copy.write(block)
                done += len(block)
                progress(done, total)
            copy.flush()
            os.fsync(copy.fileno())


@contextmanager
def new_folder(out: Path, *, purpose: str) -> Iterator[Path]:
    """A folder that gets its name when it is complete and proved; only what zhibei made before is replaced."""
    if out.exists() and not ((out / MADE_FROM).is_file() or (out.is_dir() and not any(out.iterdir()))):
        raise UserError(
            f"{out} exists and was not made by this command",
            expected="a new folder, or one with made_from.json, which is replaced",
            fix="name another place: --out PATH",
            where="--out",
        )
    with whole_folder(out, purpose=purpose) as folder:
        yield folder
        for file in folder.iterdir():
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())


def name_of(located: Located) -> str:
    """What people would call the model: its run, its adapter, or its folder."""
    place = located.run.path if located.run is not None else located.adapter or Path(located.weights)
    return place.resolve().name


def add_card(folder: Path, located: Located, *, base: Path | None, parity: dict[str, Any] | None) -> None:
    """README.md of a complete folder."""
    write_card(folder, name=name_of(located), base=base, run=located.run, parity=parity)
