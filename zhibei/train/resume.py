"""Everything needed to continue a run bit for bit: weights, optimiser, random states, counters. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.model.across import OwnParts, share_of
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import Ranks, own_part
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.checkpoint_files import Groups, bare
from zhibei.store.parts import StoredTensors
from zhibei.store.shards import num_bytes
from zhibei.train.optimizer_forms import load_states
from zhibei.train.saving import Saver
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


def share(stepper: Stepper, progress: Progress) -> tuple[Groups, dict[str, Any]]:
    """What this rank saves: its part of the weights that learn and of the optimiser, its random states; and the plain
    state (which rank 0 writes). Any number of ranks, and another sharding, can go on from it."""
    model, ranks = stepper.model, stepper.ranks
    learning = model.trainable()
    groups: Groups = {
        "model": share_of({name: parameter.data for name, parameter in learning.items()}, learning, ranks),
        "optimizer": share_of(stepper.optimizer.tensors(), learning, ranks),
        "random": random_states_of(model.device, ranks),
    }
    return groups, {**asdict(progress), "stepper": stepper.state()}


def saved_bytes(stepper: Stepper) -> int:
    """Bytes of the weights and states that all ranks together save. Every rank must ask."""
    learning, ranks = stepper.model.trainable(), stepper.ranks
    own = [
        share_of({name: parameter.data for name, parameter in learning.items()}, learning, ranks),
        share_of(stepper.optimizer.tensors(), learning, ranks),
    ]
    return int(ranks.sum_on_host(float(sum(num_bytes(each) for held in own for each in bare(held).values())))[0])


def save(checkpoints: Path, stepper: Stepper, progress: Progress) -> Path:
    """Write a checkpoint at once; when this returns, it is on disk on every rank."""
    with Saver(checkpoints, stepper.ranks) as saver:
        groups, state = share(stepper, progress)
        saver.begin(progress.step, groups, state)
        saved = saver.settle()
    assert saved is not None
    return saved.path


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
    load_optimizer(stepper, groups.get("optimizer"), groups["model"])
    set_random_states(of_rank(groups["random"], stepper.ranks), stepper.model.device)
    stepper.load_state(state["stepper"])
    return Progress(**{name: state[name] for name in Progress.__dataclass_fields__ if name in state})


def load_weights(model: LanguageModel, tensors: StoredTensors, *, where: Path) -> None:
    """Copy the trainable weights of a checkpoint into the model; all of them and no others. Only what this rank holds
    is read."""
    parameters = model.trainable()
    if set(tensors) != set(parameters):
        differing = sorted(set(tensors) ^ set(parameters))
        raise UserError(
            f"the checkpoint's weights are not this model's: {len(differing)} names differ, e.g. {differing[0]}",
            expected="a checkpoint of the same model, method and adapter settings",
            fix="resume with the run file the run was started with",
            where=str(where),
        )
    own = OwnParts(tensors, parameters)
    for name, parameter in parameters.items():
        if tensors.shape(name) != tuple(parameter.shape):
            raise UserError(
                f"{name} has shape {tensors.shape(name)} in the checkpoint, {tuple(parameter.shape)} in the model",
                expected="a checkpoint of the same model",
                fix="resume with the run file the run was started with",
                where=str(where),
            )
        own_part(parameter.data).copy_(own[name])


def load_optimizer(stepper: Stepper, states: StoredTensors | None, weights: StoredTensors) -> None:
    """Put an optimiser's states back, in whatever form they were saved; None: it had none yet. After `load_weights`."""
    if states is not None:
        own = stepper.parameters
        load_states(stepper.optimizer, OwnParts(states, own), OwnParts(weights, own))


def random_states_of(device: torch.device, ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's generator states; rank 0 gives them the names that one process alone does."""
    ending = f".{ranks.rank}" if ranks.rank else ""
    return {name + ending: state for name, state in random_states(device).items()}


def of_rank(states: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's states; a rank that the saved run did not have keeps what it was seeded with."""
    ending = f".{ranks.rank}" if ranks.rank else ""
    kinds = ("cpu", "cuda")
    return {kind: states[kind + ending] for kind in kinds if kind + ending in states}


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states as uint8 tensors: dropout and NEFTune draw from these."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
