"""What a run asks of a machine's memory, as plain values. Knows the run file, not what anything costs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from zhibei.config.distributed import Sharding
from zhibei.config.policy import PolicySection
from zhibei.config.run import RunFile
from zhibei.plan.activations import Execution
from zhibei.plan.machines import Gpu, Machine
from zhibei.plan.shapes import ModelShape

Offload = Literal["none", "optimizer", "all"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")
ITEM_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
GPU_PAD_MULTIPLE = 64  # train/materials.py
PANEL_PROMPTS = 4  # train/samples.py


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known about the rows. `is_assumed`: nothing was prepared yet, so every row counts as full."""

    longest: int
    mean_tokens: float
    num_rows: int | None = None
    is_assumed: bool = True
    step_tokens: tuple[int, ...] = ()
    """Tokens of some shuffled optimiser steps, where row lengths are known."""


STEPS_LOOKED_AT = 400


def rows_of_lengths(lengths: Sequence[int], *, global_batch: int) -> Rows:
    """The rows of a prepared set: lengths, and the sums of some steps in a shuffled order."""
    order = list(lengths)
    random.Random(0).shuffle(order)
    starts = range(0, max(1, len(order) - global_batch + 1), global_batch)
    sums = tuple(sum(order[start : start + global_batch]) for start in starts[:STEPS_LOOKED_AT])
    return Rows(max(order), sum(order) / len(order), len(order), is_assumed=False, step_tokens=sums)


