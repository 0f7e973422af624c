"""`zhibei export`: a trained model in the form another program wants. Knows the table of forms and their options."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from zhibei.cli import console
from zhibei.cli.merge import refresh_report, tell
from zhibei.cli.parity_text import proving_of, show, size
from zhibei.config.errors import UserError

FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf": (
        "a complete Hugging Face folder with a model card; also from Meta's files or a checkpoint",
        ("dtype", "checkpoint"),
    ),
    "gguf": ("GGUF files for llama.cpp and Ollama", ("types", "imatrix", "imatrix_from", "split_gib", "template")),
    "meta": ("Meta's consolidated.*.pth and params.json (LLaMA only)", ("shards",)),
    "delta": ("the weight difference to the base, as Alpaca and Vicuna came", ("dtype", "new_rows")),
    "recover": ("the whole model of a weight difference and its base", ("dtype", "new_rows")),
    "adapter": ("a LoRA out of a model tuned in full, by SVD", ("rank",)),
}
"""Name of a form -> what it is, and the options that only some forms have."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """Options that only some forms have."""

    checkpoint: str = ""
    """hf: a checkpoint of the run (step-000200, 200, newest) instead of its finished model, tensor by tensor."""
    dtype: str = "as-base"
    """Type of the weights: as-base, bf16, fp16 or fp32 (hf, delta, recover)."""
    types: str = "Q8_0"
    """GGUF types with commas: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_XS and others."""
    imatrix: str = ""
    """GGUF: an importance matrix from a file, or `run` to take it from the run's training rows."""
    imatrix_from: str = ""
    """GGUF: take the importance matrix from this text."""
    split_gib: float = 0.0
    """GGUF: the most GiB of one file; 0 for no limit."""
    template: str = ""
    """GGUF: another prompt template than the one the model was trained with."""
    shards: int = 1
    """Meta: in how many files (1, 2, 4, 8)."""
    new_rows: str = "zeros"
    """Differences: what the base has for tokens it lacks: zeros (Vicuna) or mean (Alpaca)."""
    rank: int = 16
    """Adapter: its rank."""


OWN = Own()


def export(
    source: str = "",
    /,
    *,
    to: str = "",
    base: str = "",
    out: str = "",
    own: Annotated[Own, Parameter(name="*")] = OWN,
    text: str = "",
    no_parity: bool = False,
    device: str = "auto",
    precision: str = "auto",
    json: bool = False,
) -> None:
    """Hand a model over in another form: Hugging Face, GGUF, Meta and others; proved to be still the same model.

    Without --to: the table of forms. An adapter is merged on the way. When the new form is further from the model than
    its kind may be, nothing is left and the exit code is 2. What it is made from is not touched.

    Examples:

      zhibei export runs/my_run --to hf

      zhibei export runs/my_run --to hf --checkpoint step-000200

      zhibei export runs/my_run --to gguf --types Q8_0,Q4_K_M

      zhibei export runs/my_run --to gguf --types IQ4_XS --imatrix run

      zhibei export runs/my_run --to meta --shards 2

      zhibei export path/to/metas-files --to hf --out my-llama

      zhibei export runs/my_run --to delta

      zhibei export path/to/delta --to recover --base path/to/base

      zhibei export runs/my_run --to adapter --rank 32

    Parameters
    ----------
    source
        A run, a Hugging Face folder, an adapter, or for some forms Meta's files or a weight difference.
    to
        hf, gguf, meta, delta, recover or adapter.
    base
        The base of an adapter or difference, where it lies elsewhere than when it was trained.
    out
        The new folder; by default exports/FORM in the run.
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
    if not to and not json:
        console.stdout.print(table_of_forms())
        return
    require_effect(to, own)
    if not source:
        raise UserError("nothing named", expected="a run or a model", fix=f"zhibei export runs/NAME --to {to}")
    proving = proving_of(text, no_parity=no_parity, device=device, precision=precision, as_json=json)
    place = Path(out) if out else None
    if to == "gguf":
        _gguf(source, own, base=base or None, out=place, how=(proving, json))
        return
    if own.checkpoint:
        from zhibei.export.checkpoints import export_checkpoint

        told = {"base": base or None, "out": place, "dtype": own.dtype, "progress": proving.progress}
        tell(export_checkpoint(source, own.checkpoint, **told), as_json=json)
        return
    from zhibei.export import forms

    wanted = forms.Wanted(base or None, place, own.dtype, own.shards, own.rank, own.new_rows, proving)
    made = forms.FORMS[to](source, wanted)
    refresh_report(source)
    tell(made, as_json=json)


def require_effect(to: str, own: Own) -> None:
    """Raises UserError for an unknown form, and for an option that the form does not have."""
    if to not in FORMS:
        raise UserError(
            f"there is no form {to}" if to else "no form named",
            expected=f"one of {', '.join(FORMS)}",
            fix="zhibei export  shows what each is",
            where="--to",
        )
    for name, value in asdict(own).items():
        if value != getattr(OWN, name) and name not in FORMS[to][1]:
            option = "--" + name.replace("_", "-")
            has_it = [form for form, (_, options) in FORMS.items() if name in options]
            raise UserError(
                f"{option} has no effect with --to {to}",
                expected=f"{option} with --to {' or '.join(has_it)}",
                fix="leave it out",
                where=option,
            )


def table_of_forms() -> Table:
    """Every form with its own options."""
    table = Table(box=None, pad_edge=False)
    for head in ("--to", "what it is", "options"):
        table.add_column(head, overflow="fold")
    for name, (what, options) in FORMS.items():
        table.add_row(name, what, " ".join("--" + option.replace("_", "-") for option in options))
    return table


def _gguf(source: str, own: Own, *, base: str | None, out: Path | None, how: tuple[Any, bool]) -> None:
    from zhibei.export.gguf.hand_over import Wanted, hand_over_gguf
    from zhibei.export.parity_limits import limits_for

    proving, as_json = how
    wanted = Wanted(
        types=tuple(name.strip() for name in own.types.split(",") if name.strip()),
        imatrix=Path(own.imatrix) if own.imatrix not in ("", "run") else None,
        imatrix_text=Path(own.imatrix_from) if own.imatrix_from else None,
        imatrix_of_run=own.imatrix == "run",
        split_bytes=int(own.split_gib * 2**30) or None,
        template=own.template or None,
    )
    made = hand_over_gguf(source, base=base, out=out, wanted=wanted, proving=proving)
    refresh_report(source)
    if as_json:
        console.emit(
            {
                "path": str(made.path),
                "files": [
                    {
                        "kind": one.kind,
                        "paths": [str(path) for path in one.paths],
                        "bytes": one.num_bytes,
                        "types": dict(one.types),
                        "parity": report.as_dict(limits_for(report.kind)) if report is not None else None,
                    }
                    for one, report in zip(made.files, made.reports, strict=True)
                ],
                "notes": list(made.notes),
            },
            as_json=True,
        )
        return
    for one, report in zip(made.files, made.reports, strict=True):
        console.stdout.print(Text(f"{one.kind}: {one.paths[0]}, {size(one.num_bytes)}", style="bold"))
        if report is not None:
            show(report, limits_for(report.kind))
    for note in made.notes:
        console.stdout.print(Text(f"note: {note}", style="yellow"))
    if proving.is_wanted is False:
        console.stdout.print(Text("not compared with what it was made from (--no-parity)", style="yellow"))
    console.stdout.print(Text(f"talk to it:  zhibei chat {made.files[0].paths[0]}"))
