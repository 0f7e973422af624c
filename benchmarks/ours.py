"""zhibei on the common workload, through the classes its own training loop uses. Knows no rival."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.packed_model import pack
from benchmarks.records import Record, version_of
from benchmarks.timing import StepClock
from benchmarks.workload import Workload, random_model


@dataclass(frozen=True)
class OurSettings:
    """What is varied. Full training keeps fp32 master weights beside bf16 weights; a LoRA base is frozen bf16."""

    method: str
    micro_batch_tokens: int
    checkpointing: str = "none"
    compile: bool = True
    packing: bool = True
    rank: int = 16
    optimizer: str = "adamw"
    quantize: str = "nf4"
    """How the base of method qlora is held: nf4 or int8."""

    def describe(self, workload: Workload) -> Record:
        settings = {
            **workload.describe(),
            "weights": {"full": "bf16 + fp32 masters", "lora": "bf16", "qlora": self.quantize}[self.method],
            "compute": "bf16",
            "micro_batch": f"{self.micro_batch_tokens} tokens",
            "checkpointing": self.checkpointing,
            "packing": self.packing,
            "compile": self.compile,
            "optimizer": self.optimizer,
        }
        return {**settings, "rank": self.rank, "targets": "all-linear"} if self.method != "full" else settings


def prepared(rows: list[np.ndarray]) -> Any:
    """Rows in the form training takes them, all tokens learned (as the rivals do with bare token ids)."""
    from zhibei.data.prepared import PreparedRows

    return PreparedRows(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *rows]),
        supervised=np.ones(sum(len(row) for row in rows), dtype=bool),
        borders=np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
        row_ids=[f"random#{number}" for number in range(len(rows))],
    )


def run_file(settings: OurSettings, workload: Workload, num_steps: int) -> Any:
    """The run file of this measurement; the paths in it name nothing, since model and rows are made in memory."""
    from zhibei.config.run import RunFile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    content: dict[str, Any] = {
        "name": "benchmark",
        "device": device,
        "model": {
            "path": "random",
            "method": settings.method,
            "precision": "bf16" if device == "cuda" else "fp32",
            "activation_checkpointing": settings.checkpointing,
            "compile": settings.compile,
        },
        "data": {"sources": ["random"], "max_tokens": workload.max_tokens, "packing": settings.packing},
        "sft": {
            "global_batch": workload.global_batch,
            "max_steps": num_steps,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "learning_rate": 1e-5,
            "optimizer": settings.optimizer,
        },
    }
    if settings.method == "qlora":
        content["model"]["quantize"] = settings.quantize
    if settings.method != "full":
        content["lora"] = {"rank": settings.rank, "alpha": 2 * settings.rank}
    return RunFile.model_validate(content)


def assemble(settings: OurSettings, workload: Workload, num_steps: int) -> tuple[Any, Any, Any]:
    """(run file, Stepper, Batches): what `zhibei train` puts together, on random weights and rows."""
    from zhibei.data.prepared import PreparedSet
    from zhibei.model import attention
    from zhibei.model.device import DTYPES, choose_device
    from zhibei.model.language_model import LanguageModel
    from zhibei.model.load import Need, choose_attention
    from zhibei.model.lora import add_adapters
    from zhibei.train.materials import make_batches, make_stepper

    run = run_file(settings, workload, num_steps)
    device = choose_device(run.device)
    need = Need(device=device, precision=run.model.precision, packing=run.data.packing, longest_row=workload.max_tokens)
    attention.register()
    name = choose_attention(run.model.attention if settings.packing else "sdpa", need)
    hf = random_model(workload, dtype=DTYPES[need.precision], device=device.type, attention=name)
    if run.model.method == "qlora":
        hf = pack(hf, run.model.quantize)
    if run.model.method != "full":
        hf = add_adapters(hf, run.lora, seed=run.seed)
    model = LanguageModel(hf, attention_name=name, longest_row=workload.max_tokens)
    model.hf.train()
    stepper, _ = make_stepper(run, model)
    train = prepared(workload.rows(num_steps))
    rows = PreparedSet(train, heldout=prepared([]), audit={}, ledger=[], key="random", template="none")
    batches, _ = make_batches(run, rows, pad_token=0, device=device)
    return run, stepper, batches


def steps(stepper: Any, batches: Any, learning_rate: float) -> Iterator[tuple[Any, list[Any]]]:
    """(record, micro-batches) after each optimiser step."""
    for _, micro_batches in batches.steps():
        yield stepper.step(micro_batches, learning_rate=learning_rate), micro_batches


def zhibei(settings: OurSettings, workload: Workload, *, steps_timed: int, warmup: int) -> Record:
    """Time the product's own step over the workload."""
    run, stepper, batches = assemble(settings, workload, steps_timed + warmup)
    clock = StepClock(warmup)
    clock.start()
    num_micro_batches = []
    for record, micro_batches in steps(stepper, batches, run.sft.learning_rate):
        useful = sum(batch.num_tokens for batch in micro_batches)
        computed = sum(batch.tokens_BT.numel() for batch in micro_batches)
        clock.step_done(useful=lambda useful=useful: useful, computed=computed, loss=record.loss)
        num_micro_batches.append(len(micro_batches))
    return {
        "benchmark": "sft",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": settings.method,
        "settings": settings.describe(workload),
        **clock.figures(workload, settings.method),
        "micro_batches": max(num_micro_batches),
    }
