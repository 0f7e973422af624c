"""Tables of the stages after supervised training: memory, and seconds of a PPO iteration. Knows records only."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.records import Record


def stage_memory_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Peak GPU memory by stage and settings, predicted and measured, largest error first."""
    header = ["what", "method", "shape", "measured GiB", "predicted GiB", "error", "where the plan sees the peak"]
    chosen = [record for record in records if "error" not in record]
    rows = [
        [
            record["settings"]["name"],
            record["method"],
            f"{record['settings']['shape']}, {record['settings']['layers']} layers",
            f"{record['measured_gib']:.2f}",
            f"{record['predicted_gib']:.2f}",
            f"{record['error_percent']:+.1f} %",
            record["peak_at"],
        ]
        for record in sorted(chosen, key=lambda each: -abs(each["error_percent"]))
    ]
    return header, rows


def tracked_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The same of narrow models, tensors counted on a CPU: in MiB."""
    header = ["what", "method", "shape", "counted MiB", "predicted MiB", "error"]
    rows = [
        [
            record["settings"]["name"],
            record["method"],
            f"{record['settings']['shape']}, {record['settings']['layers']} layers",
            f"{1024 * record['measured_gib']:.0f}",
            f"{1024 * record['predicted_gib']:.0f}",
            f"{record['error_percent']:+.1f} %",
        ]
        for record in sorted(
            (record for record in records if "error" not in record), key=lambda each: -abs(each["error_percent"])
        )
    ]
    return header, rows


def ppo_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Seconds of an iteration by part. The plain side scores rewards together with log-probabilities."""
    header = ["who", "iteration, s", "writing, s", "rewards, s", "scoring, s", "learning, s", "written tok/s", "GiB"]

    def seconds(record: Record, name: str) -> str:
        return "-" if name not in record else f"{record[name]:.1f}"

    names = ("seconds", "writing_seconds", "reward_seconds", "scoring_seconds", "learning_seconds")
    rows = [
        [
            f"{record['who']} {record['version']}",
            *(seconds(record, name) for name in names),
            f"{record['written_tokens_per_s']:,.0f}",
            "-" if record["peak_gib"] is None else f"{record['peak_gib']:.1f}",
        ]
        for record in records
        if "error" not in record
    ]
    return header, rows


def serve_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Requests of many clients at once: rate, waiting, and answers that were lost or wrong."""
    header = ["who", "clients", "requests", "tok/s", "p50 s", "p95 s", "lost", "wrong", "load of the machine"]
    rows = [
        [
            f"{record['who']} {record['version']}",
            str(record["settings"]["clients"]),
            str(record["settings"]["requests"]),
            f"{record['tokens_per_s']:,.0f}",
            f"{record['p50_seconds']:.2f}",
            f"{record['p95_seconds']:.2f}",
            str(record["num_lost"]),
            str(record["num_wrong"]),
            str(record["load_average"][0]),
        ]
        for record in records
        if "error" not in record
    ]
    return header, rows
