"""The line a person watches while a run works. Knows the records of metrics.jsonl, not what makes them.

`ProgressLine` is handed to training as `watch`, and its method `rows` to preparation as its callback.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

Mode = Literal["live", "plain", "quiet", "json"]
SECONDS_BETWEEN_PLAIN_LINES = 10.0
SMOOTHING = 0.9
LAST_EVENTS = ("stopped", "finished", "interrupted")


def choose_mode(*, quiet: bool = False, as_json: bool = False, stream: TextIO | None = None) -> Mode:
    """json and quiet win; else a live line where the stream is a terminal, and plain lines where it is not."""
    if as_json:
        return "json"
    if quiet:
        return "quiet"
    return "live" if Console(file=stream or sys.stderr).is_terminal else "plain"


def as_duration(seconds: float) -> str:
    """75 -> '1 min 15 s', 7300 -> '2 h 1 min'; a person never needs more than two units."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Pace:
    """How long the rest takes, from when steps arrived.

    The time before the first step is never counted, and a plain step is the median of the last 64, so that a few slow
    steps at the start (compilation, warm caches) do not spoil the estimate. What evaluations and saves took is spread
    over all steps.
    """

    def __init__(self) -> None:
        self._plain_seconds: deque[float] = deque(maxlen=64)
        self._interrupted_seconds: list[float] = []
        self._num_steps = 0
        self._last: tuple[int, float] | None = None
        self._was_interrupted = False

    def step(self, step: int, now: float) -> None:
        if self._last is not None and step > self._last[0]:
            num_steps = step - self._last[0]
            seconds = now - self._last[1]
            if self._was_interrupted:
                self._interrupted_seconds.append(seconds)
            else:
                self._plain_seconds.append(seconds / num_steps)
            self._num_steps += num_steps
        self._last = (step, now)
        self._was_interrupted = False

    def interruption(self) -> None:
        """An evaluation or a save lies between the last step and the next."""
        self._was_interrupted = True

    def seconds_left(self, num_steps: int) -> float | None:
        """Seconds for so many more steps; None before three plain steps were seen."""
        if len(self._plain_seconds) < 3:
            return None
        plain = median(self._plain_seconds)
        extra = sum(max(0.0, seconds - plain) for seconds in self._interrupted_seconds) / self._num_steps
        return num_steps * (plain + extra)


