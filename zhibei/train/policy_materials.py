"""What learning from rewards works with, made from a run file: prompts, reward, models, optimisers. No loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.policy import PolicySection, PpoSection
from zhibei.config.policy_rules import prompts_per_iteration
from zhibei.config.resolve import ResolvedRun, plan_intervals, with_planned
from zhibei.config.run import RunFile
from zhibei.data.batches import Batch, Batches, BatchPlan
from zhibei.data.pairs import prepare_answers
from zhibei.data.prepare import prepare
from zhibei.data.prepared import PreparedSet
from zhibei.data.references import Question, read_questions
from zhibei.generate.rollouts import Rollout, write_answers
from zhibei.generate.vllm_engine import VllmWriter, require_vllm
from zhibei.losses.tokens import TokenLoss
from zhibei.model.device import choose_device, choose_precision
from zhibei.model.locate import locate
from zhibei.model.ranks import current
from zhibei.model.roles import Roles
from zhibei.text.families import find_template
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer
from zhibei.train.beginning import load_run_tokenizer, run_dir_of
from zhibei.train.finish import prove, write_model
from zhibei.train.materials import (
    GPU_PAD_MULTIPLE,
    Materials,
    check_vocabulary,
    require_dividable,
)
from zhibei.train.planning import settled_for
from zhibei.train.policy_loss import PTX, head_of
from zhibei.train.policy_models import roles_of, steppers
from zhibei.train.prompt_cursor import PromptCursor
from zhibei.train.reward_sources import Reward, place_of_reward_model, plan_reward, reward_of
from zhibei.train.schedule import require_peak
from zhibei.train.step import Stepper
from zhibei.train.task import HeldoutFigures, Task


@dataclass(frozen=True)
class PolicyMaterials:
    """Everything but the loop. `materials` is what every run has, with prompts for rows."""

    materials: Materials
    section: PolicySection
    roles: Roles
    critic: Stepper | None
    reward: Reward
    questions: Mapping[str, Question]
    """Question and reference by the id of a prompt."""
    cursor: PromptCursor
    plan: BatchPlan
    head: TokenLoss
    write: Callable[..., Rollout] = write_answers
    """What writes answers (generate/rollouts.py, generate/vllm_engine.py)."""
    ptx: Batches | None = None
    """Supervised rows whose loss is added, one batch per optimiser step."""

    @property
    def run(self) -> RunFile:
        return self.materials.run

    def ptx_passes(self, step: int, answers: list[Batch], *, coefficient: float) -> list[Batch]:
        """Supervised rows of one optimiser step beside these passes over answers; none without such rows. Their mean
        loss per token counts `coefficient`, on all ranks together. They add no units: the step stays a mean over the
        tokens of answers."""
        if self.ptx is None or coefficient == 0:
            return []
        passes = self.ptx.micro_batches(step)
        counted = [sum(batch.num_units for batch in some) for some in (answers, passes)]
        num_units, num_supervised = current().sum_on_host(*counted)
        share = coefficient * num_units / max(1.0, num_supervised)
        return [replace(batch, num_units=0, columns_I={PTX: torch.tensor([share])}) for batch in passes]


def gather_policy(
    resolved: ResolvedRun,
    *,
    on_rows: Callable[[int, str], None] | None = None,
    on_audit: Callable[[PreparedSet], None] | None = None,
) -> PolicyMaterials:
    """Prompts, references and the reward first (cheap to be wrong about), then the models.

    Raises UserError for whatever is wrong with the run file, prompts, reward, tokenizer, models or device.
    """
    run = resolved.run
    section = run.training
    assert isinstance(section, PolicySection)
    device = choose_device(run.device)
    precision = choose_precision(run.model.precision, device)
    tokenizer = load_run_tokenizer(run)
    template = find_template(run.data.template, tokenizer)
    rows = current().first_then_all(lambda: prompts_of(run, tokenizer, template, on_rows))
    if on_audit is not None:
        on_audit(rows)
    questions = read_questions(run.data, [*rows.train.row_ids, *rows.heldout.row_ids])
    rewarded = plan_reward(run, questions, tokenizer=tokenizer, template=template)
    cursor = cursor_of(run, section, num_prompts=len(rows.train))
    resolved, settled = planned(resolved, rows, device=device, cursor=cursor)
    run = resolved.run
    section = run.training
    assert isinstance(section, PolicySection)
    require_peak(section, cursor.num_iterations)
    require_dividable(run)
    torch.manual_seed(run.seed)
    roles = roles_of(run, section, rewarded.shared, device=device, precision=precision)
    check_vocabulary(roles.policy, tokenizer)
    stepper, critic = steppers(run, section, roles)
    plan = BatchPlan(
        global_batch=1,
        micro_batch_tokens=section.tokens_per_pass,
        packing=run.data.packing,
        seed=run.seed,
        pad_multiple=GPU_PAD_MULTIPLE if device.type == "cuda" else 1,
        pad_token=tokenizer.pad_id,
        rank=current().rank,
        world=current().world,
    )
    materials = Materials(
        resolved=resolved,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        template=template,
        rows=rows,
        batches=Batches(rows.train, plan),
        heldout=None,
        plan=settled,
        model=roles.policy,
        stepper=stepper,
        task=POLICY_TASK,
        notes=(*resolved.notes, *filter(None, [place_of_reward_model(run)])),
    )
    ptx = ptx_batches(run, section, tokenizer, template, replace(plan, global_batch=section.global_batch))
    return PolicyMaterials(
        materials=materials,
        section=section,
        roles=roles,
        critic=critic,
        reward=reward_of(rewarded, run, roles, plan, precision=precision),
        questions=questions,
        cursor=cursor,
        plan=plan,
        head=head_of(roles.policy),
        write=WRITERS[section.engine](run, section, precision),
        ptx=ptx,
    )


def _ours(run: RunFile, section: PolicySection, precision: str) -> Callable[..., Rollout]:
    del run, section, precision
    return write_answers


def _vllm(run: RunFile, section: PolicySection, precision: str) -> Callable[..., Rollout]:
    require_vllm()
    if current().are_several:
        raise UserError(
            f"{run.stage}.engine: vllm on {current().world} ranks",
            expected="engine: ours, which writes with the weights that every rank has",
            fix=f"set {run.stage}.engine: ours, or train in one process",
            where=f"{run.stage}.engine",
        )
    return VllmWriter(
        folder=str(locate(run.model.path).weights),
        precision=precision,
        max_tokens=run.data.max_tokens + section.max_new_tokens,
        memory_share=section.vllm_memory_share,
        seed=run.seed,
    )


WRITERS: Mapping[str, Callable[[RunFile, PolicySection, str], Callable[..., Rollout]]] = {"ours": _ours, "vllm": _vllm}


def plan_without_models(
    resolved: ResolvedRun, *, on_rows: Callable[[int, str], None] | None = None
) -> tuple[PreparedSet, dict[str, Any]]:
    """The audited prompts and what would be done with them; no weights are loaded and no run directory is made."""
    run = resolved.run
    section = run.training
    assert isinstance(section, PolicySection)
    device = choose_device(run.device)
    tokenizer = load_run_tokenizer(run)
    rows = prompts_of(run, tokenizer, find_template(run.data.template, tokenizer), on_rows)
    cursor = cursor_of(run, section, num_prompts=len(rows.train))
    run = planned(resolved, rows, device=device, cursor=cursor)[0].run
    return rows, {
        "run_directory": str(run_dir_of(run).path),
        "model": run.model.path,
        "method": run.model.method,
        "reward_model": place_of_reward_model(run),
        "precision": f"{choose_precision(run.model.precision, device)} on {device}",
        "template": rows.template,
        "training_prompts": len(rows.train),
        "held_out_prompts": len(rows.heldout),
        "iterations": cursor.num_iterations,
        "answers_per_iteration": cursor.per_iteration * getattr(section, "answers_per_prompt", 1),
        "optimiser_steps": cursor.num_iterations * section.minibatches * section.inner_epochs,
        "micro_batch_tokens": run.training.tokens_per_pass,
        "activation_checkpointing": run.model.activation_checkpointing,
        "learning_rate": run.training.learning_rate,
        "evaluate_every": run.training.evaluate_every,
        "save_every": run.training.save_every,
    }


def cursor_of(run: RunFile, section: PolicySection, *, num_prompts: int) -> PromptCursor:
    """Which prompts each iteration answers: as many as make its answers, each prompt `answers_per_prompt` times."""
    return PromptCursor(
        num_prompts=num_prompts,
        per_iteration=prompts_per_iteration(run),
        epochs=section.epochs,
        max_steps=section.max_steps,
        seed=run.seed,
        shuffle=run.data.shuffle,
    )


def prompts_of(
    run: RunFile, tokenizer: Tokenizer, template: Template, on_rows: Callable[[int, str], None] | None
) -> PreparedSet:
    """The prompts of a run in the form of rows, so that what every run does with rows can be done with them."""
    found = prepare_answers(run, tokenizer, template, progress=on_rows)
    return PreparedSet(
        train=found.train.sides["prompt"],
        heldout=found.heldout.sides["prompt"],
        audit=found.audit,
        ledger=found.ledger,
        key=found.key,
        template=found.template,
        folder=found.folder,
        remarks=found.remarks,
    )


def planned(
    resolved: ResolvedRun, rows: PreparedSet, *, device: torch.device, cursor: PromptCursor
) -> tuple[ResolvedRun, Any]:
    """The run with what was left open filled in; a pass takes at least the longest prompt with the longest answer."""
    settled = settled_for(device, resolved.run, rows.train.lengths.tolist())
    resolved = with_planned(resolved, settled.values)
    run = resolved.run
    longest = int(rows.train.lengths.max()) + run.training.max_new_tokens  # pyright: ignore[reportAttributeAccessIssue]
    name = f"{run.stage}.micro_batch_tokens"
    if run.training.tokens_per_pass < longest:
        if name not in settled.values:
            raise UserError(
                f"{name}: {run.training.tokens_per_pass}, and the longest prompt with the longest answer has {longest} "
                "tokens",
                expected="room for one prompt and its answer in a forward pass",
                fix=f"set {name}: {longest} or more, or lower {run.stage}.max_new_tokens",
                where=name,
            )
        resolved = with_planned(resolved, {name: longest})
    values: dict[str, Any] = {**plan_intervals(resolved.run, num_steps=cursor.num_iterations)}
    if run.data.template != rows.template:
        values["data.template"] = rows.template
    return with_planned(resolved, values), settled


def ptx_batches(
    run: RunFile, section: PolicySection, tokenizer: Tokenizer, template: Template, plan: BatchPlan
) -> Batches | None:
    """Supervised rows or plain text whose loss keeps the policy from forgetting (arXiv:2203.02155, eq. 2)."""
    if not isinstance(section, PpoSection) or not section.ptx_sources:
        return None
    data = run.data.model_copy(update={"sources": section.ptx_sources, "validation": 0})
    rows = prepare(run.model_copy(update={"stage": "sft", "data": data}), tokenizer, template).train
    plan = replace(plan, global_batch=min(plan.global_batch, len(rows)))
    return Batches(rows, plan, max_steps=2**40)


def _no_figures(_materials: Materials, _batches: Batches) -> HeldoutFigures:
    raise RuntimeError("the held-out reward is measured by the loop")


def _no_loss(*_: object) -> torch.Tensor:
    raise RuntimeError("answers are learned from by the loop")


POLICY_TASK = Task(
    unit="token",
    step_loss=_no_loss,
    plain_loss=_no_loss,
    evaluate=_no_figures,
    write=write_model,
    prove=prove,
    judged_by="reward",
)
"""How the finished policy is written and proved: like any language model."""
