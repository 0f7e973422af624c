"""One run file trained twice, by zhibei and by the transformers Trainer, and the two curves compared.

Both see the same rows in the same order, the same starting weights and (LoRA) the same fresh adapters, in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.reference_trainer import Curve, ReferenceSettings, Row, train
from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RunFile
from zhibei.data.prepared import PreparedRows, PreparedSet


@dataclass(frozen=True)
class Difference:
    """Largest and mean absolute difference of two curves, and the largest relative one."""

    largest: float
    mean: float
    largest_relative: float


def difference(ours: list[float], theirs: list[float]) -> Difference:
    """A drift hides under the largest difference alone, hence the mean. Raises ValueError for unequal lengths."""
    absolute = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    relative = [gap / max(abs(b), 1e-12) for gap, b in zip(absolute, theirs, strict=True)]
    return Difference(max(absolute), sum(absolute) / len(absolute), max(relative))


def rows_of(prepared: PreparedRows) -> list[Row]:
    """Prepared rows as (token ids, learned or not)."""
    pairs = zip(prepared.borders[:-1], prepared.borders[1:], strict=True)
    return [(prepared.tokens[first:last], prepared.supervised[first:last]) for first, last in pairs]


def run_ours(resolved: ResolvedRun) -> tuple[Curve, PreparedSet, RunFile]:
    """Train through `zhibei.train`'s own loop and read the curve from its metrics.jsonl."""
    from zhibei.train.offline import train as train_ours

    seen: list[PreparedSet] = []
    run_dir = train_ours(resolved, on_audit=seen.append)
    curve = Curve()
    for line in run_dir.metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            curve.losses.append(record["loss"])
            curve.grad_norms.append(record["grad_norm"])
            curve.learning_rates.append(record["learning_rate"])
        elif record["kind"] == "heldout":
            curve.heldout.append(record["loss"])
    return curve, seen[0], resolved.run


def run_theirs(run: RunFile, prepared: PreparedSet, *, batch: int, make: Callable[..., Any] | None = None) -> Curve:
    """Train the same rows in the same order with the transformers Trainer, padded, `batch` rows per micro-batch.

    `make` builds another trainer, see reference_trainer.
    """
    from transformers import AutoModelForCausalLM

    from zhibei.train.materials import make_batches

    assert run.sft.max_steps is not None
    assert run.sft.learning_rate is not None
    batches, _ = make_batches(run, prepared, pad_token=0, device=torch.device("cpu"))
    order = [int(number) for step in range(run.sft.max_steps) for number in batches.items_of_step(step)]
    rows = rows_of(prepared.train)
    model: Any = AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32)
    if run.model.method == "lora":
        model = _with_adapters(model, run)
    settings = ReferenceSettings(
        learning_rate=run.sft.learning_rate,
        num_steps=run.sft.max_steps,
        batch=batch,
        accumulate=run.sft.global_batch // batch,
        schedule=run.sft.schedule,
        warmup_steps=run.sft.warmup_steps or 0,
        weight_decay=run.sft.weight_decay,
        max_grad_norm=run.sft.max_grad_norm,
        beta2=run.sft.beta2,
    )
    heldout = rows_of(prepared.heldout)[: run.sft.evaluate_rows]
    return train(model, [rows[number] for number in order], settings, heldout=heldout, make=make)


def _with_adapters(model: Any, run: RunFile) -> Any:
    """Plain PEFT, with the seed that ours draws its adapters from."""
    import peft

    torch.manual_seed(run.seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=run.lora.rank,
        lora_alpha=int(run.lora.alpha),
        lora_dropout=run.lora.dropout,
        target_modules=run.lora.targets,
    )
    return peft.get_peft_model(model, config)
