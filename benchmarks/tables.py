"""The tables of docs/measurements.md, made from result files. Knows records, not how they were measured.

`python -m benchmarks.tables` rewrites what lies between `<!-- table NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_tables import export_rows, resume_rows, save_rows
from benchmarks.decode_tables import decode_rows
from benchmarks.doctor_tables import bad_inputs_rows, check_rows, coverage_rows, explain_rows
from benchmarks.gguf_tables import loss_rows, speed_rows
from benchmarks.records import RESULTS, Record, read
from benchmarks.stage_tables import ppo_rows, serve_rows, stage_memory_rows, tracked_rows

PAGE = Path(__file__).resolve().parents[1] / "docs" / "measurements.md"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; figures (columns whose header ends in a unit) are not aligned, plain text stays plain."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def with_spread(record: Record, figure: str, digits: int = 0) -> str:
    """`12,345 (12,300 to 12,400)`: the median, and the lowest and highest of the repeats."""
    value = record.get(figure)
    if value is None:
        return "-"
    low_high = record.get("spread", {}).get(figure)
    shown = f"{value:,.{digits}f}"
    return shown if low_high is None else f"{shown} ({low_high[0]:,.{digits}f} to {low_high[1]:,.{digits}f})"


def _settings(record: Record) -> str:
    settings: dict[str, Any] = record["settings"]
    # Unsloth takes the padding out by itself ("Padding-free auto-enabled"), whatever its batch looks like.
    layout = " packed" if settings["packing"] else (" padding-free" if record["who"] == "Unsloth" else " padded")
    words = [settings["micro_batch"] + layout]
    words.append(f"{settings['checkpointing']} checkpointing".replace("none", "no"))
    if settings.get("compile") is False:
        words.append("not compiled")
    return ", ".join(words)


def sft_table(records: Sequence[Record], method: str) -> str:
    """Who trains how fast and in how much memory, fastest first; failures at the end with their words."""
    chosen = [record for record in records if record["benchmark"] == "sft" and record["method"] == method]
    chosen = [record for record in chosen if "layers" not in record["settings"]]  # smoke tests are no measurements
    measured = sorted((r for r in chosen if "error" not in r), key=lambda r: -r["useful_tokens_per_s"])
    rows = [
        [
            f"{record['who']} {record['version']}",
            record["settings"]["weights"],
            _settings(record),
            with_spread(record, "useful_tokens_per_s"),
            f"{record['model_tflops']:.0f}",
            "-" if record["peak_gib"] is None else f"{record['peak_gib']:.1f}",
            with_spread(record, "seconds", 2),
            f"{record['warmup_seconds']:.0f}",
        ]
        for record in measured
    ]
    for record in chosen:
        if "error" in record:
            words = record["error"].replace("|", "/")[:160]
            tried = record["settings"]["arguments"]
            rows.append([record["who"], "-", f"`{tried}`", f"failed: {words}", "-", "-", "-", "-"])
    header = ["who", "weights", "settings", "useful tok/s", "model TFLOP/s", "peak GiB", "s per step", "warm-up s"]
    return markdown(header, rows) + "\n\n" + provenance(measured)


def ceiling_table(records: Sequence[Record]) -> str:
    """What the card gives at best."""
    chosen = [record for record in records if record["benchmark"] == "ceiling"]
    rows = []
    for record in chosen:
        figure, unit = ("model_tflops", "TFLOP/s") if "model_tflops" in record else ("terabytes_per_s", "TB/s")
        size = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
        rows.append([record["method"], size, f"{with_spread(record, figure, 1)} {unit}"])
    return markdown(["what", "size", "rate"], rows) + "\n\n" + provenance(chosen)


def parity_table(records: Sequence[Record]) -> str:
    """How far every step is from the Trainer's."""
    rows = []
    for record in records:
        settings, difference = record["settings"], record["difference"]
        heldout = record["ours"]["heldout"]
        rows.append(
            [
                record["method"],
                f"{settings['model']}, {settings['max_steps']} steps of {settings['global_batch']} rows",
                f"{heldout[0]:.4f} to {heldout[-1]:.4f}",
                *(
                    f"{difference[name]['largest']:.1e} / {difference[name]['mean']:.1e}"
                    for name in ("losses", "grad_norms", "heldout")
                ),
            ]
        )
    header = ["method", "run", "held-out loss", "loss: largest / mean", "gradient norm", "held-out loss"]
    return markdown(header, rows) + "\n\n" + provenance(records)


