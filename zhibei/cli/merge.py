"""`zhibei merge`: adapters and their base become one model. Knows the options and how the result is told."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from zhibei.cli import console
from zhibei.cli.parity_text import proving_of, show, size
from zhibei.config.errors import UserError

if TYPE_CHECKING:
    from zhibei.export.hand_over import HandedOver


def merge(
    *adapters: str,
    base: str = "",
    out: str = "",
    dtype: str = "as-base",
    text: str = "",
    no_parity: bool = False,
    device: str = "auto",
    precision: str = "auto",
    json: bool = False,
) -> None:
    """Merge adapters into their base: one complete Hugging Face folder, proved to be the same model.

    Works tensor by tensor, in the memory of one tensor and without a GPU. The result is compared with base and adapters
    side by side; when it is another model, nothing is left and the exit code is 2. What it is made from is not touched.

    Examples:

      zhibei merge runs/my_run

      zhibei merge runs/my_run --dtype bf16 --out my-model

      zhibei merge runs/a:0.7 runs/b:0.3 --out mixed

      zhibei merge path/to/peft-folder --base path/to/base --json

    Parameters
    ----------
    adapters
        A run of method lora or qlora, or a PEFT folder. Several, each with a weight behind a colon, are added up.
    base
        The 16-bit weights below the adapter, where they lie elsewhere than when it was trained.
    out
        The new folder; by default `merged` in the run.
    dtype
        as-base, bf16, fp16 or fp32: the type of the merged weights.
    text
        A text file to compare on, instead of the run's held-out rows.
    no_parity
        Do not compare at the end, e.g. where the whole model does not fit into memory.
    device
        Where to compare: auto, cpu, cuda.
    precision
        Arithmetic while comparing: auto, fp32, bf16.
    json
        Print one JSON document.
    """
    from zhibei.export.hand_over import merge as merge_adapters

    if not adapters:
        raise UserError("no adapter named", expected="a run or a PEFT folder", fix="zhibei merge runs/NAME")
    proving = proving_of(text, no_parity=no_parity, device=device, precision=precision, as_json=json)
    made = merge_adapters(adapters, base=base or None, out=Path(out) if out else None, dtype=dtype, proving=proving)
    refresh_report(adapters[0])
    tell(made, as_json=json)


def refresh_report(source: str) -> None:
    """The page of the run that something was made of shows it; a model without a run has no page."""
    from zhibei.export.sources import weighted_path
    from zhibei.report.page import write_report
    from zhibei.store.manifest import run_of
    from zhibei.store.pipeline_dir import final_run

    folder = Path(weighted_path(source)[0])
    run = run_of(final_run(folder)) if folder.is_dir() else None
    if run is not None and run.metrics.is_file():
        write_report(run)


def tell(made: HandedOver, *, as_json: bool) -> None:
    """What was made, the comparison, and what to do with it."""
    from zhibei.export.parity_limits import limits_for

    if as_json:
        console.emit(as_facts(made), as_json=True)
        return
    if made.merged is not None:
        facts = made.merged
        console.stdout.print(
            Text(
                f"merged {facts.num_changed} of {facts.num_tensors} tensors, {size(facts.num_bytes)} in {facts.dtype}, "
            )
            + Text(f"{facts.seconds:.1f} s")
        )
        for note in facts.notes:
            console.stdout.print(Text(f"note: {note}", style="yellow"))
    for note in made.notes:
        console.stdout.print(Text(note))
    if made.parity is None and not made.notes:
        console.stdout.print(Text("not compared with what it was made from (--no-parity)", style="yellow"))
    elif made.parity is not None:
        show(made.parity, limits_for(made.parity.kind))
    for point in made.open_points:
        console.stdout.print(Text(f"README.md leaves open: {point.strip('-| ')}", style="yellow"))
    console.stdout.print(Text(f"in {made.path}", style="bold"))
    if (made.path / "tokenizer_config.json").is_file() and made.parity is not None:
        console.stdout.print(Text(f"talk to it:  zhibei chat {made.path}"))


def as_facts(made: HandedOver) -> dict[str, Any]:
    """For `--json`."""
    from zhibei.export.parity_limits import limits_for

    return {
        "path": str(made.path),
        "merged": asdict(made.merged) if made.merged is not None else None,
        "parity": made.parity.as_dict(limits_for(made.parity.kind)) if made.parity is not None else None,
        "open_points": list(made.open_points),
        "notes": list(made.notes),
    }
