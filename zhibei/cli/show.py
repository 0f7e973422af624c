"""`zhibei data show` and `zhibei data templates`: rows and templates, what is learned marked. Knows how they look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import UserError
from zhibei.config.run import DataSection

if TYPE_CHECKING:
    from zhibei.data.records import BrokenRecord, Record
    from zhibei.data.seen import SeenRow
    from zhibei.text.tokenizer import Tokenizer

# Brackets that occur in no template: what is learned can be told apart without colour too.
OPEN, CLOSE = "⟦", "⟧"
LEARNED, SPECIAL, BRACKET = "green", "bold", "dim"
EXAMPLE = ("Name a colour.", "Blue.", "Another?", "Red.")


def show(
    what: str,
    *,
    row: int = 0,
    id: str = "",
    count: int = 3,
    tokenizer: str | None = None,
    template: str | None = None,
    system: str | None = None,
    supervise: str | None = None,
    ids: bool = False,
    json: bool = False,
) -> None:
    """The exact tokens a model will see of a row, with those it learns marked: ⟦learned⟧.

    Examples:

      zhibei data show run.yaml
      zhibei data show runs/my-run --row 17 --ids
      zhibei data show alpaca_data.json --tokenizer llama-7b --template alpaca
      zhibei data show run.yaml --id data.json#204 --json

    Parameters
    ----------
    what
        A run file, recipe or run directory (its data section is used), or a data file.
    row
        The first row to show, counted from 0 in reading order.
    id
        One row by its name in audits and ledgers: FILE#RECORD.
    count
        How many rows.
    tokenizer
        A model or tokenizer folder; needed for a data file.
    template
        Name of a template (zhibei data templates); by default the run's, or auto.
    system
        System prompt for conversations that have none.
    supervise
        answers, last_answer, turns or everything; by default the run's, or answers.
    ids
        Every token on its own line with its id.
    json
        One JSON document.
    """
    from zhibei.data.prepare import wording_of
    from zhibei.data.seen import see
    from zhibei.text.families import find_template
    from zhibei.text.tokenizer import load_tokenizer

    if count < 1 or row < 0:
        raise UserError(
            "no row is asked for", expected="--row 0 or more, --count 1 or more", fix="e.g. --row 0 --count 3"
        )
    data, place, revision = _asked(what, tokenizer=tokenizer)
    changes = {"template": template, "system": system, "supervise": supervise}
    data = _changed(data, {name: value for name, value in changes.items() if value is not None})
    loaded = load_tokenizer(place, revision=revision)
    wording = wording_of(data, loaded, find_template(data.template, loaded))
    seen = [see(record, wording) for record in _chosen(data, row=row, id=id, count=count, what=what)]
    if json:
        facts = {"template": wording.template.name, "tokenizer": loaded.source, "rows": [one.as_dict() for one in seen]}
        console.emit(facts, as_json=True)
        return
    head = f"template {wording.template.name}, tokenizer {loaded.source}; {OPEN}marked{CLOSE} tokens are learned"
    console.emit(Group(Text(head, style="dim"), *(_shown(one, with_ids=ids) for one in seen)))


def _asked(what: str, *, tokenizer: str | None) -> tuple[DataSection, str, str | None]:
    """The data section, where the tokenizer lies, and its revision."""
    from zhibei.config.read import read_run, recipe_names

    is_run = what in recipe_names() or what.endswith((".yaml", ".yml")) or Path(what, "resolved.yaml").is_file()
    if is_run:
        run = read_run(what).run
        if tokenizer or run.model.tokenizer:
            return run.data, tokenizer or str(run.model.tokenizer), None
        return run.data, run.model.path, run.model.revision
    if not tokenizer:
        raise UserError(
            "a data file alone does not say how it becomes tokens",
            expected="--tokenizer FOLDER (and --template NAME)",
            fix=f"zhibei data show {what} --tokenizer MODEL_FOLDER --template alpaca",
            where=what,
        )
    return DataSection(sources=[what], on_error="drop"), tokenizer, None


def _changed(data: DataSection, changes: dict[str, str]) -> DataSection:
    from pydantic import ValidationError

    try:
        return DataSection.model_validate(data.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--{first['loc'][0]} {first['input']!r}",
            expected=first["msg"].removeprefix("Input should be "),
            fix="see  zhibei data show --help",
        ) from error


def _chosen(data: DataSection, *, row: int, id: str, count: int, what: str) -> Iterator[Record]:
    from zhibei.data.encode import row_id
    from zhibei.data.readers import read_sources
    from zhibei.data.records import BrokenRecord

    records: Iterator[Record | BrokenRecord] = (record for _, record in read_sources(data))
    if id:
        records = (
            record for record in records if row_id(record.origin) == id or row_id(record.origin).endswith(f"/{id}")
        )
        row, count = 0, 1
    found = False
    for record in islice(records, row, row + count):
        found = True
        if isinstance(record, BrokenRecord):
            console.stderr.print(console.error_text(record.as_error()))
        else:
            yield record
    if not found:
        wanted = f"row {id}" if id else f"row {row}"
        raise UserError(
            f"there is no {wanted}",
            expected="a row that exists",
            fix="rows are counted from 0; ids are FILE#RECORD as in audit.json and ledger.jsonl",
            where=what,
        )


def _shown(seen: SeenRow, *, with_ids: bool) -> Group:
    num_learned = sum(token.is_learned for token in seen.tokens)
    head = Text(f"\n{seen.row}", style="bold").append(
        f"  {len(seen.tokens)} tokens, {num_learned} learned; {seen.fate}", style="dim"
    )
    return Group(head, _table(seen) if with_ids else _running_text(seen))


def _running_text(seen: SeenRow) -> Text:
    """The row's text; runs of learned tokens are bracketed and coloured."""
    text, is_open = Text(), False
    for token in seen.tokens:
        if token.is_learned != is_open:
            text.append(OPEN if token.is_learned else CLOSE, style=BRACKET)
            is_open = token.is_learned
        style = " ".join([LEARNED] * token.is_learned + [SPECIAL] * token.is_special)
        text.append(_visible(token.text), style=style or None)
    if is_open:
        text.append(CLOSE, style=BRACKET)
    return text


