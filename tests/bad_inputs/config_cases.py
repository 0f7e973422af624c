"""Run files in which one setting is wrong. Knows only what is broken and what an answer must name."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_inputs.place import Place, chat_rows
from tests.bad_inputs.scenario import Build, Scenario


def setting(key: str, value: Any) -> Build:
    """One field with another value, as run.yaml says it."""
    return lambda place: place.set(key, value)


def settings(values: dict[str, Any]) -> Build:
    """Several fields at once."""
    return lambda place: [place.set(key, value) for key, value in values.items()]


def manifest_says(place: Place, field: str, value: Any) -> bool:
    """The run was made, and did what was asked."""
    path = place.folder / "runs" / "tried" / "manifest.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))[field] == value


def on_command_line(*overrides: str) -> Build:
    """Settings typed behind the run file."""
    return lambda place: place.arguments.extend(overrides)


CONFIG_CASES = [
    Scenario(
        "c1_typo_key",
        "A misspelt key.",
        setting("sft.learning_rte", 1e-3),
        value="learning_rte",
        where=r"run\.yaml:\d+",
        remedy="learning_rate",
    ),
    Scenario(
        "c2_lr_text",
        "A word where a number is needed.",
        setting("sft.learning_rate", "fast"),
        value="fast",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy="number",
    ),
    Scenario(
        "c3_lr_negative",
        "A negative learning rate.",
        setting("sft.learning_rate", -1e-3),
        value=r"-0\.001|-1e-0?3",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy="above 0|greater than 0|more than 0|to do:.*learning_rate",
    ),
    Scenario(
        "c4_lr_zero",
        "A learning rate of zero: nothing would be learned.",
        setting("sft.learning_rate", 0.0),
        value=r"sft\.learning_rate.{0,40}\b0(\.0)?\b",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy="above 0|greater than 0|more than 0|to do:.*learning_rate",
    ),
    Scenario(
        "c5_bf16_cpu",
        "bf16 asked of a processor.",
        setting("model.precision", "bf16"),
        value="bf16",
        where="bf16 on cpu|model\\.precision",
        remedy="fp32|auto",
        may=("stopped", "handled"),
        proof=lambda place: manifest_says(place, "precision", "bf16"),
    ),
    Scenario(
        "c6_tf32_cpu",
        "tf32, which is no precision of a run and which no processor has.",
        setting("model.precision", "tf32"),
        value="tf32",
        where=(r"run\.yaml:\d+", r"model\.precision"),
        remedy="fp32|auto",
    ),
    Scenario(
        "c7_lr_huge",
        "A learning rate of 5.",
        setting("sft.learning_rate", 5.0),
        value=r"\b5(\.0)?\b",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy=r"to do:.*(below|less|e-|0\.)",
    ),
    Scenario(
        "c8_steps_zero",
        "A run of no steps.",
        setting("sft.max_steps", 0),
        value=r"sft\.max_steps.{0,40}\b0\b",
        where=(r"run\.yaml:\d+", r"sft\.max_steps"),
        remedy="to do:.*(epochs|max_steps)",
    ),
    Scenario(
        "c9_batch_zero",
        "A batch of no rows.",
        setting("sft.global_batch", 0),
        value=r"sft\.global_batch.{0,40}\b0\b",
        where=(r"run\.yaml:\d+", r"sft\.global_batch"),
        remedy="to do:.*global_batch",
    ),
    Scenario(
        "c10_scheduler_unknown",
        "A schedule that does not exist.",
        setting("sft.schedule", "cosine_with_hops"),
        value="cosine_with_hops",
        where=(r"run\.yaml:\d+", r"sft\.schedule"),
        remedy="to do:.*cosine",
    ),
    Scenario(
        "c11_fp16_cpu",
        "fp16 asked of a processor, where others accept it and compute in fp32.",
        setting("model.precision", "fp16"),
        value="fp16",
        where=(r"run\.yaml:\d+|model\.precision", "cpu"),
        remedy="fp32|auto",
    ),
    Scenario(
        "c12_incompatible",
        "Adapter settings in a run that trains all weights.",
        setting("lora.rank", 64),
        value=r"lora\.rank",
        where=r"run\.yaml:\d+",
        remedy="method: lora",
    ),
    Scenario(
        "c13_beyond_positions",
        "Rows longer than the positions that the model knows.",
        setting("data.max_tokens", 4096),
        value="4096",
        where=(r"run\.yaml:\d+|data\.max_tokens", "256"),
        remedy=r"max_tokens: 256|rope_scaling_factor",
    ),
    Scenario(
        "c14_warmup_longer_than_run",
        "A warm-up that never ends.",
        setting("sft.warmup_steps", 500),
        value=r"\b500\b",
        where=(r"run\.yaml:\d+|sft\.warmup_steps", r"\b3\b"),
        remedy="to do:.*warmup",
    ),
]


def _messages(place: Place) -> None:
    place.rows = chat_rows()


CONFIG_VARIANTS = [
    Scenario(
        "v_c_section_typo",
        "A misspelt section.",
        setting("stf.max_steps", 3),
        value=r"\bstf\b",
        where=r"run\.yaml:\d+",
        remedy=r"\bsft\b",
    ),
    Scenario(
        "v_c_foreign_name",
        "The name that Hugging Face's Trainer has for a field.",
        setting("sft.per_device_train_batch_size", 4),
        value="per_device_train_batch_size",
        where=r"run\.yaml:\d+",
        remedy="global_batch|micro_batch_tokens",
    ),
    Scenario(
        "v_c_lr_one_override",
        "A learning rate of 1 on the command line.",
        on_command_line("sft.learning_rate=1"),
        value=r"\b1(\.0)?\b",
        where=("command line", r"sft\.learning_rate"),
        remedy=r"to do:.*(below|less|e-|0\.)",
    ),
    Scenario(
        "v_c_lr_just_too_high",
        "A learning rate of 0.5: within the allowed numbers, and still a hundred times too high for AdamW.",
        setting("sft.learning_rate", 0.5),
        value=r"\b0\.5\b",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy=r"to do:.*(e-|0\.0)",
    ),
    Scenario(
        "v_c_lr_lora_high",
        "A learning rate of 0.2 for adapters.",
        settings({"model.method": "lora", "sft.learning_rate": 0.2}),
        value=r"\b0\.2\b",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy=r"to do:.*(e-|0\.0)",
    ),
    Scenario(
        "v_c_lr_tiny",
        "A learning rate of 1e-15: fp32 weights would not move.",
        setting("sft.learning_rate", 1e-15),
        value=r"1e-15",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy=r"to do:.*e-",
    ),
    Scenario(
        "v_c_lr_yaml_text",
        "A rate in quotes, as YAML 1.1 tools need it.",
        lambda place: setattr(
            place,
            "run_text",
            "name: tried\nmodel: {path: model}\ndata: {sources: [rows.json], template: alpaca, max_tokens: 256}\n"
            'sft:\n  max_steps: 3\n  learning_rate: "2e-5"\n',
        ),
        value="2e-5",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy="without quotes",
    ),
    Scenario(
        "v_c_epochs_zero",
        "A run of no epochs.",
        settings({"sft.max_steps": None, "sft.epochs": 0}),
        value=r"sft\.epochs.{0,40}\b0\b",
        where=(r"run\.yaml:\d+", r"sft\.epochs"),
        remedy="to do:.*epochs",
    ),
    Scenario(
        "v_c_epochs_tiny",
        "Epochs so few that not one step is made.",
        settings({"sft.max_steps": None, "sft.warmup_steps": None, "sft.epochs": 0.001}),
        value=r"0\.001",
        where=(r"run\.yaml:\d+|sft\.epochs",),
        remedy="to do:.*epochs",
        may=("stopped", "warned"),
    ),
    Scenario(
        "v_c_beta_one",
        "Adam's second decay at 1: nothing is ever averaged.",
        setting("sft.beta2", 1.0),
        value=r"sft\.beta2.{0,40}\b1(\.0)?\b",
        where=r"run\.yaml:\d+",
        remedy="below 1|less than 1|to do:.*beta2",
    ),
    Scenario(
        "v_c_bool_for_number",
        "true where a number of steps is needed.",
        setting("sft.max_steps", True),
        value="true",
        where=(r"run\.yaml:\d+", r"sft\.max_steps"),
        remedy="to do:.*max_steps",
    ),
    Scenario(
        "v_c_infinite",
        "An infinite learning rate.",
        setting("sft.learning_rate", float("inf")),
        value=r"\.?inf",
        where=(r"run\.yaml:\d+", r"sft\.learning_rate"),
        remedy="to do:.*learning_rate",
    ),
    Scenario(
        "v_c_batch_huge",
        "A batch of a million rows.",
        setting("sft.global_batch", 1_000_000),
        value=r"1[,_]?000[,_]?000",
        where=(r"run\.yaml:\d+|sft\.global_batch", r"\b4[0-9]\b"),
        remedy="to do:.*global_batch",
    ),
    Scenario(
        "v_c_seed_huge",
        "A seed of 2^70.",
        setting("seed", 2**70),
        value=str(2**70),
        where=r"run\.yaml:\d+",
        remedy="to do:.*seed",
    ),
    Scenario(
        "v_c_duplicate_key",
        "The same key twice: YAML takes the last one in silence.",
        lambda place: setattr(
            place,
            "run_text",
            "name: tried\nmodel: {path: model}\ndata: {sources: [rows.json], template: alpaca, max_tokens: 256}\n"
            "sft:\n  max_steps: 3\n  learning_rate: 1e-4\n  learning_rate: 1e-3\n",
        ),
        value="learning_rate",
        where=r"run\.yaml:7",
        remedy="to do:.*(remove|one of)",
    ),
    Scenario(
        "v_c_tabs",
        "Tabs for indentation.",
        lambda place: setattr(place, "run_text", "name: tried\nmodel:\n\tpath: model\ndata: {sources: [rows.json]}\n"),
        value="tab",
        where=r"run\.yaml:3",
        remedy="spaces",
    ),
    Scenario(
        "v_c_anchor_merge",
        "A misspelt key that comes in through an anchor.",
        lambda place: setattr(
            place,
            "run_text",
            "name: tried\nmodel: {path: model}\ndata: {sources: [rows.json], template: alpaca, max_tokens: 256}\n"
            "sft: &shared\n  max_steps: 3\n  learning_rte: 1e-4\nreward:\n  <<: *shared\n",
        ),
        value="learning_rte|merge|<<|anchor",
        where=r"run\.yaml:\d+",
        remedy="to do:.*",
    ),
    Scenario(
        "v_c_chinese_key",
        "A key in Chinese.",
        setting("sft.学习率", 1e-3),
        value="学习率",
        where=r"run\.yaml:\d+",
        remedy="to do:.*",
    ),
    Scenario(
        "v_c_no_heldout_early_stop",
        "Early stopping without held-out rows.",
        settings({"data.validation": 0, "sft.early_stop_patience": 3, "sft.evaluate_every": None}),
        value="early_stop_patience",
        where=r"run\.yaml:\d+",
        remedy=r"data\.validation",
    ),
    Scenario(
        "v_c_max_tokens_tiny",
        "A window of 8 tokens, shorter than every prompt.",
        setting("data.max_tokens", 8),
        value=r"\b8\b",
        where=r"max_tokens|run\.yaml",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "v_c_stage_unknown",
        "A stage that does not exist.",
        setting("stage", "grpo2"),
        value="grpo2",
        where=(r"run\.yaml:\d+", "stage"),
        remedy="sft",
    ),
    Scenario(
        "v_c_other_stages_section",
        "A section of another stage.",
        setting("dpo.learning_rate", 1e-6),
        value=r"\bdpo\b",
        where=r"run\.yaml:\d+",
        remedy="stage: dpo|remove",
    ),
    Scenario(
        "v_c_device_missing",
        "A GPU that this machine does not have.",
        setting("device", "cuda:7"),
        value="cuda:7",
        where=r"run\.yaml:\d+|device",
        remedy="cpu|auto",
    ),
    Scenario(
        "v_c_template_unknown",
        "A template with a typing error.",
        setting("data.template", "alpacca"),
        value="alpacca",
        where=r"run\.yaml:\d+|data\.template",
        remedy="alpaca",
    ),
    Scenario(
        "v_c_validation_all",
        "More held-out rows than there are rows.",
        setting("data.validation", 5000),
        value=r"\b5[,_]?000\b",
        where=r"run\.yaml:\d+|data\.validation",
        remedy="to do:.*validation",
    ),
    Scenario(
        "v_c_accept_unknown",
        "A finding accepted under a name that does not exist.",
        setting("accept", ["no-such-pitfall"]),
        value="no-such-pitfall",
        where=r"run\.yaml:\d+|accept",
        remedy="zhibei (pitfalls|check)|to do:.*",
    ),
]
