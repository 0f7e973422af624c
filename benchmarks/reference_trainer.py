"""The transformers Trainer on given rows, step by step: what our training is compared with. Knows no zhibei loop.

Rows are (token ids, learned or not); the Trainer pads them, shifts the labels itself, sums over the accumulated
micro-batches and divides by the learned tokens of the step (`num_items_in_batch`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.workload import word_tokenizer

IGNORED = -100
Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ReferenceSettings:
    """The same names as in our run file, in the Trainer's units: `batch` rows x `accumulate` = rows per step."""

    learning_rate: float
    num_steps: int
    batch: int
    accumulate: int
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta2: float = 0.999


@dataclass
class Curve:
    """One value per optimiser step; `heldout` has one more: before the first step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    heldout: list[float] = field(default_factory=list)


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Right-padded ids, attention mask and labels; padding and unlearned tokens carry -100."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for index, (tokens, learned) in enumerate(rows):
        ids[index, : len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        mask[index, : len(tokens)] = 1
        labels[index, : len(tokens)] = torch.from_numpy(np.where(learned, tokens, IGNORED).astype(np.int64))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def heldout_loss(model: Any, rows: Sequence[Row], *, batch: int = 16) -> float:
    """Mean nats per learned token over all rows, through the model's own logits, added up in fp64."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            inputs = collate(rows[start : start + batch])
            logits_BTV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            targets = inputs["labels"][:, 1:].flatten()
            nats = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none"
            )
            total += float(nats.double().sum())
            count += int((targets != IGNORED).sum())
    model.train(was_training)
    return total / max(1, count)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def transformers_trainer(model: Any, rows: Sequence[Row], options: dict[str, Any], callback: Any) -> Any:
    """The Trainer of transformers on rows as they are."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**options, remove_unused_columns=False)
    return Trainer(model=model, args=arguments, train_dataset=_Rows(rows), data_collator=collate, callbacks=[callback])


def trl_trainer(model: Any, rows: Sequence[Row], options: dict[str, Any], callback: Any) -> Any:
    """TRL's SFTTrainer on the same token ids and labels, through its own preparation and collator."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    columns = {
        "input_ids": [tokens.tolist() for tokens, _ in rows],
        "labels": [np.where(learned, tokens, IGNORED).tolist() for tokens, learned in rows],
    }
    arguments = SFTConfig(**options, bf16=False, gradient_checkpointing=False, max_length=None, dataset_num_proc=None)
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=word_tokenizer(model.config.vocab_size),
        callbacks=[callback],
    )


def train(
    model: Any,
    rows: Sequence[Row],
    settings: ReferenceSettings,
    *,
    heldout: Sequence[Row] = (),
    make: Callable[..., Any] | None = None,
) -> Curve:
    """Train `model` in place over `rows` in their order; returns what the trainer saw at each step.

    `make` builds the trainer: `transformers_trainer` unless told otherwise, or `trl_trainer`.
    """
    from transformers import TrainerCallback

    curve = Curve()
    micro_losses: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if heldout:
                curve.heldout.append(heldout_loss(model, heldout))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            curve.losses.append(float(torch.stack(micro_losses).sum()))
            micro_losses.clear()
            if heldout:
                curve.heldout.append(heldout_loss(model, heldout))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "grad_norm" in logs:
                curve.grad_norms.append(float(logs["grad_norm"]))
                curve.learning_rates.append(float(logs["learning_rate"]))

    with tempfile.TemporaryDirectory(prefix="reference-trainer-") as folder:
        options = {
            "output_dir": folder,
            "max_steps": settings.num_steps,
            "per_device_train_batch_size": settings.batch,
            "gradient_accumulation_steps": settings.accumulate,
            "train_sampling_strategy": "sequential",
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.schedule,
            "warmup_steps": settings.warmup_steps,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "adam_beta2": settings.beta2,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = (transformers_trainer if make is None else make)(model, rows, options, Watch())
        _keep_losses(trainer, micro_losses)
        trainer.train()
    return curve


def _keep_losses(trainer: Any, micro_losses: list[torch.Tensor]) -> None:
    """The Trainer logs losses rounded; what `training_step` returns is each micro-batch's share of the step's mean."""
    inner = trainer.training_step

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = inner(*args, **kwargs)
        micro_losses.append(loss.detach())
        return loss

    trainer.training_step = kept
