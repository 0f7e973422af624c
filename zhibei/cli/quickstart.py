"""`zhibei quickstart`: from nothing to a model that answers, told as it happens. Knows what is shown, no training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.cli.progress import ProgressLine, as_duration, choose_mode
from zhibei.config.errors import UserError

if TYPE_CHECKING:
    from zhibei.pipeline.outcome import Outcome
    from zhibei.pipeline.place import Place

TITLES = {
    "world": "Make a small world",
    "pretrain": "Pre-train",
    "data": "Read your data",
    "base": "Ask the base model",
    "sft": "Fine-tune",
    "tuned": "Ask the tuned model",
}


def quickstart(
    *,
    name: str = "",
    runs: Path = Path("runs"),
    seed: int = 0,
    method: Literal["auto", "full", "lora"] = "auto",
    model: str = "",
    data: str = "",
    template: str = "auto",
    steps: int = 100,
    learning_rate: float | None = None,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train a small model here in minutes and talk to it.

    It makes a small world of lists, sums and tables, pre-trains a small LLaMA on texts about it, fine-tunes it on
    instructions, and asks both models questions they have never seen. No network, no GPU.

    Examples:

      zhibei quickstart

      zhibei quickstart --seed 1 --method lora --name lora

      zhibei quickstart --model path/to/llama --data my_rows.json

    Parameters
    ----------
    name
        Folder below --runs; by default quickstart, or quickstart-2 and so on when that is finished.
    runs
        Folder of all runs.
    seed
        Of the world, the weights and the order of rows.
    method
        full trains all weights, lora trains adapters. auto: full for the small world, lora for your own model.
    model
        Your own model: a Hugging Face folder, a run directory or a hub id. Needs --data.
    data
        Your own rows: a file, folder or hub id in any format of `zhibei data formats`. Needs --model.
    template
        Prompt template for your own model; auto: its own chat template, else alpaca.
    steps
        Most optimiser steps on your own data.
    learning_rate
        Peak learning rate on your own data; by default 2e-5 for full and 2e-4 for lora.
    quiet
        Print only what went wrong, and the last word.
    json
        One JSON document with the scores; nothing else on stdout.
    """
    started = time.monotonic()
    if bool(model) != bool(data):
        raise UserError(
            f"--{'model' if model else 'data'} alone",
            expected="--model and --data together, or neither for the built-in small world",
            fix=f"add --{'data' if model else 'model'}",
        )
    _refuse_idle(bool(model), {"--template": template != "auto", "--steps": steps != 100,
                               "--learning-rate": learning_rate is not None})  # fmt: skip
    from zhibei.pipeline.place import Order, find_place

    method = ("lora" if model else "full") if method == "auto" else method
    order = Order(seed, method, model, data, template=template, steps=steps, learning_rate=learning_rate)
    place = find_place(runs, name or "quickstart", order, is_named=bool(name))
    story = Story(choose_mode(quiet=quiet or json), own=bool(model))
    story.begin(place)
    outcome = _run(place, order, story, started)
    if json:
        console.emit(_document(outcome), as_json=True)
    else:
        story.end(outcome)


def _run(place: Place, order: Any, story: Story, started: float) -> Outcome:
    from zhibei.pipeline.own import run_own
    from zhibei.pipeline.page import write_quickstart_page
    from zhibei.pipeline.quickstart import run_world

    try:
        outcome = (run_own if order.model else run_world)(place, order, watch=story, started=started)
    finally:
        story.close()
    write_quickstart_page(outcome, runs=["sft"] if order.model else ["pretrain", "sft"])
    return outcome


def _refuse_idle(has_own_model: bool, given: dict[str, bool]) -> None:
    """Options for the user's own data have no effect on the built-in world. Raises UserError."""
    idle = [option for option, is_given in given.items() if is_given]
    if idle and not has_own_model:
        raise UserError(
            f"{idle[0]} has no effect without --model and --data",
            expected="your own model and data",
            fix=f"add --model and --data, or leave out {idle[0]}; the run files pretrain.yaml and sft.yaml that "
            "quickstart writes can be changed and trained with zhibei train",
        )


