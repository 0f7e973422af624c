"""Where commands write: results to stdout, everything else to stderr. Knows how errors look, not what causes them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

from rich.console import Console
from rich.text import Text

from zhibei.config.errors import OUR_FAULT, SeveralErrors, UserError


class PatientConsole(Console):
    """A console whose reader may go away (`| head`): the command goes on to its end, and its exit code tells."""

    def on_broken_pipe(self) -> None:
        """rich calls this, and would leave with exit code 1; a subclass is its documented way to differ."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


stdout = PatientConsole(highlight=False, soft_wrap=True)
stderr = PatientConsole(stderr=True, highlight=False, soft_wrap=True)


def emit(value: Any, as_json: bool = False) -> None:
    """The result of a command: one JSON document on stdout, or whatever rich can print."""
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
        sys.stdout.flush()
    else:
        stdout.print(value)


def emit_error(fields: dict[str, Any]) -> None:
    """An error as the one JSON document; where nobody reads any more, the exit code alone must tell."""
    try:
        emit({"error": fields}, as_json=True)
    except BrokenPipeError:
        drop_stdout()


def drop_stdout() -> None:
    """Send what is still to come nowhere, after the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_error(error: UserError, as_json: bool = False) -> int:
    """Show what only the user can put right; the exit code to leave with."""
    if as_json:
        emit_error({**error.as_dict(), "exit_code": error.exit_code})
    else:
        stderr.print(error_text(error))
    return error.exit_code


def error_text(error: UserError) -> Text:
    """The message in colour; its plain text is `str(error)` with every fault of a SeveralErrors."""
    if isinstance(error, SeveralErrors):
        parts = [Text(error.what, style="bold red"), *(error_text(part) for part in error.errors)]
        return Text("\n").join(parts)
    text = Text()
    if error.where:
        text.append(f"{error.where}: ", style="bold")
    text.append(error.what, style="red")
    text.append("\n  expected: ", style="dim").append(error.expected)
    text.append("\n  to do:    ", style="dim").append(error.fix, style="green")
    return text


def report_defect(error: BaseException, *, debug: bool, as_json: bool = False) -> int:
    """Show that zhibei itself failed, and leave the traceback in a file; the exit code to leave with."""
    trace = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="zhibei-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(trace)
    summary = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if as_json:
        emit_error({"what": summary, "traceback": file.name, "exit_code": OUR_FAULT})
    else:
        text = Text("This is our fault, not yours: ", style="bold red").append(summary, style="not bold")
        text.append("\n  details:  ", style="dim").append(file.name)
        text.append("\n  to do:    ", style="dim").append("please report it with that file; --debug shows it here")
        stderr.print(text)
    if debug:
        sys.stderr.write(trace)
    return OUR_FAULT
