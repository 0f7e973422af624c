"""`zhibei run`: several stages as one file, and what `zhibei check` and `zhibei plan` say of such a file.

Knows what is shown, not what a stage does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.cli.check import lines_of, machine_of
from zhibei.cli.progress import ProgressLine, as_duration, choose_mode
from zhibei.cli.rehearse import is_wanted, rehearse_before
from zhibei.config.errors import DONE, USER_MUST_ACT
from zhibei.config.read import with_compat_set
from zhibei.config.resolve import ResolvedRun

if TYPE_CHECKING:
    from zhibei.pipeline.foresee import Foreseen
    from zhibei.plan.search import Candidate

NEWS = ("started", "resumed", "stopped", "interrupted", "warning", "evaluated", "handed over", "rolled back")


def run(
    pipeline: str, /, *overrides: str, compat: str = "", dry_run: bool = False, quiet: bool = False, json: bool = False
) -> int:
    """Run several stages as one file: SFT, reward model, PPO, evaluation.

    Or DPO, GRPO, RAFT in place of PPO, and any order of them. Everything is checked before anything runs. Stopped at
    any point, the same command goes on, and what is finished is left alone. All of it lands in one folder with one
    report.

    Examples:

      zhibei run pipeline.yaml
      zhibei run pipeline.yaml --dry-run
      zhibei run coati-7b model.path=llama-7b --compat coati-2023 --dry-run
      zhibei run pipeline.yaml model.path=llama-7b runs=/data/runs name=second
      zhibei run pipeline.yaml stages.ppo.ppo.learning_rate=1e-6 stages.sft.sft.epochs=2

    Parameters
    ----------
    pipeline
        A pipeline file: shared settings, and `stages:` with one entry for each (docs/pipelines.md); or a shipped one,
        coati-7b.
    overrides
        Settings laid over it: model.path=... for all stages, stages.NAME.section.field=... for one.
    compat
        A set of numbers to be laid over the recipe: coati-2023 (docs/recipes.md says what it changes).
    dry_run
        Check every stage and show memory, disk and time of each; load no weights, write no run.
    quiet
        Print only what went wrong, and the last word.
    json
        One JSON document: what every stage made, with all scores; nothing else on stdout.
    """
    from zhibei.pipeline.file import read_pipeline
    from zhibei.pipeline.run import run_pipeline

    overrides = with_compat_set(overrides, compat)
    read = read_pipeline(pipeline, overrides)
    if dry_run:
        return look_at(pipeline, overrides, json=json, quiet=quiet)
    story = Story(choose_mode(quiet=quiet or json))
    try:
        outcome = run_pipeline(read, watch=story, rehearse=_rehearse(quiet or json), on_foreseen=story.checked)
    finally:
        story.close()
    if json:
        console.emit(outcome, as_json=True)
        return DONE
    _tell(outcome)
    from zhibei.pipeline.report import next_commands

    console.stdout.print(Text(f"\nDone in {as_duration(outcome['seconds'])}.", style="bold"))
    for command in next_commands(read, outcome):
        console.stdout.print(Text(f"  {command}", style="cyan"))
    console.stdout.print(Text(f"The whole story:  {read.folder / 'report.html'}"))
    return DONE


def look_at(
    pipeline: str | Path,
    overrides: Sequence[str],
    *,
    machine: str = "",
    plans: bool = True,
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Check every stage of a pipeline file and, with `plans`, show what each needs. 2 when one would be stopped or does
    not fit."""
    from zhibei.pipeline.asked import require_as_asked
    from zhibei.pipeline.file import read_pipeline
    from zhibei.pipeline.foresee import foresee

    read = read_pipeline(pipeline, overrides)
    require_as_asked(read)
    told = (lambda name: None) if json or quiet else (lambda name: console.stderr.print(f"looking at {name}"))
    found = foresee(read, machine=machine_of(machine), plans=plans, on_stage=told)
    is_bad = any(one.blocks or (one.outlook is not None and not one.outlook.fits) for one in found)
    if json:
        document = {"pipeline": read.name, "folder": str(read.folder), "blocks": any(one.blocks for one in found),
                    "stages": [one.as_dict() for one in found]}  # fmt: skip
        console.emit(document, as_json=True)
        return USER_MUST_ACT if is_bad else DONE
    for line in _findings(found):
        console.stdout.print(line)
    if plans:
        console.stdout.print(_plan_table(found))
    stopped = sum(one.blocks for one in found)
    verdict = f"{stopped} of {len(found)} stages would be stopped." if stopped else "Nothing stops these stages."
    later = " A stage is checked again when it is reached, with what the earlier ones made."
    text = Text(verdict, style="bold red" if stopped else "bold green").append(later, style="not bold dim")
    console.stdout.print(text)
    return USER_MUST_ACT if is_bad else DONE


