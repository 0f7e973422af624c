"""`zhibei parity`: are two forms of a model the same model? Knows the options and the table."""

from __future__ import annotations

from pathlib import Path

from zhibei.cli import console
from zhibei.cli.parity_text import show, telling
from zhibei.config.errors import DONE, USER_MUST_ACT, UserError


def parity(
    reference: str,
    other: str,
    /,
    *,
    kind: str = "same",
    text: str = "",
    base: str = "",
    other_base: str = "",
    device: str = "auto",
    precision: str = "auto",
    json: bool = False,
) -> int:
    """Compare two models, or two forms of one: runs, Hugging Face folders, adapters, GGUF files.

    Tokens of probe texts, tokens of conversations, KL, likeliest token, perplexity, size and speed. Nothing is changed.
    Exit code 0: the same model, as far as its kind goes. 2: something is beyond the limits of that kind.

    Examples:

      zhibei parity runs/my_run runs/my_run/merged --kind merge

      zhibei parity runs/my_run my-model.q4_k_m.gguf --kind q4_k_m

      zhibei parity base-model other-model --text sample.txt --json

    Parameters
    ----------
    reference
        What the other is measured against.
    other
        The model in question.
    kind
        Which limits hold: same, merge, bf16, f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, int8, nf4 and others.
    text
        A text file to compare on; by default held-out rows of the reference's run, else rows it writes itself.
    base
        The base under the reference, where that is an adapter.
    other_base
        The base under the other.
    device
        auto, cpu, cuda.
    precision
        auto, fp32, bf16.
    json
        Print one JSON document instead of the table.
    """
    from zhibei.export.parity_limits import limits_for
    from zhibei.export.proof import measure
    from zhibei.export.sides import FolderSide, open_side

    limits = limits_for(kind)
    mine = open_side(reference, base=base or None, device=device, precision=precision)
    if not isinstance(mine, FolderSide):
        raise UserError(
            f"{reference} is a GGUF file",
            expected="the model it was made from as the first of the two",
            fix=f"zhibei parity MODEL {reference} --kind {kind}",
            where="zhibei parity",
        )
    theirs = open_side(other, base=other_base or None, device=device, precision=precision)
    report = measure(mine, theirs, kind=kind, text=Path(text) if text else None, progress=telling(as_json=json))
    if json:
        console.emit(report.as_dict(limits), as_json=True)
    else:
        show(report, limits)
    return USER_MUST_ACT if report.failures(limits) else DONE
