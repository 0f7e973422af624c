"""Sections that every training stage shares: batch, optimiser, schedule, evaluation, saving. Knows no stage.

The string under a field is its documentation, as in `zhibei.config.run`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
TOKENS_PER_PASS = 4096


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TrainingSection(Section):
    """What every training method shares: batch, optimiser, schedule, held-out evaluation, saving."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training rows. Ignored when max_steps is given."""
    max_steps: Positive | None = None
    """Stop after so many optimiser steps, whatever epochs says."""
    global_batch: Positive = 128
    """Rows per optimiser step on all GPUs together."""
    micro_batch_tokens: Positive | Literal["auto"] = "auto"
    """Most tokens in one forward pass on one GPU; rows of a step are spread over as many passes as that needs.
    auto: the fastest that fits on the GPU (`zhibei plan` shows it); 4096 on a CPU."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate. By default, for full training / for adapters: sft 2e-5 / 2e-4, reward 1e-5 / 1e-4,
    dpo 5e-7 / 5e-6, ppo and grpo 1e-6 / 1e-5, raft 2e-5 / 2e-4."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd: constant, then linear decay over the last `decay_ratio` of the steps."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps in which the rate rises linearly from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in steps; wins over warmup_ratio."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd only: share of all steps spent in the final decay."""
    min_lr_ratio: Fraction = 0.0
    """The rate ends at this share of its peak."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw: fp32 states (8 bytes per parameter). adamw_8bit: block-wise 8-bit states. adafactor: factored states."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices and embeddings, not on norms and biases."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second-moment decay."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator floor."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    evaluate_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between held-out evaluations; by default ten per run; 0 only at the end."""
    evaluate_rows: Positive = 1000
    """At most so many held-out rows are used per evaluation."""
    early_stop_patience: Positive | None = None
    """Stop after so many evaluations without a better held-out loss."""
    save_every: Annotated[int, Field(ge=0)] | None = None
    """Steps between checkpoints; by default as often as evaluations; 0 only at the end."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept, besides the best one."""
    save_in_background: bool | Literal["auto"] = "auto"
    """Train on while a checkpoint is written; it takes a copy in host memory of what is saved. auto: where that is at
    most half of the free memory."""
    keep_best: bool = True
    """Write the model of the best held-out evaluation as the final model."""

    @property
    def tokens_per_pass(self) -> int:
        """`micro_batch_tokens`, or what a CPU takes where nothing was planned."""
        return TOKENS_PER_PASS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


class AnsweringSection(TrainingSection):
    """What every training method shares whose model writes answers: the sample panel."""

    sample_prompts: list[str] = []
    """Prompts answered at evaluations, side by side with the base model; by default four held-out ones."""
    sample_tokens: Annotated[int, Field(ge=0)] = 64
    """Tokens per sampled answer; 0 switches the sample panel off."""
