"""Supervised fine-tuning and continued pre-training as a task of the offline loop. Knows one method and no loop."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from zhibei.config.run import RunFile
from zhibei.data.batches import Batches
from zhibei.losses.tokens import TokenLoss
from zhibei.train.finish import prove, write_model
from zhibei.train.heldout import heldout_loss
from zhibei.train.task import HeldoutFigures, Task
from zhibei.train.token_loss import token_loss

if TYPE_CHECKING:
    from zhibei.train.materials import Materials


def sft_task(run: RunFile, plain: TokenLoss) -> Task:
    """Cross-entropy of the learned tokens. `plain`: the shape of the model's head, without smoothing and z-loss."""
    shaped = replace(plain, label_smoothing=run.sft.label_smoothing, z_loss=run.sft.z_loss)
    return Task(
        unit="token",
        step_loss=token_loss(shaped),
        plain_loss=token_loss(plain),
        evaluate=evaluate,
        write=write_model,
        prove=prove,
    )


def evaluate(materials: Materials, heldout: Batches) -> HeldoutFigures:
    """Held-out loss without label smoothing and z-loss, and what follows from it."""
    found = heldout_loss(
        materials.model, heldout, materials.task.plain_loss, num_rows=materials.run.training.evaluate_rows
    )
    return HeldoutFigures(found.loss, found.seconds, {"perplexity": found.perplexity, "tokens": found.num_tokens})