@dataclass(frozen=True, slots=True)
class Job:
    """One configuration to predict.

    `pass_tokens`: tokens of the largest forward pass, padding included. `num_passes`: forward passes per optimiser
    step; from two on, 16-bit gradients are summed in fp32. `row_tokens`: the longest row.
    """

    pass_tokens: int
    num_passes: int = 1
    row_tokens: int = 1024
    stage: str = "sft"
    method: str = "full"
    quantize: str = "none"
    precision: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    is_compiled: bool = True
    packing: bool = True
    attention: str = "varlen"
    rank: int = 16
    targets: tuple[str, ...] = ()
    """Last names of the linears with an adapter; empty for full training."""
    modules_to_save: tuple[str, ...] = ()
    has_loss_extras: bool = False
    sample_tokens: int = 64
    heldout_tokens: int | None = None
    """Tokens of a held-out pass, where there are too few held-out rows to fill one."""
    reference: str = "auto"
    ppo_models: str = "shared"
    has_reward_model: bool = False
    """Whether a reward model is loaded beside the policy, a model of its own."""
    reward_adapter_bytes: int = 0
    """Of a reward model that is an adapter on the policy's base instead."""
    has_reference: bool = True
    rollout_batch: int = 32
    engine_bytes: float = 0.0
    """What an engine beside the policy takes of each GPU (vLLM); 0 where the policy's own weights write."""
    max_new_tokens: int = 128
    sharding: Sharding = "no_shard"
    offload: Offload = "none"
    num_gpus: int = 1
    gpus_per_node: int = 1
    on_gpu: bool = True
    saves_beside: bool | Literal["auto"] = "auto"
    """Whether what is saved is copied to host memory, so that training goes on; auto: where there is room."""

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.precision]

    @property
    def trains_adapters(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def execution(self) -> Execution:
        return Execution(
            item_bytes=self.item_bytes,
            is_compiled=self.is_compiled,
            checkpointing=self.checkpointing,
            attention=self.attention,
            trains_weights=not self.trains_adapters,
            adapted=frozenset(self.targets),
            rank=self.rank,
        )


@dataclass(frozen=True, slots=True)
class Ways:
    """What can be chosen without changing what is learned."""

    micro_batch_tokens: int
    checkpointing: str = "none"
    sharding: Sharding = "no_shard"
    offload: Offload = "none"


def precision_on(asked: str, gpu: Gpu | None) -> str:
    """What `auto` becomes on a card (model/device.py): bf16 where it has it, fp16 on older ones, fp32 on a CPU."""
    if asked != "auto":
        return asked
    if gpu is None:
        return "fp32"
    return "bf16" if gpu.has_bf16 else "fp16"


def attention_on(asked: str, gpu: Gpu | None, *, packing: bool, precision: str, shape: ModelShape) -> str:
    """The attention that loading picks (model/load.py, choose_attention)."""
    if not packing:
        return "eager" if asked == "eager" or shape.attention_softcap else "sdpa"
    has_varlen = gpu is not None and gpu.vendor == "nvidia" and gpu.capability >= (8, 0) and precision != "fp32"
    if has_varlen and asked in ("auto", "varlen") and not shape.attention_softcap:
        return "varlen"
    return "documents"


def adapted_names(shape: ModelShape, targets: str | list[str]) -> tuple[str, ...]:
    """Last names of the linears that get an adapter."""
    names = {linear.last_name for linear in shape.linears()}
    if targets == "all-linear":
        return tuple(sorted(names))
    return tuple(sorted(name for name in names if any(name == target.rsplit(".", 1)[-1] for target in targets)))


def with_answers(run: RunFile, rows: Rows) -> Rows:
    """Rows as passes see them: where the rows of a stage are prompts, each with the longest answer to it."""
    more = getattr(run.training, "max_new_tokens", 0)
    if not more:
        return rows
    answers = run.training.global_batch
    # A prompt may be answered several times in a step.
    times = answers / min(answers, rows.num_rows or answers)
    steps = tuple(int(times * tokens) + more * answers for tokens in rows.step_tokens)
    return replace(rows, longest=rows.longest + more, mean_tokens=rows.mean_tokens + more, step_tokens=steps)


def job_of(
    run: RunFile,
    shape: ModelShape,
    machine: Machine,
    rows: Rows,
    ways: Ways,
    *,
    judge: Path | None = None,
) -> Job:
    """The job of a run file on a machine, with the choices that may be planned given. `judge`: the adapter folder of a
    reward model that lies on the run's base (zhibei/store/reward_models.py)."""
    micro_batch_tokens, sharding = ways.micro_batch_tokens, ways.sharding
    gpu = machine.smallest_gpu
    precision = precision_on(run.model.precision, gpu)
    is_lora = run.model.method != "full"
    section = run.training
    num_gpus = max(1, machine.num_gpus) if sharding != "no_shard" or machine.num_gpus > 1 else 1
    largest, passes = passes_of(
        rows, micro_batch_tokens, global_batch=section.global_batch, num_gpus=num_gpus, packing=run.data.packing
    )
    multiple = GPU_PAD_MULTIPLE if gpu is not None else 1
    is_policy = isinstance(section, PolicySection)
    policy = section if is_policy else run.ppo
    return Job(
        pass_tokens=-(-largest // multiple) * multiple,
        num_passes=passes,
        row_tokens=rows.longest,
        stage=run.stage,
        method=run.model.method,
        quantize=run.model.held_as,
        precision=precision,
        optimizer=section.optimizer,
        checkpointing=ways.checkpointing,
        is_compiled=gpu is not None if run.model.compile == "auto" else bool(run.model.compile),
        packing=run.data.packing,
        attention=attention_on(run.model.attention, gpu, packing=run.data.packing, precision=precision, shape=shape),
        rank=run.lora.rank,
        targets=adapted_names(shape, run.lora.targets) if is_lora else (),
        modules_to_save=tuple(run.lora.modules_to_save) if is_lora else (),
        sample_tokens=getattr(section, "sample_tokens", 0),
        reference=run.dpo.reference,
        ppo_models=run.ppo.models,
        has_reward_model=is_policy and policy.reward_model is not None and judge is None,
        reward_adapter_bytes=bytes_of_adapter(judge) if is_policy and judge is not None else 0,
        has_reference=run.stage == "ppo" or getattr(section, "kl_coefficient", 0) > 0,
        rollout_batch=policy.rollout_batch,
        engine_bytes=share_of_vllm(policy, gpu) if is_policy else 0.0,
        max_new_tokens=policy.max_new_tokens,
        sharding=sharding,
        offload=ways.offload,
        num_gpus=num_gpus,
        gpus_per_node=max(1, len(machine.gpus)),
        on_gpu=gpu is not None,
        saves_beside=section.save_in_background,
    )


def share_of_vllm(section: PolicySection, gpu: Gpu | None) -> float:
    """vLLM takes its share of the card at once, weights, cache and all."""
    if section.engine != "vllm" or gpu is None:
        return 0.0
    return section.vllm_memory_share * gpu.memory_gib * 2**30


def bytes_of_adapter(folder: Path) -> int:
    """Of the tensors of a PEFT folder, as they are stored."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def passes_of(
    rows: Rows, micro_batch_tokens: int, *, global_batch: int, num_gpus: int = 1, packing: bool = True
) -> tuple[int, int]:
    """(tokens of the largest pass, passes of the longest step) on one GPU.

    Packed rows are spread over the fewest nearly equal passes (data/batches.py, split_packed); padded ones fill the
    budget with rows of one width (split_padded). Full rows are assumed where lengths are not known.
    """
    rows_per_gpu = max(1, -(-global_batch // num_gpus))
    if not packing or not rows.step_tokens:
        width = rows.longest
        fitting = max(1, micro_batch_tokens // width)
        passes = -(-rows_per_gpu // fitting)
        even = -(-rows_per_gpu // passes) if packing else min(fitting, rows_per_gpu)
        return even * width, passes
    largest = most = 0
    for total in rows.step_tokens:
        share = max(rows.longest, -(-total // num_gpus))
        passes = max(1, -(-share // micro_batch_tokens))
        # The longest row first, each to the lightest pass: the heaviest ends within a hundredth of the mean.
        largest = max(largest, min(micro_batch_tokens, max(rows.longest, int(1.01 * share / passes) + 1)))
        most = max(most, passes)
    return largest, most
