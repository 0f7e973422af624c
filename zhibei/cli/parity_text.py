"""How a comparison of two models looks in a terminal. Knows the report, not how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.cli.progress import choose_mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from zhibei.export.hand_over import Proving
    from zhibei.export.parity import Agreement, ParityReport
    from zhibei.export.parity_limits import Limits

UNITS = ("B", "KiB", "MiB", "GiB")


def size(num_bytes: float) -> str:
    for unit in UNITS:
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def as_table(report: ParityReport, limits: Limits) -> Table:
    """One line a figure: both sides, the difference, and the worst that passes."""
    mine, theirs = report.reference, report.other
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in ("reference", "other", "difference", "at most"):
        table.add_column(head, justify="right", no_wrap=True)
    share = theirs.bytes_on_disk / max(1, mine.bytes_on_disk)
    speed = theirs.tokens_per_second / max(1e-9, mine.tokens_per_second)
    changed = f"{report.perplexity_change:+.3%}"
    rows = [
        ("tokens of probe texts", "", "", _agreement(report.tokenizer), "all equal"),
        ("tokens of conversations", "", "", _agreement(report.template), "all equal"),
        ("KL, mean (nats/token)", "", "", f"{report.kl_mean:.3g}", f"{limits.kl_mean:g}"),
        ("KL, largest", "", "", f"{report.kl_max:.3g}", ""),
        ("likeliest token agrees", "", "", f"{report.top1_agreement:.2%}", f"least {limits.top1_agreement:.1%}"),
        (
            "perplexity", f"{mine.perplexity:.5g}", f"{theirs.perplexity:.5g}", changed,
            f"{limits.perplexity_change:+.1%}",
        ),
        ("size on disk", size(mine.bytes_on_disk), size(theirs.bytes_on_disk), f"x {share:.3g}", ""),
        ("tokens read/s", f"{mine.tokens_per_second:,.0f}", f"{theirs.tokens_per_second:,.0f}", f"x {speed:.3g}", ""),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return table


def _agreement(found: Agreement) -> str:
    return f"{found.num_equal} of {found.num_asked} equal"


def show(report: ParityReport, limits: Limits) -> None:
    """The table, where the rows come from, and what is beyond its limit."""
    console.stdout.print(Text(f"reference: {report.reference.name}\nother:     {report.other.name}"))
    console.stdout.print(as_table(report, limits))
    console.stdout.print(Text(f"on {report.num_rows} rows, {report.num_tokens:,} tokens: {report.rows_from}", "dim"))
    for line in report.notes:
        console.stdout.print(Text(f"note: {line}", style="yellow"))
    failures = report.failures(limits)
    for line in failures:
        console.stdout.print(Text(f"beyond its limit: {line}", style="red"))
    if not failures:
        console.stdout.print(Text(f"the same model, as far as {report.kind} goes", style="bold green"))


def proving_of(text: str, *, no_parity: bool, device: str, precision: str, as_json: bool) -> Proving:
    """What the options of a command say of the comparison at its end."""
    from zhibei.export.hand_over import Proving

    return Proving(not no_parity, Path(text) if text else None, device, precision, telling(as_json=as_json))


def telling(*, as_json: bool) -> Callable[[str, int, int], None]:
    """A progress callback: a live line on a terminal, nothing where nobody looks."""
    if choose_mode(as_json=as_json) != "live":
        return lambda what, done, total: None

    def tell(what: str, done: int, total: int) -> None:
        end = "\n" if done >= total else "\r"
        console.stderr.print(Text(f"{what[-60:]}  {done / max(1, total):4.0%}", style="dim"), end=end)

    return tell