class Story:
    """What a person sees while it works: a heading for each stage and the live line of training below it."""

    def __init__(self, mode: str, *, own: bool) -> None:
        self._mode: Any = mode
        self._line: ProgressLine | None = None
        self._number = 0
        self._total = 4 if own else 5

    def __call__(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        if kind == "stage":
            self._heading(record)
        elif self._line is not None and self._is_news(record):
            self._line(record)

    def begin(self, place: Place) -> None:
        for folder in place.skipped:
            self._say(Text(f"{folder} is there already and stays as it is."))
        verb = "Goes on in" if place.goes_on else "Everything is written to"
        self._say(Text(f"{verb} {place.folder}/"))

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def end(self, outcome: Outcome) -> None:
        """The scores, what changed, and what to type next."""
        from zhibei.pipeline.page import next_commands

        if self._mode != "quiet":
            console.stdout.print()
            for example in outcome.examples:
                console.stdout.print(_example(example))
        console.stdout.print(_scores(outcome))
        console.stdout.print(
            Text(f"\nDone in {as_duration(outcome.summary['total_seconds'])}. ", style="bold").append(
                "Now talk to it, beside its base, or train it again your way:", style="not bold"
            )
        )
        for command in next_commands(outcome):
            console.stdout.print(Text(f"  {command}", style="cyan"))
        console.stdout.print(Text(f"The whole story:  {outcome.folder / 'report.html'}"))

    def _heading(self, record: dict[str, Any]) -> None:
        self.close()
        self._number += 1
        title = TITLES.get(record["name"], record["name"])
        self._say(
            Text(f"\n{self._number}/{self._total}  {title}: ", style="bold").append(record["text"], style="not bold")
        )
        self._line = ProgressLine(self._mode)

    def _is_news(self, record: dict[str, Any]) -> bool:
        if record.get("kind") == "event":
            return record.get("event") in ("started", "resumed", "stopped", "interrupted", "warning")
        return True

    def _say(self, text: Text) -> None:
        if self._mode != "quiet":
            console.stderr.print(text)


def _example(example: dict[str, Any]) -> Text:
    text = Text(_end_of(example["question"]), style="bold")
    text.append("\n   base:  ", style="dim").append(_short(example["base"]), style="red")
    is_right = example.get("tuned_is_right", False)
    text.append("\n   tuned: ", style="dim").append(_short(example["tuned"]), style="green" if is_right else "yellow")
    if example["expected"] and not is_right:
        text.append(f"   (right: {example['expected']})", style="dim")
    return text


def _end_of(question: str) -> str:
    """A rendered prompt begins with what is the same in all of them; its end is what was asked."""
    line = " / ".join(part for part in question.split("\n") if part)
    return line if len(line) <= 110 else "..." + line[-107:]


def _short(answer: str) -> str:
    line = " / ".join(answer.split("\n"))
    return (line if len(line) <= 90 else line[:87] + "...") or "(nothing)"


def _scores(outcome: Outcome) -> Table:
    from zhibei.pipeline.page import as_score

    metric = outcome.stages[0].metric
    title = {"exact_match": "Right answers to held-out questions", "heldout_loss": "Held-out loss, nats per token"}
    base, tuned = outcome.stages[0], outcome.stages[-1]
    table = Table(title=title[metric], title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("task" if outcome.by_task else "")
    for column in ("base", "tuned", "95 % interval"):
        table.add_column(column, justify="right")
    for task, found in outcome.by_task.items():
        low, high = as_score(metric, found["low"]), as_score(metric, found["high"])
        table.add_row(task, as_score(metric, found["base"]), as_score(metric, found["tuned"]), f"{low} to {high}")
    table.add_section()
    table.add_row(
        "all",
        as_score(metric, base.score),
        as_score(metric, tuned.score),
        f"{as_score(metric, tuned.low)} to {as_score(metric, tuned.high)}",
        style="bold",
    )
    return table


def _document(outcome: Outcome) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(outcome.folder),
        **outcome.summary,
        "by_task": outcome.by_task,
        "paired": asdict(outcome.paired) if outcome.paired else None,
        "examples": outcome.examples,
    }