def prepare_table(records: Sequence[Record]) -> str:
    """One line per tokenizer and number of worker processes."""
    rows = [
        [
            record["settings"]["tokenizer"],
            str(record["settings"]["workers"]),
            f"{record['settings']['rows']:,}",
            with_spread(record, "seconds", 1),
            f"{record['rows_per_s']:,}",
            f"{record['cached_seconds']:.2f}",
        ]
        for record in records
    ]
    header = ["tokenizer", "workers", "rows", "seconds", "rows per s", "seconds from the cache"]
    return markdown(header, rows) + "\n\n" + provenance(records)


def generate_table(records: Sequence[Record]) -> str:
    """zhibei and transformers on the same prompts, one thread."""
    rows = [
        [
            f"{record['who']} {record['version']}",
            str(record["settings"]["batch"]),
            record["settings"]["ends"],
            with_spread(record, "useful_tokens_per_s"),
        ]
        for record in sorted(records, key=lambda r: (r["settings"]["batch"], r["settings"]["ends"], r["who"]))
    ]
    return markdown(["who", "batch", "answers end at", "tok/s"], rows) + "\n\n" + provenance(records)


def real_rows_table(records: Sequence[Record]) -> str:
    """Held-out loss before and after a short run on each kind of rows."""
    rows = [
        [
            record["settings"]["rows"],
            record["settings"]["template"],
            record["method"],
            f"{record['rows_kept']:,} (+{record['rows_dropped']:,} dropped)",
            f"{record['heldout_loss_before']:.3f}",
            f"{record['heldout_loss_after']:.3f}",
            "all passed" if record["proofs_passed"] else "FAILED",
        ]
        for record in records
    ]
    header = ["rows", "template", "method", "rows kept", "held-out before", "after", "proofs"]
    return markdown(header, rows) + "\n\n" + provenance(records)


def memory_table(records: Sequence[Record], grid: str) -> str:
    """Peak GPU memory, predicted and measured, with the error now and before anything was measured."""
    chosen = [record for record in records if record["settings"]["grid"] == grid and "error" not in record]
    rows = []
    for record in sorted(chosen, key=lambda each: -each["measured_gib"]):
        settings, measured = record["settings"], record["measured_gib"]
        words = [settings["precision"], settings["optimizer"]]
        words += [f"{settings['checkpointing']} checkpointing"] * (settings["checkpointing"] != "none")
        words += ["not compiled"] * (not settings["compile"]) + ["padded"] * (not settings["packing"])
        words += [f"rank {settings['rank']}"] * (settings["method"] != "full")
        words += [settings["quantize"]] * (settings["quantize"] != "none")
        first = 100 * (record["first_predicted_gib"] / measured - 1)
        rows.append(
            [
                f"{settings['shape']}, {settings['layers']} layers",
                settings["method"],
                ", ".join(words),
                f"{record['num_passes']} x {record['pass_tokens']:,}",
                f"{measured:.2f}",
                f"{record['predicted_gib']:.2f}",
                f"{record['error_percent']:+.1f} %",
                f"{first:+.1f} %",
            ]
        )
    errors = sorted(abs(record["error_percent"]) for record in chosen)
    firsts = sorted(abs(100 * (each["first_predicted_gib"] / each["measured_gib"] - 1)) for each in chosen)
    header = ["shape", "method", "settings", "passes x tokens", "measured GiB", "predicted GiB", "error", "before"]
    summary = "Not measured yet."
    if errors:
        summary = (
            f"{len(errors)} configurations: worst {errors[-1]:.1f} %, median {errors[len(errors) // 2]:.2f} %; before "
            f"they were measured: worst {firsts[-1]:.1f} %, median {firsts[len(firsts) // 2]:.2f} %."
        )
    return markdown(header, rows) + f"\n\n{summary} " + provenance(chosen)


