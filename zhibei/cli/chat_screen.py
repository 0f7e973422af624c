"""How a conversation looks: streamed text, two columns, dim figures. Knows answers, not what makes them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.config.errors import UserError

if TYPE_CHECKING:
    from zhibei.generate.sampler import Answer, Piece

TWO_COLUMNS_FROM = 100
COLOURS = ("green", "magenta")


@dataclass(frozen=True)
class Reply:
    """What one model said in a turn. `answer` is None when it was interrupted."""

    speaker: str
    text: str
    seconds: float
    answer: Answer | None
    notice: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        return len(self.answer.tokens) / max(self.seconds, 1e-9) if self.answer else None

    def figures(self) -> str:
        """The dim line under an answer."""
        if self.answer is None:
            return "stopped"
        end = {"stop": "ended by itself", "length": "cut off"}[self.answer.finish]
        cause = f" ({self.answer.notice})" if self.answer.finish == "length" and self.answer.notice else ""
        return f"{len(self.answer.tokens)} tokens, {self.tokens_per_s:,.0f} tokens/s, {end}{cause}"

    def as_dict(self) -> dict[str, Any]:
        """The same for `--json`."""
        answer = self.answer
        return {
            "model": self.speaker,
            "text": self.text,
            "finish": answer.finish if answer else "interrupted",
            "num_tokens": len(answer.tokens) if answer else None,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(self.tokens_per_s, 2) if self.tokens_per_s else None,
            "mean_logp": sum(answer.model_logps) / len(answer.model_logps) if answer else None,
            "notice": self.notice or (answer.notice if answer else ""),
        }


def visible(text: str) -> str:
    """Text without control characters, which could change the terminal: they are spelled out."""
    return "".join(sign if sign in "\n\t" or sign.isprintable() else _spelled(sign) for sign in text)


def _spelled(sign: str) -> str:
    # Spaces, joiners and marks of direction are not "printable" either, but belong to the text.
    is_control = ord(sign) < 32 or 127 <= ord(sign) < 160 or 0xD800 <= ord(sign) < 0xE000
    return sign.encode("unicode_escape").decode() if is_control else sign


class Screen:
    """Where answers and remarks go. In a terminal all to stdout; otherwise answers to stdout and remarks to stderr.

    With `as_json` nothing goes to stdout but the document at the end.
    """

    def __init__(self, *, is_terminal: bool, as_json: bool) -> None:
        self.is_terminal, self.as_json = is_terminal, as_json
        self._remarks = console.stdout if is_terminal and not as_json else console.stderr

    def remark(self, text: str, style: str = "dim") -> None:
        """Something about the conversation that is not part of it."""
        self._remarks.print(Text(visible(text), style=style))

    def error(self, error: UserError) -> None:
        self._remarks.print(console.error_text(error))

    def show(self, streams: list[tuple[str, Callable[[], Iterator[Piece]]]]) -> list[Reply]:
        """Stream one answer, or two: side by side where the terminal is wide enough, else one after the other."""
        if self.as_json:
            return [_collect(name, start, lambda _: None) for name, start in streams]
        if len(streams) > 1 and self.is_terminal and console.stdout.width >= TWO_COLUMNS_FROM:
            return self._show_columns(streams)
        replies = []
        for number, (name, start) in enumerate(streams):
            self._heading(name, number, is_needed=len(streams) > 1)
            reply = _collect(name, start, lambda text: console.stdout.print(Text(text), end=""))
            console.stdout.print()
            self.remark(reply.figures())
            replies.append(reply)
            if reply.answer is None:
                break
        return replies

    def _heading(self, name: str, number: int, *, is_needed: bool) -> None:
        if is_needed:
            console.stdout.print(Text(f"[{name}]", style=f"bold {COLOURS[number % len(COLOURS)]}"))
        elif self.is_terminal:
            console.stdout.print(Text("model> ", style=f"bold {COLOURS[0]}"), end="")

    def _show_columns(self, streams: list[tuple[str, Callable[[], Iterator[Piece]]]]) -> list[Reply]:
        texts = ["" for _ in streams]
        figures = ["" for _ in streams]
        replies: list[Reply] = []

        def table(most_lines: int | None = None) -> Table:
            shown = Table(expand=True, show_edge=False, pad_edge=False)
            for number, (name, _) in enumerate(streams):
                style = f"bold {COLOURS[number % len(COLOURS)]}"
                shown.add_column(Text(name, overflow="fold"), ratio=1, header_style=style, overflow="fold")
            shown.add_row(*(_tail(text, most_lines, num_columns=len(streams)) for text in texts))
            shown.add_row(*(Text(figure, style="dim") for figure in figures))
            return shown

        with Live(table(), console=console.stdout, auto_refresh=False) as live:
            for number, (name, start) in enumerate(streams):

                def add(text: str, number: int = number) -> None:
                    texts[number] += text
                    live.update(table(console.stdout.height - 5), refresh=True)

                reply = _collect(name, start, add)
                figures[number] = reply.figures()
                live.update(table(), refresh=True)
                replies.append(reply)
                if reply.answer is None:
                    break
        return replies


def _tail(text: str, most_lines: int | None, *, num_columns: int) -> Text:
    """The end of a text, while it grows beyond the screen; all of it when `most_lines` is None."""
    if most_lines is None:
        return Text(text)
    lines = Text(text).wrap(console.stdout, console.stdout.width // num_columns - 3)
    return Text("\n").join(lines[-max(1, most_lines) :])


def _collect(name: str, start: Callable[[], Iterator[Piece]], show: Callable[[str], None]) -> Reply:
    """Run a stream to its end, or until Ctrl-C. White space in front of an answer is not shown."""
    begun = time.perf_counter()
    text, answer = "", None
    pieces = start()
    try:
        for piece in pieces:
            new = piece.text if text else piece.text.lstrip()
            text += new
            if new:
                show(visible(new) if console.stdout.is_terminal else new)
            answer = piece.answer
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    return Reply(name, text.rstrip(), time.perf_counter() - begun, answer)


def read_message(*, is_terminal: bool) -> str | None:
    """One message: a line, or several while lines end in a backslash. None at the end of the input (Ctrl-D)."""
    lines: list[str] = []
    while True:
        line = _read_line("you> " if not lines else "...> ", is_terminal=is_terminal)
        if line is None:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _read_line(prompt: str, *, is_terminal: bool) -> str | None:
    if is_terminal:
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def switch_on_line_editing(words: list[str]) -> None:
    """Arrow keys, history and Tab for slash commands, where Python has readline."""
    try:
        import readline
    except ImportError:  # not part of every build of Python
        return

    def complete(begun: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(begun)] if begun.startswith("/") else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
