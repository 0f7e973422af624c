"""Settings that have no effect beside others, and settings that contradict one another. Knows values, not files.

One rule per entry of RULES; each has a broken and a healthy case in tests/config/test_effects.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zhibei.config.hand_over import HAND_OVER_RULES
from zhibei.config.policy_rules import POLICY_RULES
from zhibei.config.rules import Misfit, Rule, conflict, no_effect, training
from zhibei.config.yaml_tree import KeyPath

if TYPE_CHECKING:
    from pydantic import BaseModel

    from zhibei.config.run import RunFile, TrainingSection

STAGES = ("sft", "reward", "dpo", "ppo", "grpo", "raft")
"""What a run can do; each has a section of its own name in the run file."""

LEARN_FROM_ROWS = ("sft", "reward", "dpo")
"""Stages whose rows are there before they begin, and are packed."""

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz")


def misfits_of(run: RunFile) -> list[Misfit]:
    """Conflicts, and fields that were set although they have no effect."""
    return [
        Misfit(field, rule) for rule in RULES for field in rule.find(run) if rule.is_conflict or _is_set(run, field)
    ]


def fields_without_effect(run: RunFile) -> dict[KeyPath, str]:
    """Every field that does nothing in this run, set or not, with the reason."""
    return {field: rule.why for rule in RULES if not rule.is_conflict for field in rule.find(run)}


def _hub_fields_of_files(run: RunFile) -> list[KeyPath]:
    return [
        ("data", "sources", index, field)
        for index, source in enumerate(run.data.sources)
        if not isinstance(source, str) and source.path.endswith(FILE_SUFFIXES)
        for field in ("split", "subset")
    ]


def _has_no_heldout(_: TrainingSection, run: RunFile) -> bool:
    return not isinstance(run.data.validation, str) and run.data.validation == 0


def _of_losses(losses: tuple[str, ...], fields: str, why: str, *, is_idle: bool = False) -> Rule:
    """Fields of section dpo that only these losses read; `is_idle`: all but these."""
    return no_effect(
        lambda run: run.stage == "dpo" and (run.dpo.loss in losses) == is_idle,
        fields,
        "dpo.loss",
        why,
        "remove it, or choose another dpo.loss",
    )


LORA_FIELDS = "lora.rank lora.alpha lora.dropout lora.targets lora.rslora lora.dora lora.modules_to_save lora.adapter"

GENERAL_RULES: list[Rule] = [
    no_effect(
        lambda run: run.model.method == "full",
        LORA_FIELDS,
        "model.method",
        "with model.method: full there are no adapters",
        "remove section lora, or set model.method: lora",
    ),
    no_effect(
        lambda run: run.lora.adapter is not None,
        "lora.rank lora.alpha lora.dropout lora.targets lora.rslora lora.dora lora.modules_to_save",
        "lora.adapter",
        "lora.adapter brings its own",
        "remove it, or remove lora.adapter",
    ),
    no_effect(
        lambda run: run.stage in LEARN_FROM_ROWS and run.data.packing and run.data.group_by_length,
        "data.group_by_length",
        "data.packing",
        "packed rows have no padding to save",
        "remove data.group_by_length, or set data.packing: false",
    ),
    Rule(
        (("data", "sources", 0, "split"), ("data", "sources", 0, "subset")),
        _hub_fields_of_files,
        ("data", "sources"),
        "only hub data sets have splits and subsets, and this path is a file",
        "remove it",
    ),
    no_effect(
        lambda run: run.model.method == "full" and run.model.quantize != "none",
        "model.quantize",
        "model.method",
        "model.quantize holds a frozen base, and with model.method: full there is none",
        "set model.method: qlora, or remove model.quantize",
    ),
    conflict(
        lambda run: run.stage in LEARN_FROM_ROWS and run.data.packing and run.model.attention in ("sdpa", "eager"),
        "model.attention",
        "data.packing",
        "sdpa and eager cannot keep packed rows apart",
        "set model.attention: auto, or data.packing: false",
    ),
    conflict(
        lambda run: (
            run.model.method == "qlora" and run.model.quantize == "none" and "quantize" in run.model.model_fields_set
        ),
        "model.quantize",
        "model.method",
        "model.method: qlora needs a quantised base",
        "remove model.quantize (nf4 is then used), or set model.method: lora",
    ),
    conflict(
        lambda run: run.device == "cpu" and run.model.attention == "varlen",
        "model.attention",
        "device",
        "the varlen kernel needs CUDA",
        "set model.attention: auto",
    ),
    conflict(
        lambda run: run.data.validation == 1 and not isinstance(run.data.validation, str),
        "data.validation",
        "data.validation",
        "1 is a share here and would hold out every row",
        "write a fraction such as 0.02, or a number of rows from 2 up",
    ),
    conflict(
        lambda run: run.name in (".", "..") or any(sign in run.name for sign in "/\\\0") or not run.name.strip(),
        "name",
        "name",
        "the name becomes one folder inside of runs",
        "use letters, digits, - and _; put folders into runs: path/to/folder",
    ),
    no_effect(
        lambda run: run.stage != "sft",
        "data.supervise",
        "stage",
        "only stage sft chooses which tokens are learned",
        "remove it, or set stage: sft",
    ),
    conflict(
        lambda run: run.stage == "dpo" and run.dpo.reference == "adapters_off" and run.model.method == "full",
        "dpo.reference",
        "model.method",
        "with model.method: full there are no adapters to switch off",
        "set dpo.reference: precomputed, or model.method: lora",
    ),
    *POLICY_RULES,
    no_effect(
        lambda run: run.stage not in LEARN_FROM_ROWS,
        "data.packing data.group_by_length",
        "stage",
        "the answers of this stage are generated, and how they share a pass is not the run file's",
        "remove it",
    ),
    no_effect(
        lambda run: run.stage in ("reward", "dpo") and run.lora.dropout > 0,
        "lora.dropout",
        "stage",
        "answers are compared without dropout, which would be noise between them",
        "remove it",
    ),
    _of_losses(("simpo", "orpo"), "dpo.reference", "this loss needs no reference", is_idle=True),
    _of_losses(("orpo",), "dpo.beta", "this loss has no beta", is_idle=True),
    _of_losses(("dpo",), "dpo.label_smoothing", "only dpo.loss: dpo has it"),
    _of_losses(("simpo",), "dpo.gamma", "only dpo.loss: simpo has it"),
    _of_losses(("orpo",), "dpo.odds_weight", "only dpo.loss: orpo has it"),
    *HAND_OVER_RULES,
    _of_losses(("kto",), "dpo.good_weight dpo.bad_weight", "only dpo.loss: kto has them"),
]


def section_of_another_stage(stage: str) -> Rule:
    """The fields of section `stage` are idle in runs of every other stage."""

    def find(run: RunFile) -> list[KeyPath]:
        return [] if run.stage == stage else [(stage, name) for name in type(getattr(run, stage)).model_fields]

    why = f"section {stage} is read by stage: {stage} only, and this run is of another stage"
    return Rule(((stage,),), find, ("stage",), why, f"set stage: {stage}, or remove section {stage}")


def _nothing_is_sampled(stage: str) -> Rule:
    return training(
        stage,
        lambda section, _: getattr(section, "sample_tokens", None) == 0,
        "{stage}.sample_prompts",
        "{stage}.sample_tokens",
        "with {stage}.sample_tokens: 0 nothing is sampled",
        "remove {stage}.sample_prompts, or set {stage}.sample_tokens above 0",
    )


def training_rules(stage: str) -> list[Rule]:
    """The rules inside of the section of `stage`; they hold in runs of that stage."""
    sampling = [] if stage == "reward" else [_nothing_is_sampled(stage)]
    return [
        *sampling,
        training(
            stage,
            lambda section, _: section.max_steps is not None,
            "{stage}.epochs",
            "{stage}.max_steps",
            "{stage}.max_steps decides how long the run is",
            "remove {stage}.epochs or {stage}.max_steps",
        ),
        training(
            stage,
            lambda section, _: section.warmup_steps is not None,
            "{stage}.warmup_ratio",
            "{stage}.warmup_steps",
            "{stage}.warmup_steps wins",
            "remove {stage}.warmup_ratio, or set {stage}.warmup_steps: null",
        ),
        training(
            stage,
            lambda section, _: section.schedule != "wsd",
            "{stage}.decay_ratio",
            "{stage}.schedule",
            "only {stage}.schedule: wsd has a final decay",
            "remove {stage}.decay_ratio, or set {stage}.schedule: wsd",
        ),
        training(
            stage,
            lambda section, _: section.schedule == "constant",
            "{stage}.min_lr_ratio",
            "{stage}.schedule",
            "with {stage}.schedule: constant the rate never falls",
            "remove {stage}.min_lr_ratio, or choose another schedule",
        ),
        training(
            stage,
            lambda section, _: section.optimizer == "adafactor",
            "{stage}.beta1 {stage}.beta2 {stage}.epsilon",
            "{stage}.optimizer",
            "adafactor derives its own decay and floor (arXiv:1804.04235)",
            "remove it, or choose adamw or adamw_8bit",
        ),
        training(
            stage,
            _has_no_heldout,
            "{stage}.evaluate_every {stage}.evaluate_rows {stage}.early_stop_patience {stage}.keep_best",
            "data.validation",
            "with data.validation: 0 there are no held-out rows to evaluate",
            "remove it, or set data.validation, for example 0.02",
        ),
        training(
            stage,
            lambda section, _: section.evaluate_every == 0,
            "{stage}.early_stop_patience",
            "{stage}.evaluate_every",
            "with {stage}.evaluate_every: 0 the only evaluation is at the end",
            "remove {stage}.early_stop_patience, or set {stage}.evaluate_every above 0",
        ),
    ]


RULES: list[Rule] = [
    *GENERAL_RULES,
    *(rule for stage in STAGES for rule in (section_of_another_stage(stage), *training_rules(stage))),
]


def _is_set(run: RunFile, field: KeyPath) -> bool:
    owner: BaseModel = run
    for part in field[:-1]:
        if isinstance(part, str):
            if part not in owner.model_fields_set:
                return False
            owner = getattr(owner, part)
        else:
            owner = owner[part]  # type: ignore[index]
    return field[-1] in owner.model_fields_set
