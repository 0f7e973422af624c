"""Tables of what GGUF types cost and how fast they are read on a processor. Knows records, not how they are made."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record


def loss_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line per type, the largest file first."""
    chosen = sorted((record for record in records if record["benchmark"] == "gguf_loss"), key=lambda r: -r["mib"])
    header = ["type", "MiB", "KL, nats per token", "same likeliest token", "perplexity", "tensors"]
    rows = [
        [
            record["method"],
            f"{record['mib']:.2f}",
            f"{record['kl_mean']:.2g}",
            f"{record['top1_agreement']:.1%}",
            f"{record['perplexity']:.2f} (transformers: {record['reference_perplexity']:.2f})",
            ", ".join(f"{count} {name}" for name, count in record["types"].items()),
        ]
        for record in chosen
    ]
    return header, rows


def speed_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line per type and side."""
    chosen = [record for record in records if record["benchmark"] == "gguf_speed"]
    header = ["type", "who", "threads", "tok/s (lowest to highest)", "same text"]
    rows = [
        [
            record["method"],
            record["who"],
            str(record["settings"]["threads"]),
            f"{record['tokens_per_s']:.0f} ({record['spread']['tokens_per_s'][0]:.0f} to "
            f"{record['spread']['tokens_per_s'][1]:.0f})",
            "yes" if record["same_text"] else "no",
        ]
        for record in sorted(chosen, key=lambda record: (record["method"], record["who"]), reverse=True)
    ]
    return header, rows
