"""What learning from rewards needs to go on in the middle of a run: saved and put back. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.policy import PpoSection
from zhibei.losses.policy import KlController
from zhibei.store.checkpoint import load_checkpoint, save_checkpoint
from zhibei.train.policy_materials import PolicyMaterials
from zhibei.train.resume import Progress, load_weights, random_states
from zhibei.train.reward_shaping import RunningScale


@dataclass
class PolicyState:
    """Everything that changes from iteration to iteration besides weights, optimisers and counters.

    The prompts of an iteration and the draws of its answers follow from the run's seed and the iteration's number.
    """

    kl: KlController
    scale: RunningScale = field(default_factory=RunningScale)
    rate_factor: float = 1.0
    """Halved by every roll-back."""
    roll_backs: int = 0
    answers: int = 0
    constant_groups: int = 0
    """Groups (or whole iterations, without groups) whose rewards were all equal."""
    owes_evaluation: bool = False
    """The reward failed in the evaluation of the step that is saved; it is made up for when the run goes on."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PolicyState:
        plain = {name: value for name, value in values.items() if name not in ("kl", "scale")}
        return PolicyState(kl=KlController(**values["kl"]), scale=RunningScale(**values["scale"]), **plain)


def first_state(parts: PolicyMaterials) -> PolicyState:
    section = parts.section
    if isinstance(section, PpoSection):
        return PolicyState(KlController(section.kl_coefficient, target=section.kl_target, horizon=section.kl_horizon))
    return PolicyState(KlController(getattr(section, "kl_coefficient", 0.0)))


def save(checkpoints: Path, parts: PolicyMaterials, progress: Progress, state: PolicyState) -> Path:
    """A checkpoint of policy, critic, both optimisers, the state and all random states."""
    stepper = parts.materials.stepper
    groups: dict[str, dict[str, torch.Tensor]] = {
        "model": {name: parameter.data for name, parameter in parts.roles.policy.trainable().items()},
        "optimizer": stepper.optimizer.tensors(),
        "random": random_states(parts.materials.device),
    }
    plain: dict[str, Any] = {**asdict(progress), "stepper": stepper.state(), "policy": state.as_dict()}
    if parts.critic is not None and parts.roles.critic is not None:
        groups["critic"] = {name: parameter.data for name, parameter in parts.roles.critic.parameters.items()}
        groups["critic_optimizer"] = parts.critic.optimizer.tensors()
        plain["critic_stepper"] = parts.critic.state()
    groups = {name: group for name, group in groups.items() if group}
    return save_checkpoint(checkpoints, progress.step, groups=groups, state=plain)


def put_back(path: Path, parts: PolicyMaterials, state: PolicyState) -> None:
    """Policy, critic and optimisers as a checkpoint has them; the run goes on from there more carefully.

    What the run has seen since stays known: counters, the scale of rewards and the number of roll-backs.
    """
    groups, plain = load_checkpoint(path)
    stepper = parts.materials.stepper
    load_weights(parts.roles.policy, groups["model"], where=path)
    stepper.optimizer.load(groups.get("optimizer", {}))
    stepper.load_state(plain["stepper"])
    restore_rest(path, parts)
    state.roll_backs += 1
    state.rate_factor /= 2
    state.kl.coefficient *= 2


def restore_rest(path: Path, parts: PolicyMaterials) -> PolicyState:
    """Critic, its optimiser and the state of a checkpoint whose policy is put back already (train/resume.py).

    Raises UserError when the checkpoint is that of another stage or has another critic.
    """
    groups, plain = load_checkpoint(path)
    if "policy" not in plain or ("critic" in groups) != (parts.critic is not None):
        raise UserError(
            f"{path} is the checkpoint of another stage",
            expected=f"a checkpoint of stage {parts.run.stage}",
            fix="resume with the run file the run was started with",
            where=str(path),
        )
    if parts.critic is not None and parts.roles.critic is not None:
        own = parts.roles.critic.parameters
        if set(groups["critic"]) != set(own):
            raise UserError(
                f"the critic of {path} is another one",
                expected="a checkpoint of the same models and adapter settings",
                fix="resume with the run file the run was started with",
                where=str(path),
            )
        for name, parameter in own.items():
            parameter.data.copy_(groups["critic"][name])
        parts.critic.optimizer.load(groups.get("critic_optimizer", {}))
        parts.critic.load_state(plain["critic_stepper"])
    return PolicyState.from_dict(plain["policy"])