class ProgressLine:
    """Call it with each record of a run. A context manager: leaving it gives the terminal back.

    live: one line that is rewritten, with lasting lines for held-out results and events above it. plain: a line at the
    first and last step, every ten seconds, and for each event; no control characters. quiet: only what went wrong
    (events whose name is "stopped" or "warning"). json: each record as one JSON line on stdout.
    """

    def __init__(
        self, mode: Mode | None = None, *, stream: TextIO | None = None, clock: Callable[[], float] = time.time
    ):
        self.mode: Mode = mode or choose_mode(stream=stream)
        self._stream = stream or (sys.stdout if self.mode == "json" else sys.stderr)
        self._console = Console(file=self._stream, highlight=False)
        self._clock = clock
        self._pace = Pace()
        self._live: Live | None = None
        self._total_steps: int | None = None
        self._record: dict[str, Any] = {}
        self._loss_sum = self._loss_weight = 0.0
        self._line = ""
        self._last_plain = -math.inf
        self._is_pending = False
        self._rows_start: tuple[int, float] | None = None
        self._show = {"live": self._show_live, "plain": self._show_plain, "quiet": self._show_nothing}

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; in plain mode the last step is printed if it was not yet."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.mode == "plain" and self._is_pending:
            self._print(self._line)
            self._is_pending = False

    def __call__(self, record: dict[str, Any]) -> None:
        if self.mode == "json":
            self._print(as_json_line(record))
            return
        readers = {
            "train": self._train,
            "heldout": self._heldout,
            "event": self._event,
            "iteration": self._iteration,
            "evaluation": self._evaluation,
        }
        reader = readers.get(str(record.get("kind")))
        if reader is not None:
            reader(record)

    def rows(self, num_rows: int, about: int | str | None = None) -> None:
        """Rows prepared so far, and of how many if `about` is a number; another text in `about` is a lasting line."""
        if isinstance(about, str) and about != "preparing rows":
            self({"kind": "event", "step": 0, "event": "note", "text": about})
            return
        num_total = about if isinstance(about, int) else None
        now = self._clock()
        if self._rows_start is None or num_rows < self._rows_start[0]:
            self._rows_start = (num_rows, now)
        first_rows, start = self._rows_start
        if self.mode == "json":
            if now - self._last_plain >= SECONDS_BETWEEN_PLAIN_LINES:
                self._print(as_json_line({"kind": "preparing", "rows": num_rows, "total_rows": num_total, "time": now}))
                self._last_plain = now
            return
        self._line = f"preparing rows {num_rows:,}" + (f"/{num_total:,}" if num_total else "")
        if now - start > 0.5 and num_rows > first_rows:
            self._line += f"   {(num_rows - first_rows) / (now - start):,.0f} rows/s"
        self._show[self.mode](is_edge=num_total is not None and num_rows >= num_total)

    def _train(self, record: dict[str, Any]) -> None:
        self._record = record
        step, loss = int(record.get("step", 0)), record.get("loss")
        self._pace.step(step, self._clock())
        if loss is not None and is_number(loss):
            # Divided by the weight collected so far, so that the first losses do not linger.
            self._loss_sum = SMOOTHING * self._loss_sum + (1 - SMOOTHING) * loss
            self._loss_weight = SMOOTHING * self._loss_weight + (1 - SMOOTHING)
        is_first = not self._line.startswith("step")
        self._line = self._train_line()
        self._show[self.mode](is_edge=is_first or step == self._total_steps)

    def _iteration(self, record: dict[str, Any]) -> None:
        """One iteration of a policy: how good its answers are, and how far it has gone."""
        step, total = int(record.get("step", 0)), self._total_steps
        self._pace.step(step, self._clock())
        parts = [(0, f"step {step:,}" + (f"/{total:,}" if total else ""))]
        parts.append((1, f"reward {as_figure(record.get('reward_mean'), '.4f')}"))
        named = (("kl", "KL", ".3f", 2), ("entropy", "entropy", ".3f", 5), ("length_mean", "length", ".1f", 3))
        for name, words, style, rank in (*named, ("clip_share", "clipped", ".1%", 6), ("seconds", "seconds", ".1f", 4)):
            if is_number(record.get(name)):
                parts.append((rank, f"{words} {record[name]:{style}}"))
        if left_out := record.get("excluded_groups_so_far"):
            parts.append((3, f"groups of equal rewards left out {left_out:,}"))
        is_first = not self._line.startswith("step")
        self._line = self._fitted(parts, step)
        self._show[self.mode](is_edge=is_first or step == total)

    def _evaluation(self, record: dict[str, Any]) -> None:
        self._pace.interruption()
        is_base = record.get("step") == 0
        text = (
            "before training, " if is_base else ""
        ) + f"held-out reward {as_figure(record.get('reward_mean'), '.4f')}"
        is_best = bool(record.get("is_best")) and not is_base
        self._last_line(record, text + (", best so far" if is_best else ""), style="bold green" if is_best else "bold")

    def _heldout(self, record: dict[str, Any]) -> None:
        self._pace.interruption()
        is_base = record.get("step") == 0
        parts = [("before training, " if is_base else "") + f"held-out loss {as_figure(record.get('loss'), '.4f')}"]
        if is_number(record.get("perplexity")):
            parts.append(f"perplexity {record['perplexity']:,.2f}")
        if is_number(record.get("accuracy")):
            low, high = record.get("accuracy_low"), record.get("accuracy_high")
            within = f" ({low:.3f} to {high:.3f})" if is_number(low) and is_number(high) else ""
            parts.append(f"accuracy {record['accuracy']:.3f}{within}")
        if is_number(record.get("margin")):
            parts.append(f"margin {record['margin']:.3f}")
        if record.get("is_best") and not is_base:
            parts.append("best so far")
        self._last_line(record, ", ".join(parts), style="bold green" if record.get("is_best") else "bold")

    def _event(self, record: dict[str, Any]) -> None:
        self._pace.interruption()
        event = str(record.get("event", ""))
        if is_number(record.get("total_steps")):
            self._total_steps = int(record["total_steps"])
        is_bad = event in ("stopped", "warning")
        if is_bad or self.mode != "quiet":
            text = "; ".join(part for part in (str(record.get("text") or ""), started_text(record)) if part) or event
            text = printable(text if text.startswith(event) else f"{event}: {text}")
            self._last_line(record, text, style="red" if is_bad else "")
        if event in LAST_EVENTS:
            self.close()

    def _last_line(self, record: dict[str, Any], text: str, *, style: str) -> None:
        """A line that stays."""
        if self.mode == "quiet" and style != "red":
            return
        if self.mode == "plain" and self._is_pending:
            self._print(self._line)
            self._is_pending = False
        step = record.get("step")
        place = f"step {step:,}: " if is_number(step) and step else ""
        if self.mode == "live":
            self._console.print(Text(place + text, style=style))
        else:
            self._print(place + text)

    def _train_line(self) -> str:
        """All figures of the newest step."""
        record, total = self._record, self._total_steps
        step = int(record.get("step", 0))
        parts = [(0, f"step {step:,}" + (f"/{total:,}" if total else ""))]
        if is_number(record.get("epoch")):
            parts.append((4, f"epoch {record['epoch']:.2f}"))
        smoothed = self._loss_sum / self._loss_weight if self._loss_weight else None
        parts.append((1, f"loss {as_figure(smoothed, '.4f')}"))
        parts += [(2, f"{name} {record[name]:.3f}") for name in ("accuracy", "margin") if is_number(record.get(name))]
        parts.append((5, f"(this step {as_figure(record.get('loss'), '.4f')})"))
        if is_number(record.get("tokens_per_s")):
            parts.append((3, f"{record['tokens_per_s']:,.0f} tokens/s"))
        if is_number(record.get("learning_rate")):
            parts.append((6, f"lr {record['learning_rate']:.2e}"))
        if is_number(record.get("peak_gib")):
            parts.append((4, f"GPU {record['peak_gib']:.1f} GiB"))
        elif is_number(record.get("host_gib")):
            parts.append((4, f"memory {record['host_gib']:.1f} GiB"))
        return self._fitted(parts, step)

    def _fitted(self, parts: list[tuple[int, str]], step: int) -> str:
        """The figures with the time that is left; on a narrow terminal the least important ones go first."""
        width = self._console.width if self.mode == "live" else None
        total = self._total_steps
        seconds_left = self._pace.seconds_left(total - step) if total is not None else None
        if seconds_left is not None:
            parts.append((2, f"{as_duration(seconds_left)} left"))
        while width is not None and len(parts) > 1 and sum(len(text) + 2 for _, text in parts) > width:
            parts.remove(max(parts, key=lambda part: part[0]))
        return "  ".join(text for _, text in parts)

    def _show_live(self, *, is_edge: bool) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console, refresh_per_second=4, get_renderable=self._renderable, transient=False
            )
            self._live.start()
        elif is_edge:
            self._live.refresh()

    def _renderable(self) -> Text:
        return Text(self._line, no_wrap=True, overflow="ellipsis")

    def _show_plain(self, *, is_edge: bool) -> None:
        now = self._clock()
        self._is_pending = not is_edge and now - self._last_plain < SECONDS_BETWEEN_PLAIN_LINES
        if not self._is_pending:
            self._print(self._line)
            self._last_plain = now

    def _show_nothing(self, *, is_edge: bool) -> None:
        """quiet: a step is not news."""

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def as_figure(value: Any, style: str) -> str:
    """A number in that style; what is not a finite number says so itself."""
    if is_number(value):
        return format(value, style)
    return "not known yet" if value is None else str(value)


def printable(text: str) -> str:
    """One line without control characters: text of a data file must not move a person's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def as_json_line(record: dict[str, Any]) -> str:
    """One strict JSON line: a number JSON cannot spell (nan, inf) becomes null."""
    cleaned = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(cleaned, ensure_ascii=False, default=str)


def started_text(record: dict[str, Any]) -> str:
    """The figures that a 'started' event brings."""
    names = {
        "total_steps": "steps",
        "total_rows": "rows",
        "tokens_per_epoch": "tokens per epoch",
        "supervised_per_epoch": "supervised tokens per epoch",
    }
    return ", ".join(f"{record[key]:,} {name}" for key, name in names.items() if is_number(record.get(key)))
