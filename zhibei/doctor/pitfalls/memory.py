"""Pits of memory: cards and hosts that are too small for a phase of the run. Knows the plan, not how it adds up."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.plan.memory import LATER, MemoryPlan, Phase, device_gib

MOST_CAUSES = 4


@pitfall(
    "memory",
    cost="launch",
    errors=[
        r"CUDA out of memory",
        r"torch(?:\.cuda)?\.OutOfMemoryError",
        r"HIP out of memory",
        r"CUBLAS_STATUS_ALLOC_FAILED",
        r"no executable batch size found, reached zero",
        r"failed to allocate CUDA\d* buffer",
        r"MPS backend out of memory",
        r"CUDA error: out of memory",
        r"OutOfMemoryError: .{0,40}tried to allocate",
        r"cudaMalloc failed: out of memory",
        r"cuda(?: runtime)? error.{0,30}out of memory",
        r"reserved but unallocated memory",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/11388",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/65",
        "https://github.com/hiyouga/LLaMA-Factory/issues/3668",
    ],
)
def gpu_memory_too_small(facts: Facts) -> Iterable[Finding]:
    """A phase of the run needs more memory than the card has.

    Why: Weights, gradients and optimiser states are fixed by the model and the method; activations grow with the
    tokens of one pass. A card that holds the first steps may still be too small for the longest batch, for an
    evaluation, or for a save hours later. The plan adds up every phase by cause before anything is loaded.

    Fix: Take what the finding proposes: fewer tokens per pass, recomputed activations, adapters instead of full
    training, or a larger card. `zhibei plan` shows the phases and what each of these would give.

    运行的某个阶段需要的显存超过显卡容量。

    为何：权重、梯度与优化器状态由模型和方法决定，激活随每次前向的 token 数增长。能跑过头几步的显卡，
    几小时后仍可能在最长的
    批次、评估或保存时溢出。计划会在加载任何权重之前按原因逐阶段相加。

    办法：按提示处理：减少每次前向的 token、重算激活、用适配器代替全量训练，或换更大的显卡。
    `zhibei plan` 会列出各阶段及每种做法的
    效果。
    """
    plan = facts.plan
    if plan is None or plan.capacity_gib is None:
        return
    too_big = [phase for phase in plan.phases if phase.name not in LATER and device_gib(phase.gib) > plan.capacity_gib]
    if not too_big:
        return
    worst = max(too_big, key=lambda phase: phase.gib)
    where = facts.origin("model.method") if plan.job.pass_tokens <= plan.job.row_tokens else _where(facts)
    yield Finding(
        what=f"the phase '{worst.name}' needs {device_gib(worst.gib):.1f} GiB on the GPU, "
        f"{_card(facts)} has {plan.capacity_gib:.1f}: {_causes(worst)}",
        where=where,
        to_do=_remedy(facts),
        evidence=tuple(f"{phase.name}: {device_gib(phase.gib):.1f} GiB ({_causes(phase)})" for phase in too_big),
    )


def _where(facts: Facts) -> str:
    return facts.origin(f"{facts.run.stage}.micro_batch_tokens")


def _card(facts: Facts) -> str:
    gpu = facts.machine.smallest_gpu
    return gpu.name if gpu is not None else facts.machine.name


def _causes(phase: Phase) -> str:
    causes = sorted(phase.causes.items(), key=lambda item: -item[1])[:MOST_CAUSES]
    return ", ".join(f"{name} {size / 2**30:.1f}" for name, size in causes)


def _remedy(facts: Facts) -> str:
    others = facts.machine.num_gpus - 1
    alone = f" (this version trains on one card; the other {others} are not used)" if others > 0 else ""
    if facts.plan_remedies:
        return "one of: " + "; ".join(facts.plan_remedies) + alone
    return f"lower micro_batch_tokens or data.max_tokens, set model.method: lora, or take a larger card{alone}"


@pitfall(
    "memory",
    cost="launch",
    errors=[
        r"exits? with return code ?=? ?-9",
        r"exitcode *: *-9",
        r"(?:died with|Signals\.)\s*.{0,3}SIGKILL",
        r"oom[-_ ]?kill(?:er|ed)?",
        r"Out of memory: Killed process",
        r"Cannot allocate memory",
        r"DefaultCPUAllocator: (?:not enough|can't allocate) memory",
    ],
    sources=[
        "https://github.com/OptimalScale/LMFlow/issues/179",
        "https://github.com/OptimalScale/LMFlow/issues/279",
        "https://github.com/OptimalScale/LMFlow/issues/157",
        "https://github.com/Tencent/TencentPretrain/issues/28",
    ],
)
def host_oom_exit_9_deepspeed(facts: Facts) -> Iterable[Finding]:
    """The host's memory is too small, and the kernel kills the process without a message.

    Why: States offloaded to the host take 12 to 16 bytes per parameter, and on a machine without a GPU everything lies
    there. The kernel ends the largest process with signal 9; no traceback tells why.

    Fix: Train adapters or a smaller model, offload less, raise the container's limit, or take a machine with the memory
    that the finding names.

    主机内存不足，内核直接杀掉进程且不留信息。

    为何：卸载到主机的优化器状态每参数占 12 到 16 字节；没有显卡的机器上全部内容都在内存里。
    内核会以信号 9 结束占用最大的进程，没有任何
    回溯说明原因。

    办法：训练适配器或更小的模型，减少卸载，提高容器内存上限，或换用提示中所说内存的机器。
    """
    plan = facts.plan
    if plan is None or plan.host_capacity_gib is None or plan.needed_host_gib <= plan.host_capacity_gib:
        return
    causes = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.host.items())
    yield Finding(
        what=f"the run needs {plan.needed_host_gib:.1f} GiB of host memory, a new process can have "
        f"{plan.host_capacity_gib:.1f}: {causes}",
        where=facts.origin("model.path"),
        to_do=_host_remedy(facts, plan),
    )


def _host_remedy(facts: Facts, plan: MemoryPlan) -> str:
    if facts.plan_remedies:
        return "one of: " + "; ".join(facts.plan_remedies)
    if not facts.machine.gpus:
        return "take a smaller model, set model.method: lora, lower data.max_tokens, or use a machine with a GPU"
    return "raise the memory limit of the container, or stop other programs"


@pitfall(
    "memory",
    cost="hours",
    kind="construction",
    because="held-out rows are put into passes by the same budget as training rows, whatever the stage",
    proof=["tests/doctor/test_memory_constructions.py::test_held_out_passes_keep_the_budget_of_training"],
    errors=[
        r"out of memory.{0,400}(?:evaluation_loop|prediction_step|evaluate)",
        r"(?:evaluation_loop|prediction_step)[\s\S]{0,6000}out of memory",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/7781",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/65",
    ],
)
def eval_batch_larger_than_train() -> None:
    """The evaluation batch is larger than the training batch, and the first evaluation runs out of memory.

    Why: In other trainers the two sizes are separate settings, and the default for evaluation is eight rows whatever
    training uses. The run dies at its first evaluation, after hours.

    Fix: Nothing to do here: evaluation has no batch setting of its own. Elsewhere set the evaluation batch to the
    training batch.

    评估批次大于训练批次，第一次评估就显存溢出。

    为何：其他训练器里两者是独立的设置，评估默认每卡八行，与训练无关。运行几小时后在第一次评估时崩溃。

    办法：这里无需处理：评估没有单独的批次设置。在别处，把评估批次设成与训练一致。
    """


@pitfall(
    "memory",
    cost="run",
    kind="construction",
    because="the held-out loss holds one chunk of logits at a time and keeps only their sum",
    proof=[
        "tests/losses/test_tokens.py::test_held_out_losses_are_the_same_number_without_any_gradient_being_made",
        "tests/doctor/test_memory_constructions.py::test_an_evaluation_keeps_nothing_per_row",
    ],
    errors=[
        r"nested_concat[\s\S]{0,4000}(?:out of memory|Unable to allocate|Killed)",
        r"(?:out of memory|array).{0,200}nested_concat",
        r"Unable to allocate [\d.]+ [TG]iB for an array with shape",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/8476",
        "https://github.com/huggingface/transformers/issues/7232",
        "https://github.com/huggingface/transformers/issues/17089",
    ],
)
def eval_logits_accumulate_oom() -> None:
    """An evaluation collects the logits of all its rows and runs out of memory.

    Why: Rows times tokens times vocabulary in fp32 is terabytes for a usual held-out set. Trainers that hand logits to
    a metric function keep all of them until the evaluation ends.

    Fix: Nothing to do here. Elsewhere reduce logits to what the metric needs before they are collected.

    评估收集全部行的 logits，内存溢出。

    为何：行数乘 token 数乘词表，以 fp32 计常达数 TB。把 logits 交给指标函数的训练器会一直保留到评估结束。

    办法：这里无需处理。在别处，先把 logits 化简为指标所需再收集。
    """


@pitfall(
    "memory",
    cost="launch",
    kind="explained",
    because="zhibei trains in one process and copies weights to the GPU tensor by tensor",
    errors=[
        r"SIGKILL.{0,300}Loading checkpoint shards",
        r"Loading checkpoint shards.{0,300}(?:SIGKILL|exitcode *: *-9)",
    ],
    sources=[
        "https://github.com/huggingface/transformers/pull/25107",
        "https://github.com/pytorch/pytorch/issues/104755",
        "https://github.com/meta-llama/llama-cookbook/issues/182",
    ],
)
def fsdp_cpu_ram_n_copies() -> None:
    """Every process loads the whole model into host memory before it is divided.

    Why: Eight processes that each read a 40-billion model in fp32 need 1,280 GB. The kernel kills them during
    "Loading checkpoint shards", without a message.

    Fix: Let rank 0 read and the others start empty (cpu_ram_efficient_loading with sync_module_states), and load in
    16 bit.

    每个进程都先把整个模型读进主机内存再切分。

    为何：八个进程各以 fp32 读入 400 亿参数的模型需要 1280 GB，内核会在 "Loading checkpoint shards" 时直接杀掉它们。

    办法：只让 rank 0 读取，其余从空模型开始（cpu_ram_efficient_loading 配合 sync_module_states），并以 16 位加载。
    """


@pitfall(
    "memory",
    cost="launch",
    kind="explained",
    because="zhibei has no such switch: weights are never read by more than one process",
    errors=[r"cpu_ram_efficient_loading.{0,120}(?:out of memory|ignored|no effect)"],
    sources=[
        "https://github.com/modelscope/ms-swift/pull/9980",
        "https://github.com/modelscope/ms-swift/pull/9982",
        "https://github.com/huggingface/transformers/issues/43749",
    ],
)
def fsdp_ram_efficient_silently_off() -> None:
    """RAM-efficient loading is in the config and yet has no effect.

    Why: The switch is read from environment variables before the model loads. Under another launcher, or when a
    framework sets them later, every process reads the whole model anyway; transformers 5.0.0 allocated it in any case.

    Fix: Set ACCELERATE_USE_FSDP and FSDP_CPU_RAM_EFFICIENT_LOADING at launch; watch the host's memory while loading.

    配置里写了省内存加载，却没有生效。

    为何：开关通过环境变量在模型加载前读取。换了启动器，或框架设置得太晚，每个进程仍会读入整个模型；
    transformers 5.0.0 则总会分配。

    办法：在启动命令里设置 ACCELERATE_USE_FSDP 与 FSDP_CPU_RAM_EFFICIENT_LOADING，并在加载时观察主机内存。
    """
