"""`zhibei quickstart`: from nothing to a model people prefer, told as it happens. Knows what is shown, no training."""

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
    "ask base": "Ask the base model",
    "sft": "Fine-tune",
    "ask sft": "Ask the fine-tuned model",
    "preferences": "Compare its answers",
    "reward": "Train a reward model",
    "ppo": "Learn from its scores (PPO)",
    "ask ppo": "Ask the policy",
    "handover": "Hand it over",
}
NUM_STAGES = {"sft": 5, "reward": 7, "ppo": 10}
ALL_RUNS = {"sft": ["pretrain", "sft"], "reward": ["pretrain", "sft", "reward"],
            "ppo": ["pretrain", "sft", "reward", "ppo"]}  # fmt: skip
ORIGINS = {"hedge": "against hedges", "own": "against its own mistakes", "slip": "against planted mistakes"}
COLOURS = {True: "green", False: "red"}


def quickstart(
    *,
    name: str = "",
    runs: Path = Path("runs"),
    seed: int = 0,
    method: Literal["auto", "full", "lora"] = "auto",
    until: Literal["sft", "reward", "ppo"] | None = None,
    model: str = "",
    data: str = "",
    template: str = "auto",
    steps: int = 100,
    learning_rate: float | None = None,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train a small model here in minutes, all the way to PPO, and talk to it.

    It makes a small world of lists, sums and tables, pre-trains a small LLaMA on texts about it, fine-tunes it on
    demonstrations, trains a reward model on pairs of answers, and lets the model learn from its scores. Every model is
    asked questions it has never seen. No network, no GPU.

    Examples:

      zhibei quickstart

      zhibei quickstart --until sft

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
    until
        End after fine-tuning (sft) or after the reward model (reward); by default after PPO. The same command without
        it goes on from there. Your own model is only fine-tuned: `zhibei run` takes it further.
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
    if model and until in ("reward", "ppo"):
        raise UserError(
            f"--until {until} with your own model and data",
            expected="fine-tuning only: preferences of people are not in your rows",
            fix="leave --until out; with preference pairs, a pipeline file goes on from runs/quickstart/sft "
            "(zhibei run --help)",
            where="--until",
        )
    from zhibei.pipeline.place import Order, find_place

    method = ("lora" if model else "full") if method == "auto" else method
    until = until or ("sft" if model else "ppo")
    order = Order(seed, method, model, data, template, steps, learning_rate, until)
    place = find_place(runs, name or "quickstart", order, is_named=bool(name))
    story = Story(choose_mode(quiet=quiet or json), num_stages=4 if model else NUM_STAGES[until])
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
    write_quickstart_page(outcome, runs=["sft"] if order.model else ALL_RUNS[order.until])
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

    def __init__(self, mode: str, *, num_stages: int) -> None:
        self._mode: Any = mode
        self._line: ProgressLine | None = None
        self._number = 0
        self._total = num_stages

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
        for line in [*_changes(outcome), *_reward_lines(outcome)]:
            console.stdout.print(line)
        _show_handed_over(outcome)
        console.stdout.print(
            Text(f"\nDone in {as_duration(outcome.summary['total_seconds'])}. ", style="bold").append(
                "Now talk to it, beside the model before, or train it again your way:", style="not bold"
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
    from zhibei.pipeline.outcome import TITLES

    text = Text(_end_of(example["question"]), style="bold")
    for name, answer in example["answers"].items():
        colour = COLOURS.get(example["right"].get(name), "yellow")
        text.append(f"\n   {TITLES[name][0] + ':':<6}", style="dim").append(_short(answer), style=colour)
    if example["expected"] and not all(list(example["right"].values())[-1:]):
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
    from zhibei.pipeline.outcome import TITLES
    from zhibei.pipeline.page import as_score

    metric, names = outcome.stages[0].metric, [stage.name for stage in outcome.stages]
    title = {"exact_match": "Right answers to held-out questions", "heldout_loss": "Held-out loss, nats per token"}
    table = Table(title=title[metric], title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("task" if outcome.by_task else "")
    for name in names:
        table.add_column(TITLES[name][0], justify="right")
    for task, found in outcome.by_task.items():
        table.add_row(task, *(as_score(metric, found[name]["score"]) for name in names))
    table.add_section()
    table.add_row("all", *(as_score(metric, stage.score) for stage in outcome.stages), style="bold")
    intervals = (f"{as_score(metric, stage.low)} to {as_score(metric, stage.high)}" for stage in outcome.stages)
    table.add_row("95 % interval", *intervals, style="dim")
    return table


def _changes(outcome: Outcome) -> list[Text]:
    """What each stage gained and lost on the same questions."""
    from zhibei.pipeline.outcome import TITLES

    lines = []
    for step in outcome.steps:
        pair = step.paired
        lines.append(
            Text(
                f"{TITLES[step.before][0]} to {TITLES[step.after][0]}: {100 * pair.difference:+.1f} points "
                f"({100 * pair.low:+.1f} to {100 * pair.high:+.1f}); {pair.gained} gained, {pair.lost} lost, "
                f"p = {pair.p_value:.2g}"
            )
        )
    return lines


def _reward_lines(outcome: Outcome) -> list[Text]:
    """The learned reward, and the true score beside it."""
    lines = []
    if outcome.reward:
        found = outcome.reward
        parts = ", ".join(f"{100 * part['accuracy']:.0f} % ({ORIGINS[name]})" for name, part in
                          found["by_origin"].items())  # fmt: skip
        lines.append(
            Text(
                f"The reward model puts {100 * found['accuracy']:.0f} % ({100 * found['low']:.0f} to "
                f"{100 * found['high']:.0f}) of {found['pairs']} held-out pairs in order: {parts}"
            )
        )
    if outcome.course:
        first, last = outcome.course[0], outcome.course[-1]
        lines.append(
            Text(
                f"PPO: learned reward {first['learned_reward']:+.2f} to {last['learned_reward']:+.2f}, true score "
                f"{100 * first['true_score']:.1f} % to {100 * last['true_score']:.1f} %, KL {last['kl']:.2f} nats per "
                "token"
            )
        )
    return lines


def _show_handed_over(outcome: Outcome) -> None:
    """Each form the model was written in, beside what it was made of."""
    if outcome.handed_over is None:
        return
    from zhibei.cli.parity_text import as_table

    for form in outcome.handed_over.forms:
        console.stdout.print(Text(f"\n{form.what}: {form.path}", style="bold"))
        console.stdout.print(as_table(form.parity, form.limits))
    if outcome.handed_over.note:
        console.stdout.print(Text(outcome.handed_over.note, style="yellow"))


def _document(outcome: Outcome) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(outcome.folder),
        **outcome.summary,
        "by_task": outcome.by_task,
        "steps": [asdict(step) for step in outcome.steps],
        "reward": outcome.reward,
        "course": outcome.course,
        "handed_over": [
            {"what": form.what, "path": str(form.path), "parity": form.parity.as_dict(form.limits)}
            for form in (outcome.handed_over.forms if outcome.handed_over else ())
        ],
        "examples": outcome.examples,
    }
