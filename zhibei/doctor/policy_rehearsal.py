"""The first half of a rehearsal of ppo, grpo and raft: one small iteration through the loop that the run itself has.

The longest prompts are answered, scored and learned from in two minibatches, then everything is written. Knows what to
try and in which order; fresh.py reads back, readback.py judges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zhibei.config.policy import PolicySection
from zhibei.config.resolve import ResolvedRun
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.saving import against_plan, bytes_of, memory, outputs_of, request_of
from zhibei.doctor.scene import Scene, Seen
from zhibei.doctor.worst import only_rows
from zhibei.store.checkpoint import list_steps
from zhibei.store.files import write_json_atomic
from zhibei.store.run_dir import RunDir
from zhibei.train.policy_materials import PolicyMaterials, cursor_of, gather_policy

POLICY_STEPS = ("load", "longest prompts", "iteration", "weights", "memory", "save", "reload", "generate", "resume")
HELDOUT_PROMPTS = 4
SAMPLE_TOKENS = 8
GIB = 2.0**30
# What a single iteration needs no part of, and what would keep it from learning at the run's full rate.
SHORT: dict[str, Any] = {
    "max_steps": 1, "warmup_steps": 0, "schedule": "constant", "inner_epochs": 1, "evaluate_every": 0, "save_every": 0,
    "early_stop_patience": None, "keep_best": False, "stop_at_kl": 0, "critic_warmup_steps": 0,
}  # fmt: skip


class Stage(Protocol):
    """What takes the steps: the rehearsal's own."""

    resolved: ResolvedRun

    def take(self, name: str, work: Callable[[], Seen]) -> bool: ...


@dataclass
class Tried:
    """What one step leaves for the next."""

    parts: PolicyMaterials
    folder: Path
    going: Any = None
    before: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def iteration(self) -> dict[str, Any]:
        return next(record for record in self.records if record.get("kind") == "iteration")


def first_half(stage: Stage, folder: Path) -> bool:
    """Everything that needs the models in memory. Whether they were saved in the end."""
    tried: list[Tried] = []

    def load() -> Seen:
        parts = gather_policy(shortened(stage.resolved, folder))
        tried.append(Tried(parts, folder))
        learning, everything = parts.roles.policy.num_parameters()
        critic = parts.roles.critic
        more = f", {sum(p.numel() for p in critic.parameters.values()):,} in the critic" if critic is not None else ""
        where = f"{parts.materials.precision} on {parts.materials.device}"
        return Seen(f"{learning:,} of {everything:,} parameters learn{more}, {where}")

    if not stage.take("load", load):
        return False
    one = tried[0]
    steps = {"longest prompts": longest_prompts, "iteration": iteration, "weights": weights}
    for name, step in steps.items():
        if not stage.take(name, functools.partial(step, one)) and name != "weights":
            return False
    stage.take("memory", lambda: memory(Scene(one.parts.materials)))
    return stage.take("save", lambda: save(one))


