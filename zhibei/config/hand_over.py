"""The forms in which a run file can ask for the finished model. Knows their names and sizes, not how they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from zhibei.config.rules import Rule, conflict

if TYPE_CHECKING:
    from zhibei.config.run import RunFile

Form = Literal[
    "merged", "hf", "delta", "meta", "meta:2", "meta:4", "meta:8", "gguf:F32", "gguf:F16", "gguf:BF16", "gguf:Q8_0",
    "gguf:Q6_K", "gguf:Q5_K_M", "gguf:Q5_K_S", "gguf:Q4_K_M", "gguf:Q4_K_S", "gguf:Q4_0", "gguf:Q3_K_M", "gguf:Q2_K",
    "gguf:IQ4_NL", "gguf:IQ4_XS", "gguf:IQ3_M", "gguf:IQ3_S", "gguf:IQ3_XXS",
]  # fmt: skip

GGUF_BITS: dict[str, float] = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K_M": 5.70, "Q5_K_S": 5.57, "Q4_K_M": 4.89,
    "Q4_K_S": 4.67, "Q4_0": 4.68, "Q3_K_M": 4.02, "Q2_K": 3.16, "IQ4_NL": 4.68, "IQ4_XS": 4.46, "IQ3_M": 3.76,
    "IQ3_S": 3.66, "IQ3_XXS": 3.25,
}  # fmt: skip
"""Bits a weight of LLaMA 3.1 8B takes in each type (llama.cpp, tools/quantize/README.md); Q4_0 and Q3_K_M from the
sizes of the table in tools/perplexity/README.md."""
WANT_IMPORTANCE = ("IQ3_M", "IQ3_S", "IQ3_XXS")
"""GGUF types that need an importance matrix; it is taken from the run's own training rows."""
ROWS_OF_THEIR_OWN = ("sft", "dpo")
"""Stages whose training rows are texts with answers, there before the run begins."""


def parts_of(form: str) -> tuple[str, str]:
    """`gguf:Q8_0` -> ("gguf", "Q8_0"), `meta:2` -> ("meta", "2"), `hf` -> ("hf", "")."""
    kind, _, of = form.partition(":")
    return kind, of


def needs_importance(form: str) -> bool:
    kind, of = parts_of(form)
    return kind == "gguf" and of in WANT_IMPORTANCE


def _has_any(run: RunFile) -> bool:
    return bool(run.hand_over)


HAND_OVER_RULES: list[Rule] = [
    conflict(
        lambda run: len(set(run.hand_over)) < len(run.hand_over),
        "hand_over",
        "hand_over",
        "a form is named twice",
        "name each form once",
    ),
    conflict(
        lambda run: "merged" in run.hand_over and run.model.method == "full",
        "hand_over",
        "model.method",
        "with model.method: full the trained model is whole already, and merged would make nothing of it",
        "take merged out of hand_over; hf makes a copy with a model card",
    ),
    conflict(
        lambda run: _has_any(run) and run.stage == "reward",
        "hand_over",
        "stage",
        "a reward model gives scores and has no other form",
        "remove hand_over; the run's directory is what ppo.reward_model and zhibei.judge take",
    ),
    conflict(
        lambda run: run.stage not in ROWS_OF_THEIR_OWN and any(map(needs_importance, run.hand_over)),
        "hand_over",
        "stage",
        f"{', '.join(WANT_IMPORTANCE)} need an importance matrix from training rows, and the answers of this stage are "
        "generated",
        "take a type that needs none, such as gguf:IQ4_XS, or export afterwards with --imatrix-from TEXT",
    ),
]
