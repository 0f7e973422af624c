"""Tables of what saving costs and of runs that went on with other ranks. Knows records, not how they were measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record

MIB = 2**20


def save_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line for each way of saving, and what an export took."""
    header = [
        "saves", "ranks", "parameters", "one checkpoint, MiB", "training waits, s", "until it counts, s",
        "all steps, s", "most memory of a rank, MiB",
    ]  # fmt: skip
    chosen = [record for record in records if record["benchmark"] == "checkpoint_saves"]
    order = ["no saves", "at once", "beside the training"]
    rows = [
        [
            record["method"] + (f", {record['saves']} times" if record["saves"] else ""),
            str(record["settings"]["ranks"]),
            f"{record['settings']['parameters'] / 1e6:.0f} M",
            f"{record['checkpoint_bytes'] / MIB:,.0f}" if record["saves"] else "-",
            "-" if record["waited_seconds"] is None else f"{record['waited_seconds']:.2f}",
            "-" if record["seconds"] is None else f"{record['seconds']:.2f}",
            f"{record['loop_seconds']:.1f}",
            f"{record['peak_bytes'] / MIB:,.0f}",
        ]
        for record in sorted(chosen, key=lambda record: order.index(record["method"]))
    ]
    return header, rows


def export_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """A checkpoint of two ranks as a Hugging Face folder."""
    chosen = [record for record in records if record["benchmark"] == "checkpoint_export"]
    header = ["written model, MiB", "seconds", "rise of the memory, MiB"]
    rows = [
        [f"{record['model_bytes'] / MIB:,.0f}", f"{record['seconds']:.1f}", f"{record['rise_bytes'] / MIB:,.0f}"]
        for record in chosen
    ]
    return header, rows


def resume_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line for each way of going on."""
    chosen = [record for record in records if record["benchmark"] == "checkpoint_resume"]
    header = ["saved by, gone on with", "cut after step", "first loss", "last loss", "largest relative difference"]
    rows = [
        [
            record["method"],
            f"{record['settings']['cut_after']} of {record['settings']['steps']}",
            f"{record['first_loss']:.4f}",
            f"{record['last_loss']:.4f}",
            f"{record['largest_relative_difference']:.1e}",
        ]
        for record in sorted(chosen, key=lambda record: record["settings"]["order"])
    ]
    return header, rows