def shortened(resolved: ResolvedRun, folder: Path) -> ResolvedRun:
    """The run with a single iteration of as many answers as are written at one time, in two minibatches."""
    run = resolved.run
    section = run.training
    assert isinstance(section, PolicySection)
    group = getattr(section, "answers_per_prompt", 1)
    wanted = min(section.global_batch * section.minibatches, max(section.rollout_batch, 2 * group))
    num_prompts = max(2, wanted // group // 2 * 2)
    changes = {name: value for name, value in SHORT.items() if name in type(section).model_fields}
    changes |= {
        "global_batch": num_prompts * group // 2,
        "minibatches": 2,
        "evaluate_rows": min(HELDOUT_PROMPTS, section.evaluate_rows),
        "sample_tokens": min(SAMPLE_TOKENS, section.sample_tokens),
    }
    log = run.log.model_copy(update={"tensorboard": False, "wandb": None})
    place = {"name": folder.name, "runs": str(folder.parent), "log": log}
    return replace(resolved, run=run.model_copy(update={**place, run.stage: section.model_copy(update=changes)}))


def longest_prompts(tried: Tried) -> Seen:
    """The prompts that are longest come first, and no others are asked."""
    parts, materials = tried.parts, tried.parts.materials
    rows = materials.rows.train
    numbers = np.argsort(-rows.lengths, kind="stable")[: parts.cursor.per_iteration]
    longest = only_rows(rows, numbers)
    run = materials.run.model_copy(update={"data": materials.run.data.model_copy(update={"shuffle": False})})
    tried.parts = replace(
        parts,
        materials=replace(materials, rows=replace(materials.rows, train=longest)),
        cursor=cursor_of(run, parts.section, num_prompts=len(longest)),
    )
    length, answer = int(longest.lengths.max()), parts.section.max_new_tokens
    detail = f"{len(longest)} prompts of at most {length:,} tokens, answers of at most {answer:,}"
    return Seen(detail, figures={"longest_prompt": length, "max_new_tokens": answer})


def iteration(tried: Tried) -> Seen:
    """Answers, scores and two minibatches by the run's own loop, with its probes before and after; and a checkpoint."""
    from zhibei.model.ranks import current
    from zhibei.train.policy_run import PolicyRun, begin, panel_of
    from zhibei.train.policy_state import first_state
    from zhibei.train.record import Recorder
    from zhibei.train.saving import Saver

    parts = tried.parts
    tried.before = role_sums(parts)
    progress = _opened(tried)
    run_dir = RunDir(tried.folder)
    with _metrics(tried) as metrics, Saver(run_dir.checkpoints, current()) as saver:
        recorder = Recorder(metrics, tried.records.append, parts.materials.device)
        tried.going = PolicyRun(parts, run_dir, progress, first_state(parts), recorder, panel_of(parts), saver)
        begin(tried.going)
        _loop_of(parts.run.stage)(tried.going)
    seen = tried.iteration
    detail = (
        f"reward {seen['reward_mean']:.4f} (deviation {seen['reward_std']:.4f}), answers of {seen['length_mean']:.1f} "
        f"tokens, {seen['seconds']:.1f} s"
    )
    names = ("reward_mean", "reward_std", "kl", "length_mean", "seconds", "writing_seconds", "reward_seconds")
    figures = {name: seen.get(name) for name in names}
    if seen["reward_std"] > 0:
        return Seen(detail, figures=figures)
    finding = Finding(
        what=f"all {seen['answers']} answers to the longest prompts have the reward {seen['reward_mean']:.4g}",
        where=f"{parts.run.stage}.reward",
        to_do="see that the reward tells answers apart; a task that is too hard for the model gives all of them 0",
        level="warning",
    )
    return Seen(detail, [("", finding)], figures)


def weights(tried: Tried) -> Seen:
    """What learns was changed by the steps, and is finite."""
    after = role_sums(tried.parts)
    still = [name for name, value in tried.before.items() if after[name] == value]
    steps = tried.going.parts.materials.stepper.effective_steps
    moved = len(after) - len(still)
    detail = f"{moved:,} of {len(after):,} tensors moved in {steps} steps"
    if steps == 0 or moved:
        return Seen(detail if steps else "no answer said anything, so nothing was learned")
    finding = Finding(
        what=f"{steps} steps left all {len(after):,} tensors as they were",
        where=f"{tried.parts.run.stage}.learning_rate",
        to_do="raise the learning rate, or set model.precision: bf16",
        evidence=tuple(still[:8]),
    )
    return Seen(detail, [("ds-fp16-all-steps-skipped", finding)])


def save(tried: Tried) -> Seen:
    """The finished policy as a run writes and proves it; and what the new process is to compare with."""
    from zhibei.train.finish import finish, probe_row

    going, materials = tried.going, tried.parts.materials
    with _metrics(tried) as metrics:
        going.recorder.metrics = metrics
        finish(materials, going.run_dir, going.progress, going.recorder)
    _, checkpoint = list_steps(going.run_dir.checkpoints)[-1]
    probe = probe_row(materials).tolist()
    np.save(tried.folder / "logits.npy", outputs_of(materials.model, probe))
    request = {**request_of(materials, probe), "kind": "policy", "roles": role_sums(tried.parts)}
    write_json_atomic(tried.folder / "request.json", {**request, "answers": going.state.answers})
    exported = sum(file.stat().st_size for file in going.run_dir.model.glob("*.safetensors"))
    detail = f"checkpoint {bytes_of(checkpoint) / GIB:.3f} GiB, model {exported / GIB:.3f} GiB"
    figures = {"checkpoint_bytes": bytes_of(checkpoint), "model_bytes": exported}
    return Seen(detail, against_plan(Scene(materials), checkpoint), figures)


def role_sums(parts: PolicyMaterials) -> dict[str, int]:
    """One number per tensor of policy and critic that learns."""
    from zhibei.train.step import checksums

    named = {f"policy {name}": parameter for name, parameter in parts.roles.policy.trainable().items()}
    if parts.roles.critic is not None:
        named |= {f"critic {name}": parameter for name, parameter in parts.roles.critic.parameters.items()}
    return dict(zip(named, checksums(named).tolist(), strict=True))


def _opened(tried: Tried) -> Any:
    from zhibei.train.opening import describe, open_new

    materials = tried.parts.materials
    return open_new(RunDir(tried.folder), materials, describe(materials))


def _metrics(tried: Tried) -> Any:
    from zhibei.store.metrics import Metrics

    return Metrics(tried.folder, tensorboard=False, wandb=None, run_name="rehearsal", config={}, resume_at_step=None)


def _loop_of(stage: str) -> Callable[[Any], None]:
    from zhibei.train import grpo, ppo, raft

    return {"ppo": ppo.loop, "grpo": grpo.loop, "raft": raft.loop}[stage]
