"""Everything needed to continue a run bit for bit: weights, optimiser, random states, counters. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.model.language_model import LanguageModel
from zhibei.store.checkpoint import load_checkpoint, save_checkpoint
from zhibei.train.step import Stepper


@dataclass
class Progress:
    """The counters of a run. `step` is the number of optimiser steps done; held-out losses are nats per token."""

    run_id: str
    key: str
    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    learned_tokens: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    """In a row, up to now."""
    all_skipped_steps: int = 0
    seconds: float = 0.0


def save(checkpoints: Path, stepper: Stepper, progress: Progress) -> Path:
    """Write a checkpoint of the trainable weights, the optimiser and all random states."""
    model = stepper.model
    groups: dict[str, dict[str, torch.Tensor]] = {
        "model": {name: parameter.data for name, parameter in model.trainable().items()},
        "optimizer": stepper.optimizer.tensors(),
        "random": random_states(model.device),
    }
    state = {**asdict(progress), "stepper": stepper.state()}
    return save_checkpoint(
        checkpoints, progress.step, groups={name: group for name, group in groups.items() if group}, state=state
    )


def restore(path: Path, stepper: Stepper, *, key: str) -> Progress:
    """Put a verified checkpoint back. Raises UserError when it belongs to other data, another model or method."""
    groups, state = load_checkpoint(path)
    if state["key"] != key:
        raise UserError(
            "the checkpoint was made from other rows, template, tokenizer or masking than the run file now gives",
            expected=f"prepared rows {state['key'][:12]}, as when the run started; now they are {key[:12]}",
            fix="put the data files back as they were, or start a new run under another name",
            where=str(path),
        )
    load_weights(stepper.model, groups["model"], where=path)
    stepper.optimizer.load(groups.get("optimizer", {}))
    set_random_states(groups["random"], stepper.model.device)
    stepper.load_state(state["stepper"])
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})


def load_weights(model: LanguageModel, tensors: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Copy the trainable weights of a checkpoint into the model; all of them and no others."""
    parameters = model.trainable()
    if set(tensors) != set(parameters):
        differing = sorted(set(tensors) ^ set(parameters))
        raise UserError(
            f"the checkpoint's weights are not this model's: {len(differing)} names differ, e.g. {differing[0]}",
            expected="a checkpoint of the same model, method and adapter settings",
            fix="resume with the run file the run was started with",
            where=str(where),
        )
    for name, parameter in parameters.items():
        value = tensors[name]
        if value.shape != parameter.shape:
            raise UserError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint, {tuple(parameter.shape)} in the model",
                expected="a checkpoint of the same model",
                fix="resume with the run file the run was started with",
                where=str(where),
            )
        parameter.data.copy_(value)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states as uint8 tensors: dropout and NEFTune draw from these."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