def _findings(found: Sequence[Foreseen]) -> list[Text]:
    lines: list[Text] = []
    for one in found:
        if one.checkup is not None and one.checkup.findings:
            lines.append(Text(f"stage {one.stage.name}:", style="bold"))
            lines += lines_of(one.checkup)
    return lines


def _plan_table(found: Sequence[Foreseen]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in ("stage", "kind", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("GiB", "disk", "steps", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("way", no_wrap=True, overflow="ellipsis")
    disk = 0.0
    for one in found:
        ahead = one.outlook
        if ahead is None:
            table.add_row(one.stage.name, one.stage.kind, one.state, "", "", "", "", one.unplanned, style="dim")
            continue
        chosen = ahead.search.chosen
        memory = chosen.memory
        held = memory.device_gib if memory.capacity_gib is not None else memory.host_gib
        own_disk = memory.disk.peak_gib if memory.disk is not None else 0.0
        disk += own_disk
        hours = ahead.search.hours
        table.add_row(
            one.stage.name, one.stage.kind, one.state, _gib(held), _gib(own_disk), str(one.num_steps or "?"),
            as_duration(3600 * hours) if hours is not None else "?",
            _way(chosen) if ahead.fits else "DOES NOT FIT", style="" if ahead.fits else "bold red",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", "", "", "", _gib(disk), "", "", "disk adds up")
    return table


def _way(chosen: Candidate) -> str:
    how = chosen.job.checkpointing
    return f"{chosen.micro_batch_tokens:,} tokens a pass" + (f", {how} checkpointing" if how != "none" else "")


def _gib(size: float) -> str:
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def _rehearse(quiet: bool) -> Any:
    """A stage is rehearsed before it starts where its run file asks for it, as `zhibei train` does."""

    def rehearse(resolved: ResolvedRun) -> dict[str, Any] | None:
        return rehearse_before(resolved, quiet=quiet) if is_wanted(resolved) else None

    return rehearse


def _tell(outcome: dict[str, Any]) -> None:
    """The scores of every evaluation, a line per model."""
    from zhibei.pipeline.report import shown

    titles = {"loss": "held-out loss, nats per token", "right": "right answers", "judge": "score of the reward model"}
    for entry in outcome["stages"]:
        for metric, scores in entry.get("scores", {}).get("scores", {}).items():
            table = Table(title=f"{entry['name']}: {titles[metric]}", title_justify="left", show_edge=False)
            for column in ("", "score", "95 % interval", "number"):
                table.add_column(column, justify="left" if not column else "right")
            for name, found in scores.items():
                interval = f"{shown(found, 'low')} to {shown(found, 'high')}"
                table.add_row(name, shown(found), interval, str(found["number"]))
            console.stdout.print(table)


class Story:
    """What a person sees while stages run: a heading for each and the live line of training below it."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._line: ProgressLine | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "stage":
            self.close()
            heading = Text(f"\n{record['number']}/{record['of']}  {record['name']} ({record['stage']}): ", style="bold")
            self._say(heading.append(record["text"], style="not bold"))
            self._line = ProgressLine(self._mode)
        elif self._line is not None and (record.get("kind") != "event" or record.get("event") in NEWS):
            self._line(record)

    def checked(self, found: Sequence[Foreseen]) -> None:
        """The findings of all stages, before anything runs."""
        for line in _findings(found):
            self._say(line)
        self._say(Text(f"{len(found)} stages checked: {', '.join(f'{one.stage.name} ({one.state})' for one in found)}"))

    def close(self) -> None:
        """Give the terminal back."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _say(self, text: Text) -> None:
        if self._mode != "quiet":
            console.stderr.print(text)
