"""`zhibei report`: build the page of a run again, or one page over several runs. Knows no page's contents."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

from rich.text import Text

from zhibei.cli import console
from zhibei.cli.progress import as_duration, printable
from zhibei.config.errors import UserError

# key of key_figures -> (label, format)
SHOWN = {
    "heldout_loss": ("held-out loss", ".4f"),
    "best_heldout_loss": ("best held-out loss", ".4f"),
    "best_step": ("  at step", ","),
    "base_heldout_loss": ("base model's", ".4f"),
    "train_loss": ("training loss, smoothed", ".4f"),
    "steps": ("optimiser steps", ","),
    "tokens": ("tokens trained", ","),
    "supervised_share": ("  of them supervised", ".1%"),
    "tokens_per_s": ("tokens per second", ",.0f"),
    "peak_gib": ("peak GPU memory, GiB", ".2f"),
    "host_gib": ("peak host memory, GiB", ".2f"),
}


def report(*runs: str, out: str = "", open: bool = False, json: bool = False) -> None:
    """Write the report page of a run again, or compare several runs on one page.

    Examples:

      zhibei report runs/my_run

      zhibei report runs/my_run --open

      zhibei report runs/a runs/b --out compare.html

      zhibei report runs/my_run --json

    Parameters
    ----------
    runs
        A run directory; two to eight of them make a page that compares them.
    out
        Where the comparison goes; by default compare.html in the current folder.
    open
        Show the page in the web browser.
    json
        One JSON document: the page's path and the key figures of each run.
    """
    from zhibei.report.compare import write_comparison
    from zhibei.report.inputs import read_inputs
    from zhibei.report.page import write_report
    from zhibei.report.training import key_figures

    run_dirs = [run_directory(run) for run in runs]
    if not run_dirs:
        raise UserError("no run named", expected="a run directory", fix="zhibei report runs/NAME")
    if len(run_dirs) == 1 and out:
        raise UserError(
            "--out has no effect with one run: its page is always report.html in its folder",
            expected="several runs, or no --out",
            fix=f"zhibei report {runs[0]}",
        )
    page = write_report(run_dirs[0]) if len(run_dirs) == 1 else write_comparison(run_dirs, Path(out or "compare.html"))
    figures = {str(run_dir.path): key_figures(read_inputs(run_dir)) for run_dir in run_dirs}
    if json:
        console.emit({"page": str(page.resolve()), "runs": figures}, as_json=True)
    else:
        for name, one in figures.items():
            console.emit(as_text(name, one))
        console.emit(Text(f"page: {page.resolve()}"))
    if open:
        webbrowser.open(page.resolve().as_uri())


def run_directory(run: str) -> Any:
    """The RunDir of a folder that a run wrote; of a folder of several stages, its last one. UserError otherwise."""
    from zhibei.store.pipeline_dir import final_run
    from zhibei.store.run_dir import RunDir

    path = final_run(Path(run))
    run_dir = RunDir(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{run} {what}", expected="a run directory", fix="name the folder, such as runs/my_run", where="RUNS"
        )
    if not any(file.exists() for file in (run_dir.metrics, run_dir.manifest, run_dir.resolved, run_dir.run_file)):
        raise UserError(
            f"{run} is not a run directory",
            expected="a folder with metrics.jsonl, manifest.json or run.yaml",
            fix="name the folder that training wrote, such as runs/my_run",
            where="RUNS",
        )
    return run_dir


def as_text(name: str, figures: dict[str, Any]) -> Text:
    """The key figures that are known, one a line."""
    text = Text(name, style="bold").append(f"  {figures['status']}", style="not bold")
    if figures["reason"]:
        text.append(f": {printable(figures['reason'])}", style="not bold")
    for key, (label, style) in SHOWN.items():
        if figures[key] is not None:
            text.append(f"\n  {label:<24} {format(figures[key], style):>14}", style="not bold")
    if figures["seconds"] is not None:
        text.append(f"\n  {'time':<24} {as_duration(figures['seconds']):>14}", style="not bold")
    for file, problem in figures["problems"].items():
        text.append(f"\n  {file}: {problem}", style="yellow")
    return text
