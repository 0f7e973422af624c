"""Which tokenizer and template belong to a model at a path: what its run recorded, else what its folder says.

Reads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.yaml_tree import parse, read_text
from zhibei.model.locate import Located
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.manifest import read_manifest, recorded, require_manifest, template_entry
from zhibei.store.run_dir import RunDir
from zhibei.text.families import TEMPLATES, find_template
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def choose_template(found: Located, tokenizer: Tokenizer, *, asked: str | None) -> tuple[Template, tuple[str, ...]]:
    """The template to prompt with, and what a person should know about it.

    In this order: the one asked for, the one the run was trained with, the tokenizer's own chat template. Raises
    UserError with the list of names when there is none: a guessed template makes a good model look broken.
    """
    trained = trained_template(found, tokenizer)
    if asked is not None:
        chosen = _asked_template(asked, tokenizer)
        if trained is not None and trained.as_jinja() != chosen.as_jinja():
            return chosen, (f"this model was trained with template {trained.name}, not {chosen.name}",)
        return chosen, ()
    if trained is not None:
        return trained, ()
    if tokenizer.chat_template:
        return find_template("tokenizer", tokenizer), ()
    raise UserError(
        "this model names no template: it has no manifest of a run, and its tokenizer has no chat template",
        expected=f"one of {', '.join(TEMPLATES)}",
        fix="choose the one it was trained with: --template NAME (for a base model, alpaca is a fair try)",
        where=found.weights,
    )


def require_as_trained(run: RunDir, tokenizer: Tokenizer, *, asked: str | None) -> None:
    """What the model speaks with must be what it was trained with; a template that was asked for may be another."""
    manifest = read_manifest(run.path)
    now: dict[str, Any] = {
        "tokenizer.sha256": tokenizer.fingerprint,
        "special_ids": {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id},
    }
    if asked is None and tokenizer.chat_template is not None:
        now["template.sha256"] = template_entry("", jinja=tokenizer.chat_template)["sha256"]
    require_manifest(
        run.path,
        {name: value for name, value in now.items() if recorded(manifest, name) is not None},
        fix=f"put back the files that {run.model} held (zhibei verify names the changed one); with another template on "
        "purpose: --template NAME",
    )


def trained_system(found: Located) -> str | None:
    """data.system of the run that made the model: its rows had it, so its prompts need it."""
    if found.run is None or not found.run.resolved.is_file():
        return None
    values = parse(read_text(found.run.resolved), source=str(found.run.resolved)).value or {}
    return (values.get("data") or {}).get("system")


def _asked_template(name: str, tokenizer: Tokenizer) -> Template:
    try:
        return find_template(name, tokenizer)
    except UserError as error:
        fix = error.fix.replace("data.template: ", "--template ")
        raise UserError(error.what, expected=error.expected, fix=fix, where="--template") from None


def trained_template(found: Located, tokenizer: Tokenizer) -> Template | None:
    """What manifest.json says: by name where our template of that name still spells the same, else as stored."""
    if found.run is None or not found.run.manifest.is_file():
        return None
    entry = read_json(found.run.manifest).get("template")
    if entry is None:
        return None
    name, source = (entry, None) if isinstance(entry, str) else (entry.get("name"), entry.get("jinja"))
    if name in TEMPLATES or (name in ("tokenizer", "auto") and source is None):
        current = find_template(name, tokenizer)
        if source is None or current.as_jinja() == source:
            return current
    if not source:
        return None
    return JinjaTemplate(source=source, special_tokens=dict(tokenizer.named_specials), marks=tokenizer.special_strings)


def tokenizer_place(found: Located) -> str:
    """The adapter's own tokenizer where it has one: it may hold tokens that were added in training."""
    if found.adapter is not None and any((found.adapter / name).is_file() for name in TOKENIZER_FILES):
        return str(found.adapter)
    return str(Path(found.weights)) if Path(found.weights).is_dir() else found.weights


def add_stop_ids(folder: Path, stop_ids: Sequence[int]) -> None:
    """Let every program stop where training taught answers to end: the ids join `eos_token_id`.

    A folder without generation_config.json (a PEFT folder) is used with the one of its base.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    settings = read_json(path)
    named = settings.get("eos_token_id")
    known = named if isinstance(named, list) else [] if named is None else [named]
    wanted = list(dict.fromkeys([*known, *stop_ids]))
    if wanted != known:
        write_json_atomic(path, {**settings, "eos_token_id": wanted})
