"""Tables of the stages after supervised training: memory, and seconds of a PPO iteration. Knows records only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.records import Record


def stage_memory_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Peak GPU memory by stage and settings, predicted and measured, largest error first."""
    header = ["what", "method", "shape", "measured GiB", "predicted GiB", "error", "where the plan sees the peak"]
    chosen = _by_error(records)
    return header, [[*_error_cells(one, lambda gib: f"{gib:.2f}"), one["peak_at"]] for one in chosen]


def tracked_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The same of narrow models, tensors counted on a CPU: in MiB."""
    header = ["what", "method", "shape", "counted MiB", "predicted MiB", "error"]
    return header, [_error_cells(one, lambda gib: f"{1024 * gib:.0f}") for one in _by_error(records)]


def _by_error(records: Sequence[Record]) -> list[Record]:
    measured = (record for record in records if "error" not in record)
    return sorted(measured, key=lambda each: -abs(each["error_percent"]))


def _error_cells(record: Record, shown: Callable[[float], str]) -> list[str]:
    settings = record["settings"]
    return [
        settings["name"],
        record["method"],
        f"{settings['shape']}, {settings['layers']} layers",
        shown(record["measured_gib"]),
        shown(record["predicted_gib"]),
        f"{record['error_percent']:+.1f} %",
    ]


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
