"""`zhibei data`: look at data files, convert them, list the formats. Knows how results look, not how they are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import USER_MUST_ACT, UserError

app = App(
    name="data",
    help="""Look at data before you train on it.

For example:

  zhibei data inspect alpaca_data.json --tokenizer llama-7b
  zhibei data convert alpaca_data.json alpaca.jsonl --to openai
  zhibei data formats
""",
    help_format="plaintext",
    result_action="return_value",
    default_parameter=Parameter(negative=()),
)

BELONGS_TO_SHOW = {
    "show": "The exact tokens a model will see of a row, with those it learns marked.",
    "templates": "List the templates, each with an example.",
}
if find_spec("zhibei.cli.show"):
    for _name, _purpose in BELONGS_TO_SHOW.items():
        app.command(f"zhibei.cli.show:{_name}", name=_name, help=_purpose)


@app.command
def inspect(
    *files: str,
    tokenizer: str | None = None,
    format: str = "auto",
    columns: tuple[str, ...] = (),
    json: bool = False,
    plot: Path | None = None,
) -> int | None:
    """What is in data files: fields, lengths, languages, duplicates, suspicious and broken rows.

    Leaves with exit code 2 when a record is broken.

    Examples:

      zhibei data inspect alpaca_data.json
      zhibei data inspect data/*.jsonl --tokenizer llama-7b --plot lengths.html
      zhibei data inspect alpaca_data.json --json

    Parameters
    ----------
    files
        Files, folders or globs of them, or ids of data sets on the hub.
    tokenizer
        A model or tokenizer folder: lengths are shown in its tokens too.
    format
        Name of the format, if it is not to be recognised.
    columns
        Fields under other names, as OURS=THEIRS: --columns output=gpt4_answer. May be given several times.
    json
        One JSON document.
    plot
        Also write the distribution of lengths as a page (.html or .svg).
    """
    from zhibei.cli.data_view import plot_page, shown
    from zhibei.data.inspect import Said, inspect_file

    if not files:
        raise UserError("nothing to look at", expected="files", fix="zhibei data inspect FILE")
    if plot and plot.suffix not in (".html", ".svg"):
        raise UserError(
            f"cannot plot into {plot.suffix!r}", expected=".html or .svg", fix="choose such a name", where=str(plot)
        )
    count = _token_counter(tokenizer) if tokenizer else None
    names = _renaming(columns)
    earlier: list[Said] = []
    found = [
        inspect_file(path, format=format, columns=names, count_tokens=count, label=label, earlier=earlier)
        for path, label in _expanded(files)
    ]
    if json:
        console.emit({"files": found}, as_json=True)
    else:
        for facts in found:
            console.emit(shown(facts))
    if plot:
        plot.write_text(plot_page(found, as_svg=plot.suffix == ".svg"), encoding="utf-8")
        console.stderr.print(f"lengths plotted into {plot}")
    return USER_MUST_ACT if any(facts["broken"]["count"] for facts in found) else None


def _renaming(columns: tuple[str, ...]) -> dict[str, str]:
    """OURS=THEIRS pairs as the run file's `columns`."""
    for pair in columns:
        ours, sign, theirs = pair.partition("=")
        if not (ours and sign and theirs):
            raise UserError(
                f"--columns {pair!r}", expected="OURS=THEIRS", fix="e.g. --columns output=gpt4_answer", where=""
            )
    return dict(pair.split("=", 1) for pair in columns)


def _expanded(files: tuple[str, ...]) -> list[tuple[Path, str]]:
    from zhibei.config.run import Source
    from zhibei.data.sources import files_of

    return [found for name in files for found in files_of(Source(path=name))]


def _token_counter(name: str) -> Callable[[Sequence[str]], list[int]]:
    import numpy as np

    from zhibei.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)

    def count(texts: Sequence[str]) -> list[int]:
        pieces = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
        return [int(n) for piece in pieces for n in np.diff(tokenizer.encode_batch(piece).borders)]

    return count


@app.command
def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    from_: Annotated[str, Parameter(name="--from")] = "auto",
    columns: tuple[str, ...] = (),
    drop: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a data file in another format, without loss: every row is read back and compared.

    What the target has no field for is kept beside it; what cannot be kept stops the conversion with its name.

    Examples:

      zhibei data convert alpaca_data.json chat.jsonl --to openai
      zhibei data convert sharegpt.json alpaca.json --to alpaca
      zhibei data convert hh.jsonl.gz pairs.jsonl --to preference

    Parameters
    ----------
    source
        The file to read.
    target
        The file to write: .json, .jsonl or .jsonl.gz.
    to
        Name of the format to write (zhibei data formats).
    from_
        Name of the format to read, if it is not to be recognised.
    columns
        Fields under other names, as OURS=THEIRS: --columns output=gpt4_answer. May be given several times.
    drop
        Leave broken records out and list them, instead of stopping at the first.
    force
        Replace the target if it exists.
    json
        One JSON document.
    """
    from zhibei.data.convert import convert as convert_file
    from zhibei.data.inspect import broken_entry
    from zhibei.data.readers import open_file

    file = open_file(source, from_, _renaming(columns))
    done = convert_file(file, target, to=to, drop=drop, force=force)
    if json:
        facts = {"from": done.from_format, "to": done.to_format, "rows": done.num_rows, "file": str(target)}
        console.emit({**facts, "left_out": [broken_entry(record) for record in done.left_out]}, as_json=True)
        return
    for record in done.left_out:
        console.stderr.print(f"left out: {record.where}: {record.what}")
    left = f", {len(done.left_out)} broken records left out" if done.left_out else ""
    console.emit(f"{target}: {done.num_rows} rows, {done.from_format} -> {done.to_format}{left}")


@app.command
def formats(*, json: bool = False) -> None:
    """The formats that are recognised, with their fields and an example of each.

    Examples:

      zhibei data formats
      zhibei data formats --json

    Parameters
    ----------
    json
        One JSON document.
    """
    from zhibei.data.formats import FORMATS
    from zhibei.data.writers import WRITERS

    facts = [
        {
            "name": it.name,
            "summary": it.summary,
            "needed": list(it.needed),
            "optional": list(it.optional),
            "becomes": it.becomes,
            "can_be_written": it.name in WRITERS,
            "example": it.example,
        }
        for it in FORMATS.values()
    ]
    if json:
        console.emit(facts, as_json=True)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for fact in facts:
        text = Text(fact["summary"] + "\n")
        text.append("needs ", style="dim").append(", ".join(fact["needed"]))
        if fact["optional"]:
            text.append("; may have ", style="dim").append(", ".join(fact["optional"]))
        text.append(f"\n{fact['example']}\n", style="cyan")
        table.add_row(Text(f"{fact['name']}\n", style="bold").append(f"-> {fact['becomes']}", style="dim"), text)
    console.emit(table)
    console.emit(Text("a|b: one of the two. Other fields are kept for conversion and not trained on.", style="dim"))
