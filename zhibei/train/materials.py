"""What a supervised run works with, made from its run file: tokenizer, template, rows, model, batches. No loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from zhibei.config.errors import UserError
from zhibei.config.resolve import ResolvedRun, plan_intervals, with_planned
from zhibei.config.run import RunFile
from zhibei.data.batches import Batches, BatchPlan
from zhibei.data.prepared import PreparedRows, PreparedSet
from zhibei.losses.tokens import TokenLoss
from zhibei.model.device import choose_device, choose_precision
from zhibei.model.dropout import without_dropout
from zhibei.model.language_model import LanguageModel
from zhibei.model.load import Need, load_for_training
from zhibei.model.ranks import current
from zhibei.model.savings import checkpoint_activations, compile_layers
from zhibei.model.score_model import load_score_model
from zhibei.model.sharding import shard
from zhibei.plan.division import why_whole
from zhibei.plan.settle import Settled
from zhibei.store.shards import Writable
from zhibei.text.families import find_template
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer
from zhibei.train.beginning import load_run_tokenizer, run_dir_of
from zhibei.train.items import READERS, Items, supervised_items
from zhibei.train.optimizer import make_optimizer
from zhibei.train.planning import settled_for
from zhibei.train.preferences import preference_task
from zhibei.train.reward import reward_task
from zhibei.train.schedule import require_peak
from zhibei.train.sft import sft_task
from zhibei.train.step import Stepper
from zhibei.train.task import Task

# Token counts are padded up to this on a GPU, so that compiled kernels and the matrix units see even shapes.
GPU_PAD_MULTIPLE = 64
TASKS: dict[str, Callable[[RunFile, TokenLoss], Task]] = {
    "sft": sft_task,
    "reward": reward_task,
    "dpo": preference_task,
}
"""The stages that learn from given rows."""


@dataclass(frozen=True)
class Ready:
    """What can be had without weights. `resolved` has the planned values filled in."""

    resolved: ResolvedRun
    device: torch.device
    precision: str
    tokenizer: Tokenizer
    template: Template
    rows: PreparedSet
    batches: Batches
    heldout: Batches | None
    plan: Settled
    """Memory and time as they were planned for this machine."""


@dataclass(frozen=True)
class Materials(Ready):
    """Everything but the loop."""

    model: LanguageModel
    stepper: Stepper
    task: Task
    """What this stage learns, and how it is judged and written."""
    notes: tuple[str, ...] = ()
    mismatched_heldout: Batches | None = None
    """KTO: the held-out prompts, each with an answer to another one."""
    whole: Mapping[str, Writable] = field(default_factory=dict)
    """While a model is written that is divided among ranks: its tensors, put together."""

    @property
    def run(self) -> RunFile:
        return self.resolved.run


def gather(
    resolved: ResolvedRun,
    *,
    on_rows: Callable[[int, str], None] | None = None,
    on_audit: Callable[[PreparedSet], None] | None = None,
) -> Materials:
    """Read, render, mask and audit all rows first (cheap to be wrong about), then load the model.

    Raises UserError for whatever is wrong with the run file, rows, tokenizer, model or device.
    """
    ready = read_rows(resolved, on_rows=on_rows, on_audit=on_audit)
    run, device = ready.resolved.run, ready.device
    torch.manual_seed(run.seed)
    need = Need(
        device=device,
        precision=ready.precision,
        packing=run.data.packing,
        longest_row=run.data.max_tokens,
        seed=run.seed,
        neftune_alpha=run.sft.neftune_alpha,
        is_skeleton=divides(run) and not current().is_first,
        loaded_on=torch.device("cpu") if divides(run) else None,
    )
    load = load_score_model if run.stage == "reward" else load_for_training
    model = load(run.model, run.lora, need)
    if run.stage != "sft":
        without_dropout(model)
    check_vocabulary(model, ready.tokenizer)
    stepper, task = make_stepper(run, model)
    return Materials(**vars(ready), model=model, stepper=stepper, task=task, notes=resolved.notes)


def read_rows(
    resolved: ResolvedRun,
    *,
    on_rows: Callable[[int, str], None] | None = None,
    on_audit: Callable[[PreparedSet], None] | None = None,
) -> Ready:
    """Everything that needs no weights: device, tokenizer, template, audited rows, batches, planned values."""
    run = resolved.run
    require_rows(run)
    device = choose_device(run.device)
    precision = choose_precision(run.model.precision, device)
    tokenizer = load_run_tokenizer(run)
    template = find_template(run.data.template, tokenizer)
    items = current().first_then_all(lambda: READERS[run.stage](run, tokenizer, template, on_rows))
    if on_audit is not None:
        on_audit(items.rows)
    settled = settled_for(device, run, items.lengths)
    resolved = with_planned(resolved, settled.values)
    require_dividable(resolved.run)
    run, rows = resolved.run, items.rows
    batches, heldout = make_batches(run, items, pad_token=tokenizer.pad_id, device=device)
    planned = {**plan_intervals(run, num_steps=batches.num_steps), **_named(rows, run)}
    return Ready(
        resolved=with_planned(resolved, planned),
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        template=template,
        rows=rows,
        batches=batches,
        heldout=heldout,
        plan=settled,
    )


def divides(run: RunFile) -> bool:
    """Whether weights are divided among ranks, so that only rank 0 reads them."""
    return current().are_several and run.distributed.sharding != "no_shard"


def require_dividable(run: RunFile) -> None:
    """Raises UserError where weights cannot be divided as the run file says, or whole ones should lie on the host: a
    card then has nothing to compute with."""
    if run.distributed.offload == "all" and not divides(run):
        raise UserError(
            "distributed.offload: all, and every rank holds the whole model",
            expected="weights that are divided among several ranks, or only the optimiser on the host",
            fix="set distributed.offload: optimizer, or start several ranks with distributed.sharding: full_shard",
            where="distributed.offload",
        )
    reason = why_whole(run)
    if divides(run) and reason is not None:
        raise UserError(
            f"distributed.sharding: {run.distributed.sharding} with {reason}",
            expected="whole models on every rank; gradients are added up either way",
            fix="set distributed.sharding: no_shard (with distributed.offload: optimizer to save more), or change that "
            "setting",
            where="distributed.sharding",
        )


def require_rows(run: RunFile) -> None:
    """Raises UserError for the stages that do not learn from given rows; they have loops of their own, or none yet."""
    if run.stage not in TASKS:
        raise UserError(
            f"a run of stage {run.stage} does not learn from given rows, but from answers of its own",
            expected=f"stage: {', '.join(TASKS)}",
            fix=f"`zhibei check` and `zhibei plan` read this run file and say whether its {run.stage} run would work",
            where="stage",
        )


def make_stepper(run: RunFile, model: LanguageModel) -> tuple[Stepper, Task]:
    """The model made ready to train (compiled, activations checkpointed) with its optimiser; and the task."""
    divide(run, model)
    compiled = compile_layers(model, run.model.compile)
    how = run.model.activation_checkpointing
    checkpoint_activations(model, "none" if how == "auto" else how, compiled=compiled)
    plain = TokenLoss(softcap=model.head_shape.softcap, logit_scale=model.head_shape.scale, compiled=compiled)
    task = TASKS[run.stage](run, plain)
    learning = model.trainable()
    optimizer = make_optimizer(learning, run.training, on_host=run.distributed.offload != "none")
    stepper = Stepper(
        model,
        optimizer,
        task.step_loss,
        max_grad_norm=run.training.max_grad_norm,
        parameters=learning,
        ranks=current(),
    )
    return stepper, task


def divide(run: RunFile, model: LanguageModel) -> None:
    """Divide a model among the ranks as the run file says."""
    shard(
        model,
        run.distributed.sharding,
        ranks=current(),
        device=choose_device(run.device),
        compute_dtype=model.dtype,
        offload=run.distributed.offload == "all",
    )


def plan_without_model(
    resolved: ResolvedRun, *, on_rows: Callable[[int, str], None] | None = None
) -> tuple[PreparedSet, dict[str, Any]]:
    """The audited rows and what would be trained on them; no weights are loaded and no run directory is made."""
    ready = read_rows(resolved, on_rows=on_rows)
    run, rows, batches = ready.resolved.run, ready.rows, ready.batches
    return rows, {
        "run_directory": str(run_dir_of(run).path),
        "model": run.model.path,
        "method": run.model.method,
        "precision": f"{ready.precision} on {ready.device}",
        "template": rows.template,
        "training_rows": batches.num_items,
        "held_out_rows": ready.heldout.num_items if ready.heldout is not None else 0,
        "tokens_per_epoch": int(rows.train.lengths.sum()),
        "optimiser_steps": batches.num_steps,
        "micro_batch_tokens": run.training.tokens_per_pass,
        "activation_checkpointing": run.model.activation_checkpointing,
        "passes_in_first_step": len(batches.micro_batches(0)),
        "learning_rate": run.training.learning_rate,
        "evaluate_every": run.training.evaluate_every,
        "save_every": run.training.save_every,
    }


def _named(rows: PreparedSet, run: RunFile) -> dict[str, Any]:
    return {} if run.data.template == rows.template else {"data.template": rows.template}


def make_batches(
    run: RunFile, rows: Items | PreparedSet, *, pad_token: int, device: torch.device
) -> tuple[Batches, Batches | None]:
    """Training batches, and held-out ones when there are held-out rows."""
    items = rows if isinstance(rows, Items) else supervised_items(rows)
    section = run.training
    plan = BatchPlan(
        global_batch=section.global_batch,
        micro_batch_tokens=section.tokens_per_pass,
        packing=run.data.packing,
        shuffle=run.data.shuffle,
        group_by_length=run.data.group_by_length,
        seed=run.seed,
        pad_multiple=GPU_PAD_MULTIPLE if device.type == "cuda" else 1,
        pad_token=pad_token,
        rows_per_item=items.rows_per_item,
        unit=items.unit,
        rank=current().rank,
        world=current().world,
    )
    batches = Batches(
        items.rows.train, plan, epochs=section.epochs, max_steps=section.max_steps, columns_I=items.train_columns
    )
    require_peak(section, batches.num_steps)
    return batches, heldout_batches(items.rows.heldout, plan, items.heldout_columns)


def heldout_batches(
    rows: PreparedRows, plan: BatchPlan, columns: Mapping[str, np.ndarray] | None = None
) -> Batches | None:
    """Batches over held-out rows; None when there are no such rows."""
    if len(rows) == 0:
        return None
    num_items = len(rows) // plan.rows_per_item
    return Batches(rows, replace(plan, global_batch=min(plan.global_batch, num_items)), columns_I=columns)


def check_vocabulary(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Every id the tokenizer can give must have an embedding. Raises UserError."""
    rows = model.inner.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model has {rows} embeddings",
            expected="a tokenizer that belongs to the model",
            fix="use the model's own tokenizer (remove model.tokenizer), or resize the model's embeddings first",
            where="model.tokenizer",
        )