def _visible(text: str) -> str:
    """Line ends and tabs can be seen, and still break the line."""
    return text.replace("\r", "␍").replace("\t", "→\t").replace("\n", "⏎\n")


def _table(seen: SeenRow) -> Text:
    lines = Text()
    for place, token in enumerate(seen.tokens):
        mark = f"{OPEN}{token.piece}{CLOSE}" if token.is_learned else f" {token.piece} "
        style = " ".join([LEARNED] * token.is_learned + [SPECIAL] * token.is_special)
        lines.append(f"{place:>6} {token.id:>7}  ").append(mark, style=style or None).append("\n")
    return lines


def templates(*, tokenizer: str | None = None, json: bool = False) -> None:
    """List the templates, each with an example of two turns; ⟦what the model learns⟧ is marked.

    Examples:

      zhibei data templates
      zhibei data templates --tokenizer llama-7b

    Parameters
    ----------
    tokenizer
        A model or tokenizer folder: show the templates with its special tokens, and its own chat template.
    json
        One JSON document.
    """
    from zhibei.text.families import ALIASES, TEMPLATES
    from zhibei.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    listed = [_example(name, family.about, loaded) for name, family in TEMPLATES.items()]
    if loaded and loaded.chat_template:
        listed.append(_example("tokenizer", "the tokenizer's own chat template", loaded))
    aliases = {name: sorted(alias for alias, meant in ALIASES.items() if meant == name) for name in TEMPLATES}
    if json:
        facts = [entry | {"aliases": aliases.get(entry["name"], [])} for entry in listed]
        console.emit({"templates": facts}, as_json=True)
        return
    parts: list[Any] = []
    for entry in listed:
        head = Text(entry["name"], style="bold").append(f"  {entry['about']}", style="not bold")
        if aliases.get(entry["name"]):
            head.append(f"  (also: {', '.join(aliases[entry['name']])})", style="dim")
        parts += [head, _marked(entry["text"], entry["learned"]) if entry["text"] else Text(entry["refused"]), Text("")]
    parts.append(Text("tokenizer: the tokenizer's own chat template. auto: that one, else alpaca.", style="dim"))
    console.emit(Group(*parts))


def _example(name: str, about: str, loaded: Tokenizer | None) -> dict[str, Any]:
    from zhibei.text.families import TEMPLATES, find_template
    from zhibei.text.messages import Message
    from zhibei.text.native import bind
    from zhibei.text.supervision import learned_intervals

    messages = [Message("assistant" if place % 2 else "user", content) for place, content in enumerate(EXAMPLE)]
    try:
        template = find_template(name, loaded) if loaded else bind(TEMPLATES[name], bos="<s>", eos="</s>")
        rendered = template.render(messages)
    except UserError as error:
        return {"name": name, "about": about, "text": "", "learned": [], "refused": error.what}
    learned = learned_intervals(rendered.spans, length=len(rendered.text), mode="answers")
    return {
        "name": name,
        "about": about,
        "text": rendered.text,
        "learned": [list(one) for one in learned],
        "refused": "",
    }


def _marked(text: str, learned: Sequence[Sequence[int]]) -> Text:
    shown, reached = Text(), 0
    for start, end in learned:
        shown.append(_visible(text[reached:start])).append(OPEN, style=BRACKET)
        shown.append(_visible(text[start:end]), style=LEARNED).append(CLOSE, style=BRACKET)
        reached = end
    return shown.append(_visible(text[reached:]))
