"""The effective run file: planned values filled in, every value with its origin, written and read back.

Knows what the run file alone decides; not the data, the model or the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zhibei.config.effects import STAGES, fields_without_effect
from zhibei.config.policy import PolicySection
from zhibei.config.preference import BETAS
from zhibei.config.run import RunFile
from zhibei.config.words import leaf_fields

DEFAULT = "default"
PLANNED = "planned"
EVALUATIONS_PER_RUN = 10
# What YAML 1.2 does not take unescaped inside double quotes, and the characters it reads as line breaks.
UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
LEARNING_RATES = {  # (full, adapters)
    # Stanford Alpaca's README, LLaMA-7B, batch 128; the QLoRA paper's 7B and 13B (arXiv:2305.14314, table 9).
    "sft": (2e-5, 2e-4),
    # LMFlow's run_reward_modeling.sh; TRL's RewardConfig, whose examples train adapters.
    "reward": (1e-5, 1e-4),
    # Zephyr-7B (arXiv:2310.16944, section 4.3) and the QLoRA form of the same recipe in its alignment handbook.
    "dpo": (5e-7, 5e-6),
    # OpenRLHF's and verl's default for the actor; ten times that for adapters, as in the stages above.
    "ppo": (1e-6, 1e-5),
    "grpo": (1e-6, 1e-5),
    # LMFlow's run_raft_align.sh; ten times that for adapters, as in supervised training.
    "raft": (2e-5, 2e-4),
}


# verl's defaults for actor and critic, 1e-6 and 1e-5; OpenRLHF has 1e-6 and 9e-6.
ADAPTER_FILE = "adapter_config.json"
CRITIC_FACTOR = 10

# torch's Adafactor multiplies the rate by the root mean square of each weight, about 0.02 in language models, where
# AdamW moves a weight by the rate itself.
RATE_FACTORS = {"adafactor": 50}


@dataclass(frozen=True, slots=True)
class ResolvedRun:
    """A run file ready to use.

    `origins` maps each field (`sft.learning_rate`) to `default`, `recipe NAME`, `FILE:LINE`, `command line` or
    `planned`. `text` is the file as it was given (a recipe's text when there was no file). `notes` says which
    settings of a lower layer lost their effect through a higher one.
    """

    run: RunFile
    origins: dict[str, str]
    text: str
    notes: tuple[str, ...] = ()


def plan_values(run: RunFile) -> dict[str, Any]:
    """Values that follow from the run file alone, for fields that were left open."""
    planned: dict[str, Any] = {}
    if run.training.learning_rate is None:
        rate = LEARNING_RATES[run.stage][run.model.method != "full"]
        planned[f"{run.stage}.learning_rate"] = rate * RATE_FACTORS.get(run.training.optimizer, 1)
    if run.model.held_as != run.model.quantize:
        planned["model.quantize"] = run.model.held_as
    if run.model.method != "full" and run.lora.adapter is not None:
        planned |= _adapter_of_run(Path(run.lora.adapter))
    if run.stage == "ppo" and run.model.method == "full" and "models" not in run.ppo.model_fields_set:
        planned["ppo.models"] = "separate"
    if run.stage == "ppo" and run.ppo.critic_learning_rate is None:
        rate = run.ppo.learning_rate or planned["ppo.learning_rate"]
        planned["ppo.critic_learning_rate"] = min(CRITIC_FACTOR * rate, 0.5)
    section = run.training
    is_judged_by_a_model = isinstance(section, PolicySection) and section.reward_model is not None
    if is_judged_by_a_model and "keep_best" not in section.model_fields_set:
        planned[f"{run.stage}.keep_best"] = False
    if run.stage == "dpo" and run.dpo.beta is None and run.dpo.loss in BETAS:
        planned["dpo.beta"] = BETAS[run.dpo.loss]
    if run.training.max_steps is not None:
        planned |= plan_intervals(run, num_steps=run.training.max_steps)
    return planned


def _adapter_of_run(folder: Path) -> dict[str, str]:
    """A run directory stands for the adapter that it wrote."""
    inner = folder / "model"
    is_run = not (folder / ADAPTER_FILE).is_file() and (inner / ADAPTER_FILE).is_file()
    return {"lora.adapter": str(inner)} if is_run else {}


def plan_intervals(run: RunFile, *, num_steps: int) -> dict[str, int]:
    """Steps between evaluations and between checkpoints, where the run file leaves them open."""
    has_heldout = run.data.validation != 0
    evaluate_every = run.training.evaluate_every
    planned: dict[str, int] = {}
    if evaluate_every is None:
        evaluate_every = max(1, num_steps // EVALUATIONS_PER_RUN)
        if has_heldout:
            planned[f"{run.stage}.evaluate_every"] = evaluate_every
    if run.training.save_every is None:
        planned[f"{run.stage}.save_every"] = evaluate_every
    return planned


def with_planned(resolved: ResolvedRun, planned: Mapping[str, Any]) -> ResolvedRun:
    """The same run with values a later stage decided, e.g. `{"sft.save_every": 40}`; their origin becomes `planned`."""
    run = resolved.run
    for key, value in planned.items():
        run = _replaced(run, key.split("."), value)
    return replace(resolved, run=run, origins={**resolved.origins, **dict.fromkeys(planned, PLANNED)})


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    inner = _replaced(getattr(section, head), rest, value) if rest else value
    return section.model_copy(update={head: inner})


def value_of(run: RunFile, key: str) -> Any:
    """The value of `sft.learning_rate` as a plain JSON value."""
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_unset=True)
    return value


def render_resolved(resolved: ResolvedRun) -> str:
    """A YAML run file with every value and, as a comment, its origin. Fields without effect are comments themselves."""
    idle = {".".join(str(part) for part in path): why for path, why in fields_without_effect(resolved.run).items()}
    lines = [
        "# The effective run file. The comment behind a value is its origin.",
        *(f"# note: {n}" for n in resolved.notes),
    ]
    section = ""
    for key, _ in sorted(leaf_fields(), key=lambda item: "." in item[0]):
        parent, _, name = key.rpartition(".")
        if parent in STAGES and parent != resolved.run.stage:
            if parent != section:
                lines.append(f"\n# {parent}: not read by stage: {resolved.run.stage}")
                section = parent
            continue
        indent = "  " if parent else ""
        active = key not in idle
        if parent and parent != section:
            has_active = any(k.startswith(parent + ".") and k not in idle for k, _ in leaf_fields())
            lines.append(f"\n{parent}:" if has_active else f"\n# {parent}: nothing here has an effect")
            section = parent
        text = f"{indent}{name}: {yaml_value(value_of(resolved.run, key))}"
        lines.append(
            f"{text}  # {resolved.origins.get(key, DEFAULT)}" if active else f"{indent}# {name}: no effect; {idle[key]}"
        )
    return "\n".join(lines) + "\n"


def write_resolved(resolved: ResolvedRun, path: str | Path) -> None:
    """Write `render_resolved` to `path`; the file reads back to the same run file."""
    Path(path).write_text(render_resolved(resolved), encoding="utf-8")


def yaml_value(value: Any) -> str:
    """One value on one line, in the YAML that `config/yaml_tree.py` reads back to the same value."""
    if value is None or isinstance(value, (bool, int)):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    return "{" + ", ".join(f"{_text(key)}: {yaml_value(item)}" for key, item in value.items()) + "}"


def _text(value: str) -> str:
    """Bare where that is plainly safe, else a JSON string, which YAML reads alike."""
    is_plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./-]*", value)
    if is_plain and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n"):
        return value
    return UNPRINTABLE.sub(_escaped, json.dumps(value, ensure_ascii=False))


def _escaped(sign: re.Match[str]) -> str:
    code = ord(sign[0])
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
