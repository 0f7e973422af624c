"""What a stage of a pipeline can be: whatever trains, and what measures or hands over. Knows no stage's work.

To add a kind: its settings, and one line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zhibei.config.effects import STAGES

Makes = Literal["model", "scorer", "scores", "files"]
ANSWERING: tuple[Makes, ...] = ("model",)
SCORING: tuple[Makes, ...] = ("scorer",)


@dataclass(frozen=True)
class Setting:
    """A field of a stage that is no training. `takes`: what it holds. `refers_to`: which products of earlier stages
    `$name` may mean here; none where `$` is a letter like any other."""

    takes: Literal["text", "texts", "count", "number"]
    default: Any
    meaning: str
    refers_to: tuple[Makes, ...] = ()


@dataclass(frozen=True)
class Kind:
    """`makes`: what later stages can use of it. `settings`: its fields; empty for what trains, whose fields are those
    of a run file. `work`: the function that does it, `module:function`, imported when the stage is reached."""

    makes: Makes
    settings: Mapping[str, Setting] = field(default_factory=dict)
    work: str = ""
    inside: str = ""
    """Where in the stage's folder its product lies; "" is the folder itself, as of a run."""
    misfit: Callable[[Mapping[str, Any]], tuple[str, str] | None] = lambda settings: None
    """What does not fit together in its fields, and what to do."""

    @property
    def trains(self) -> bool:
        return not self.work


EVALUATE: dict[str, Setting] = {
    "models": Setting(
        "texts",
        None,
        "Which models are compared: $stage, a folder, or a hub id. By default the model that the first stage began "
        "with, and every model made so far.",
        ANSWERING,
    ),
    "loss": Setting("text", None, "A stage of sft; its held-out rows are what the loss is measured on.", ANSWERING),
    "questions": Setting(
        "text",
        None,
        "A data file, or a stage whose held-out prompts are asked.",
        (*ANSWERING, *SCORING),
    ),
    "check": Setting(
        "text",
        None,
        "What says whether an answer is right: number, exact, contains, regex:PATTERN, python:FILE.py:FUNCTION, or an "
        "http address, as in ppo.reward.",
    ),
    "judge": Setting("text", None, "A reward model that scores every answer.", SCORING),
    "most": Setting("count", 200, "At most so many rows and questions."),
    "max_new_tokens": Setting("count", 128, "Longest answer, in tokens."),
    "temperature": Setting("number", 0.0, "Of sampling; 0 takes the likeliest token."),
    "template": Setting("text", None, "Template of models that were not trained here; by default data.template."),
}
SOURCE = Setting("text", None, "The model that is handed on: $stage, a run, a folder or an adapter.", ANSWERING)
HAND_OVER: dict[str, Setting] = {
    "model": SOURCE,
    "dtype": Setting("text", "as-base", "Type of the weights: as-base, bf16, fp16 or fp32."),
}
GGUF: dict[str, Setting] = {
    "model": SOURCE,
    "types": Setting("texts", ["Q8_0"], "Types of the files, such as [Q8_0, Q4_K_M]."),
    "imatrix": Setting("text", None, "An importance matrix: a file, or run for one of the run's training rows."),
}


def _no_source(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    return None if settings["model"] is not None else ("nothing says which model", "set model: $sft, or a folder")


def _evaluate_misfit(settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Something must be measured, and each setting must have a part in it."""
    judges = [name for name in ("check", "judge") if settings[name] is not None]
    if settings["loss"] is None and settings["questions"] is None:
        return "nothing says what is measured", "set loss: $sft (held-out rows), or questions with check or judge"
    if settings["questions"] is None and judges:
        return f"{judges[0]} has no effect without questions", "set questions: a data file, or a stage such as $ppo"
    if settings["questions"] is not None and not judges:
        return "nothing judges the answers to questions", "set check (number, exact, ...), judge, or both"
    return None


KINDS: dict[str, Kind] = {
    **{stage: Kind("scorer" if stage == "reward" else "model") for stage in STAGES},
    "evaluate": Kind("scores", EVALUATE, "zhibei.pipeline.evaluation:evaluate_stage", misfit=_evaluate_misfit),
    "merge": Kind("model", HAND_OVER, "zhibei.pipeline.handing_over:merge_stage", "model", _no_source),
    "export": Kind("files", HAND_OVER, "zhibei.pipeline.handing_over:export_stage", "model", _no_source),
    "gguf": Kind("files", GGUF, "zhibei.pipeline.handing_over:gguf_stage", "model", _no_source),
}


def refers_to(kind: str) -> dict[str, tuple[Makes, ...]]:
    """Fields of a stage in which `$name` means what an earlier stage made, and what it must have made. A reward model
    goes on only as one."""
    about = KINDS[kind]
    if not about.trains:
        return {name: setting.refers_to for name, setting in about.settings.items() if setting.refers_to}
    base = (*ANSWERING, *SCORING) if about.makes == "scorer" else ANSWERING
    return {"model.path": base, "lora.adapter": base, f"{kind}.reward_model": SCORING}
