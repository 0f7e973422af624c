"""Everything needed to continue a run bit for bit: weights, optimiser, random states, counters. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.model.across import as_whole, own_parts, own_rows, written_by_first
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import Ranks, own_part
from zhibei.store.checkpoint import load_checkpoint, save_checkpoint
from zhibei.store.shards import Writable
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
    """Write a checkpoint of the trainable weights, the optimiser and all random states; whole, whatever the ranks, so
    that another number of them can go on from it."""
    model, ranks = stepper.model, stepper.ranks
    learning = model.trainable()
    groups: dict[str, Mapping[str, Writable]] = {
        "model": as_whole({name: parameter.data for name, parameter in learning.items()}, learning),
        "optimizer": as_whole(stepper.optimizer.tensors(), learning),
        "random": random_states_of_all(model.device, ranks),
    }
    state = {**asdict(progress), "stepper": stepper.state()}
    flat = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def write(tensors: Mapping[str, Writable]) -> str:
        parts = {group: {name: tensors[f"{group}/{name}"] for name in names} for group, names in groups.items()}
        whole = {group: named for group, named in parts.items() if named}
        return str(save_checkpoint(checkpoints, progress.step, groups=whole, state=state))

    return Path(written_by_first(ranks, flat, write))


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
    stepper.optimizer.load(own_parts(groups.get("optimizer", {}), stepper.model.trainable()))
    set_random_states(of_rank(groups["random"], stepper.ranks), stepper.model.device)
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
        own_part(parameter.data).copy_(own_rows(value, parameter))


def random_states_of_all(device: torch.device, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The generator states of every rank; those of rank 0 under the names that one process alone gives them."""
    own = random_states(device)
    if not ranks.are_several:
        return own
    told = ranks.gathered({name: state.tolist() for name, state in own.items()})
    return {
        name if rank == 0 else f"{name}.{rank}": torch.tensor(state, dtype=torch.uint8)
        for rank, states in enumerate(told)
        for name, state in states.items()
    }


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