def plain_table(records: Sequence[Record], make: Callable[..., tuple[list[str], list[list[str]]]]) -> str:
    """A table of `make`'s header and rows, and where its figures come from."""
    header, rows = make(records)
    return markdown(header, rows) + "\n\n" + provenance(records)


def provenance(records: Sequence[Record]) -> str:
    """Where and with what the figures of a table were measured."""
    if not records:
        return "Not measured yet."
    devices = sorted({record["device"] for record in records})
    dates = sorted({record["date"][:10] for record in records})
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            found.setdefault(name, set()).add(version)
    versions = ", ".join(f"{name} {' or '.join(sorted(found[name]))}" for name in sorted(found))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(devices)}. {when}. {versions}."


TABLES: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "sft-full": ("sft.json", lambda records: sft_table(records, "full")),
    "sft-lora": ("sft.json", lambda records: sft_table(records, "lora")),
    "sft-qlora": ("sft.json", lambda records: sft_table(records, "qlora")),
    "ceiling": ("sft.json", ceiling_table),
    "parity-trainer": ("parity_trainer.json", parity_table),
    "real-rows": ("real_rows.json", real_rows_table),
    "prepare": ("prepare.json", prepare_table),
    "memory-grid": ("memory.json", lambda records: memory_table(records, "grid")),
    "memory-held-out": ("memory.json", lambda records: memory_table(records, "held-out")),
    "memory-blind": ("memory.json", lambda records: memory_table(records, "blind")),
    "memory-quantised": ("memory.json", lambda records: memory_table(records, "quantised")),
    "generate-cpu": ("generate_cpu.json", generate_table),
    "memory-stages": ("memory_stages.json", lambda records: plain_table(records, stage_memory_rows)),
    "memory-stages-tracked": ("memory_stages_tracked.json", lambda records: plain_table(records, tracked_rows)),
    "ppo": ("ppo.json", lambda records: plain_table(records, ppo_rows)),
    "serve": ("serve.json", lambda records: plain_table(records, serve_rows)),
    "decode": ("decode.json", lambda records: plain_table(records, decode_rows)),
    "gguf-loss": ("gguf.json", lambda records: plain_table(records, loss_rows)),
    "gguf-speed": ("gguf.json", lambda records: plain_table(records, speed_rows)),
    "checkpoint-saves": ("checkpoints.json", lambda records: plain_table(records, save_rows)),
    "checkpoint-export": ("checkpoints.json", lambda records: plain_table(records, export_rows)),
    "checkpoint-resume": ("checkpoints.json", lambda records: plain_table(records, resume_rows)),
    "check": ("check.json", lambda records: plain_table(records, check_rows)),
    "coverage": ("check.json", lambda records: plain_table(records, coverage_rows)),
    "bad-inputs": ("bad_inputs.json", lambda records: plain_table(records, bad_inputs_rows)),
    "explain": ("explain.json", lambda records: plain_table(records, explain_rows)),
}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with every marked table made anew. Raises ValueError for a marker that names no table."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is called {name}; there are: {', '.join(TABLES)}")
        file, make = TABLES[name]
        records = read(results / file)
        made = make(records) if records else "Not measured yet."
        return f"<!-- table {name} -->\n{made}\n<!-- end {name} -->"

    return re.sub(r"<!-- table (?P<name>\S+) -->\n.*?<!-- end (?P=name) -->", table, page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the page is stale")
    options = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
