"""`zhibei verify`: prove that what was written is complete, undamaged and finite. Knows how verdicts look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import DONE, USER_MUST_ACT

if TYPE_CHECKING:
    from zhibei.store.verify import Verdict

WORDS = {
    "sound": Text("sound", style="green"),
    "note": Text("sound, see note", style="yellow"),
    "problem": Text("NOT SOUND", style="bold red"),
}


def verify(path: Path, /, *, json: bool = False) -> int:
    """Prove that a run, a checkpoint, a model or an adapter folder is complete, undamaged and finite.

    Every file is read and nothing is changed. Pickle files are named and never opened.
    Exit code 0: sound. 2: not sound, with the reason for each file.

    Examples:

      zhibei verify runs/my_run

      zhibei verify runs/my_run/checkpoints/step-000200

      zhibei verify path/to/a/hugging-face/folder --json

    Parameters
    ----------
    path
        A run directory, a checkpoint, or a Hugging Face or PEFT folder.
    json
        Print one JSON document instead of the table.
    """
    from zhibei.store.verify import inspect_folder

    verdict = inspect_folder(path)
    if json:
        console.emit(verdict.as_dict(), as_json=True)
    else:
        console.stdout.print(Text(f"{verdict.kind} {verdict.path}", style="bold"))
        console.stdout.print(as_table(verdict))
        for line in remarks(verdict):
            console.stdout.print(line)
    return DONE if verdict.is_sound else USER_MUST_ACT


def as_table(verdict: Verdict) -> Table:
    """One row per file; what is wrong with it follows below the table, where there is room."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for file in verdict.files:
        table.add_row(
            shown_name(file.path, verdict),
            f"{file.num_bytes:,}" if file.num_bytes else "",
            f"{file.num_tensors:,}" if file.num_tensors else "",
            WORDS["problem" if file.problems else "note" if file.notes else "sound"],
        )
    return table


def shown_name(path: Path, verdict: Verdict) -> str:
    """Relative to what was asked for."""
    is_below = path != verdict.path and path.is_relative_to(verdict.path)
    return str(path.relative_to(verdict.path)) if is_below else str(path)


def remarks(verdict: Verdict) -> Iterator[Text]:
    """Every note and every problem with its file, then the verdict in one line."""
    for file in verdict.files:
        for what in file.notes:
            yield Text(f"note: {shown_name(file.path, verdict)}: {what}", style="yellow")
    for file in verdict.files:
        for what in file.problems:
            yield Text(f"problem: {shown_name(file.path, verdict)}: {what}", style="red")
    num_bytes = sum(file.num_bytes for file in verdict.files)
    if verdict.is_sound:
        yield Text(f"sound: {len(verdict.files):,} files, {num_bytes:,} bytes", style="bold green")
    else:
        num_files = sum(bool(file.problems) for file in verdict.files)
        yield Text(f"NOT sound: {num_files:,} of {len(verdict.files):,} files have problems", style="bold red")
