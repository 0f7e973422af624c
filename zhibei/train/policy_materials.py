"""What learning from rewards works with, made from a run file: prompts, reward, models, optimisers. No loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.policy import PolicySection, PpoSection, RatioSection
from zhibei.config.policy_rules import prompts_of_iteration
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
from zhibei.model.dropout import without_dropout
from zhibei.model.load import Need
from zhibei.model.locate import locate
from zhibei.model.roles import Cast, Roles, load_roles
from zhibei.model.savings import checkpoint_activations, compile_layers
from zhibei.text.families import find_template
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer
from zhibei.train.beginning import load_run_tokenizer, run_dir_of
from zhibei.train.finish import prove, write_model
from zhibei.train.materials import GPU_PAD_MULTIPLE, Materials, check_vocabulary
from zhibei.train.optimizer import make_optimizer
from zhibei.train.planning import settled_for
from zhibei.train.policy_loss import PTX, head_of, policy_loss, shape_of, value_loss
from zhibei.train.prompt_cursor import PromptCursor
from zhibei.train.reward_sources import Reward, place_of_reward_model, plan_reward, reward_of
from zhibei.train.schedule import require_peak
from zhibei.train.step import Stepper
from zhibei.train.task import HeldoutFigures, Task
from zhibei.train.token_loss import token_loss

KL_IN_LOSS = ("grpo", "dr_grpo")
"""Methods whose KL to the reference is part of the loss; the others take it off the reward."""


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

    def ptx_passes(self, step: int, *, weight: float) -> list[Batch]:
        """Supervised rows of one optimiser step whose mean loss per token adds `weight` to the step's sum; none without
        such rows. They add no units: the step stays a mean over the tokens of answers."""
        if self.ptx is None or weight == 0:
            return []
        passes = self.ptx.micro_batches(step)
        share = weight / max(1, sum(batch.num_units for batch in passes))
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
    rows = prompts_of(run, tokenizer, template, on_rows)
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
    written = section.global_batch * section.minibatches
    per_iteration = {
        "ppo": written,
        "grpo": written // run.grpo.answers_per_prompt,
        "raft": round(prompts_of_iteration(run)) if run.stage == "raft" else 0,
    }
    return PromptCursor(
        num_prompts=num_prompts,
        per_iteration=per_iteration[run.stage],
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


def roles_of(
    run: RunFile, section: PolicySection, judge: Path | None, *, device: torch.device, precision: str
) -> Roles:
    """The models that a stage needs. Without a weight on the KL there is no reference to keep. `judge`: the adapter
    folder of a reward model that lies on the policy's base."""
    need = Need(
        device=device,
        precision=precision,
        packing=run.data.packing,
        longest_row=run.data.max_tokens + section.max_new_tokens,
        seed=run.seed,
    )
    is_ppo = isinstance(section, PpoSection)
    cast = Cast(
        has_critic=is_ppo,
        has_reference=is_ppo or getattr(section, "kl_coefficient", 0.0) > 0,
        is_shared=is_ppo and section.models == "shared",
        judge=judge,
        critic_from=section.reward_model if is_ppo and section.critic_from == "reward_model" else None,
    )
    roles = load_roles(run.model, run.lora, need, cast)
    for model in roles.own_models:
        without_dropout(model)
    return roles


def steppers(run: RunFile, section: PolicySection, roles: Roles) -> tuple[Stepper, Stepper | None]:
    """Optimisers of policy and critic, with their losses."""
    in_loss = run.grpo.kl_coefficient if run.stage == "grpo" and run.grpo.method in KL_IN_LOSS else 0.0
    make_ready(run, roles)
    optimizer = make_optimizer(roles.policy.trainable(), section)
    if isinstance(section, RatioSection):
        loss = policy_loss(shape_of(section, roles.policy, kl_in_loss=in_loss))
    else:
        loss = token_loss(head_of(roles.policy))
    stepper = Stepper(roles.policy, optimizer, loss, max_grad_norm=section.max_grad_norm)
    if roles.critic is None:
        return stepper, None
    with roles.as_critic() as critic:
        optimizer = make_optimizer(critic.parameters, section)
        loss = value_loss(critic, clip=run.ppo.value_clip)
        return stepper, Stepper(critic.model, optimizer, loss, max_grad_norm=section.max_grad_norm)


def make_ready(run: RunFile, roles: Roles) -> None:
    """Recompute activations where asked for. Layers are compiled only when the run file says so: prompts and answers
    have other lengths in every pass."""
    how = run.model.activation_checkpointing
    for model in roles.own_models:
        compiled = compile_layers(model, run.model.compile is True)
        checkpoint_activations(model, "none" if how == "auto" else how, compiled=compiled)


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
