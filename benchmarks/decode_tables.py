"""The table of decode speed on a GPU. Knows records, not how they are measured."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record


def decode_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """One line per case, by weights and batch."""
    chosen = [record for record in records if record["benchmark"] == "decode"]
    header = [
        "weights", "batch", "who", "decode tok/s", "with prompts, tok/s", "peak GiB", "weights GiB", "preparing, s",
    ]  # fmt: skip

    def place(record: Record) -> tuple[str, int, float]:
        settings = record["settings"]
        return settings["weights"] + settings["choice"], settings["batch"], -record["decode_tokens_per_second"]

    rows = [
        [
            record["settings"]["weights"] + (", sampled" if record["settings"]["choice"] != "greedy" else ""),
            str(record["settings"]["batch"]),
            f"{record['who']} {record['version']}, {record['method']}",
            f"{record['decode_tokens_per_second']:,.0f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['peak_gib']:.1f}",
            f"{record['weights_gib']:.1f}",
            f"{record['preparing_seconds']:.1f}",
        ]
        for record in sorted((one for one in chosen if "error" not in one), key=place)
    ]
    return header, rows
