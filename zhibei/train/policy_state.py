"""What learning from rewards needs to go on in the middle of a run: saved and put back. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.policy import PpoSection
from zhibei.losses.policy import KlController
from zhibei.model.across import OwnParts, share_of
from zhibei.model.ranks import own_part
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.checkpoint_files import Groups
from zhibei.train.policy_materials import PolicyMaterials
from zhibei.train.resume import Progress, load_optimizer, load_weights
from zhibei.train.resume import share as share_of_run
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


def share(parts: PolicyMaterials, progress: Progress, state: PolicyState) -> tuple[Groups, dict[str, Any]]:
    """What this rank saves of policy, critic, both optimisers and its random states; and the plain state."""
    groups, plain = share_of_run(parts.materials.stepper, progress)
    plain["policy"] = state.as_dict()
    if parts.critic is None or parts.roles.critic is None:
        return groups, plain
    learning, ranks = parts.roles.critic.parameters, parts.critic.ranks
    critic: Groups = {
        "critic": share_of({name: parameter.data for name, parameter in learning.items()}, learning, ranks),
        "critic_optimizer": share_of(parts.critic.optimizer.tensors(), learning, ranks),
    }
    return {**groups, **critic}, {**plain, "critic_stepper": parts.critic.state()}


def put_back(path: Path, parts: PolicyMaterials, state: PolicyState) -> None:
    """Policy, critic and optimisers as a checkpoint has them; the run goes on from there more carefully.

    What the run has seen since stays known: counters, the scale of rewards and the number of roll-backs.
    """
    groups, plain = load_checkpoint(path)
    stepper = parts.materials.stepper
    load_weights(parts.roles.policy, groups["model"], where=path)
    load_optimizer(stepper, groups.get("optimizer"), groups["model"])
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
    if parts.critic is not None:
        own = parts.critic.parameters
        if set(groups["critic"]) != set(own):
            raise UserError(
                f"the critic of {path} is another one",
                expected="a checkpoint of the same models and adapter settings",
                fix="resume with the run file the run was started with",
                where=str(path),
            )
        weights = OwnParts(groups["critic"], own)
        for name, parameter in own.items():
            own_part(parameter.data).copy_(weights[name])
        load_optimizer(parts.critic, groups.get("critic_optimizer"), groups["critic"])
        parts.critic.load_state(plain["critic_stepper"])
    return PolicyState.from_dict(plain["policy"])
