"""`zhibei config`: the effective run file, its origins, and what each field means. Knows no stage."""

from __future__ import annotations

import json as json_text
from typing import Any

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import UserError
from zhibei.config.faults import nearest_name
from zhibei.config.read import read_run, recipe_names, recipe_text, with_compat_set
from zhibei.config.resolve import ResolvedRun, render_resolved, value_of
from zhibei.config.run import RunFile
from zhibei.config.words import describe_field, is_section, leaf_fields

ORIGIN_STYLES = {
    "default": "dim", "planned": "magenta", "command line": "yellow", "recipe": "cyan", "compat": "cyan",
}  # fmt: skip


def config(
    run: str = "",
    /,
    *overrides: str,
    compat: str = "",
    json: bool = False,
    schema: bool = False,
    recipes: bool = False,
    explain: str = "",
) -> None:
    """Show the effective run file and where each value comes from.

    Examples:

      zhibei config my_run.yaml
      zhibei config alpaca-lora-7b model.path=llama-7b sft.epochs=1
      zhibei config runs/my_run --json
      zhibei config --explain sft.global_batch
      zhibei config --recipes
      zhibei config --schema > run-file.schema.json

    Parameters
    ----------
    run
        A run file, a recipe, or a run directory.
    overrides
        Settings laid over it, such as sft.learning_rate=1e-4.
    compat
        A set of numbers to be laid over the recipe: coati-2023 (docs/recipes.md says what it changes).
    json
        One JSON document: values, origins and notes.
    schema
        The JSON schema of a run file, for editors.
    recipes
        List the shipped recipes; with a recipe's name, print its text.
    explain
        A field or section, such as sft.global_batch or lora.
    """
    if schema:
        console.emit(RunFile.model_json_schema(), as_json=True)
    elif explain:
        console.emit(*_explained(explain, json))
    elif recipes:
        console.emit(*_recipes(run, json))
    elif run:
        resolved = read_run(run, with_compat_set(overrides, compat))
        console.emit(*((_as_json(resolved), True) if json else (_coloured(render_resolved(resolved)), False)))
    else:
        raise UserError(
            "nothing to show",
            expected="a run file, a recipe or a run directory; or --explain, --recipes, --schema",
            fix=f"try  zhibei config {recipe_names()[0]}",
        )


def _as_json(resolved: ResolvedRun) -> dict[str, Any]:
    values = {key: value_of(resolved.run, key) for key in resolved.origins}
    return {"values": values, "origins": resolved.origins, "notes": list(resolved.notes)}


def _coloured(text: str) -> Text:
    """Keys bold, origins in the colour of their kind, fields without effect dim."""
    lines = []
    for line in text.splitlines():
        value, comment_sign, origin = line.rpartition("  # ")
        if line.lstrip().startswith("#"):
            lines.append(Text(line, style="dim"))
        elif comment_sign:
            kind = next((kind for kind in ORIGIN_STYLES if origin.startswith(kind)), "file")
            key, _, rest = value.partition(":")
            style = ORIGIN_STYLES.get(kind, "green")
            lines.append(
                Text(key, style="bold").append(f":{rest}", style="not bold").append(f"  # {origin}", style=style)
            )
        else:
            lines.append(Text(line, style="bold"))
    return Text("\n").join(lines)


def _explained(name: str, as_json: bool) -> tuple[Any, bool]:
    found = {key: field for key, field in leaf_fields() if key == name or key.startswith(f"{name}.")}
    if not found:
        known = [key for key, _ in leaf_fields()]
        ends = [key for key in known if key.rpartition(".")[2] == name]
        fix = f"write {ends[0]}" if ends else _nearest(name)
        raise UserError(f"there is no field {name!r}", expected="a field or section of the run file", fix=fix)
    facts = [
        {
            "field": key,
            "expected": describe_field(field),
            "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            "is_required": field.is_required(),
            "text": " ".join((field.description or "").split()),
        }
        for key, field in found.items()
    ]
    if as_json:
        return facts, True
    text = Text()
    for fact in facts:
        default = "required" if fact["is_required"] else f"default {json_text.dumps(fact['default'])}"
        text.append(fact["field"], style="bold").append(f"  {fact['expected']} ({default})\n", style="cyan")
        text.append(f"  {fact['text']}\n")
    return text, False


def _nearest(name: str) -> str:
    section, _, last = name.rpartition(".")
    field = RunFile.model_fields.get(section)
    return nearest_name(last, (section,) if field and is_section(field.annotation) else ())


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _recipes(name: str, as_json: bool) -> tuple[Any, bool]:
    if name:
        return (
            ({"name": name, "text": recipe_text(name)}, True) if as_json else (Text(recipe_text(name).rstrip()), False)
        )
    purposes = {recipe: recipe_text(recipe).splitlines()[0].lstrip("# ") for recipe in recipe_names()}
    if as_json:
        return purposes, True
    table = Table("recipe", "what it is", box=None, pad_edge=False)
    for recipe, purpose in purposes.items():
        table.add_row(recipe, purpose)
    return table, False
