"""Pits of memory at saving and with the longest batch, and what other programs' estimates leave out."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall


@pitfall(
    "memory",
    cost="run",
    kind="construction",
    because="each rank writes its own rows, tensor by tensor, through host memory; nothing is gathered on a GPU",
    proof=["tests/store/test_shards.py::test_saving_320_mib_takes_no_more_memory_than_a_few_tensors_of_8_mib"],
    errors=[
        r"Failed to clone\(\) tensor with name",
        r"out of memory.{0,400}(?:save_model|state_dict|save_pretrained)",
        r"(?:save_model|full_state_dict|_gather_state_dict).{0,400}out of memory",
    ],
    sources=[
        "https://github.com/tatsu-lab/stanford_alpaca/issues/65",
        "https://github.com/huggingface/transformers/issues/23386",
        "https://github.com/lm-sys/FastChat/issues/693",
        "https://github.com/haotian-liu/LLaVA/issues/177",
    ],
)
def fsdp_gpu_oom_at_save() -> None:
    """A save gathers the whole model on one GPU, which has no room left, and writes broken weights.

    Why: FSDP's default state dict collects all parameters in fp32 on the GPU. In torch 2.0 a failed copy is only a
    warning, so files of odd sizes are written after days of training.

    Fix: Nothing to do here. Elsewhere gather on the host by rank 0 only, or save in pieces, and treat the warning as
    fatal.

    保存时把整个模型聚集到一块已满的显卡上，写出损坏的权重。

    为何：FSDP 默认的状态字典会在显卡上以 fp32 收集全部参数。torch 2.0 里复制失败只是警告，
    于是训练数日后写出大小异常的文件。

    办法：这里无需处理。在别处，只由 rank 0 聚集到主机，或分片保存，并把该警告当作错误。
    """


@pitfall(
    "memory",
    cost="launch",
    kind="gate",
    proof=["tests/doctor/test_memory_constructions.py::test_a_model_with_a_tensor_missing_is_refused_when_it_loads"],
    errors=[
        r"sync_module_states.{0,80}(?:must|required|should|needs)",
        r"Some weights of .{0,80} were not initialized.{0,400}(?:RAM-efficient|ram_efficient)",
    ],
    sources=[
        "https://github.com/huggingface/accelerate/pull/2037",
        "https://github.com/huggingface/transformers/pull/25107",
    ],
)
def fsdp_ram_efficient_uninit_weights() -> None:
    """With RAM-efficient loading, ranks that read nothing start from random weights.

    Why: The other ranks hold empty tensors and wait for a broadcast. Where it is switched off, or a family makes
    buffers of its own, they train on whatever lies in memory, and the first loss is near ln(vocabulary).

    Fix: Switch both settings on together, or both off. Here loading refuses a model of which any tensor was not read.

    使用省内存加载时，不读取权重的进程从随机权重开始。

    为何：其他进程持有空张量，等待广播。若广播被关闭，或模型家族自建缓冲区，它们就用内存里的任意内容训练，
    首个损失接近 ln(词表大小)。

    办法：两个设置同时打开或同时关闭。这里加载时若有任何张量没有读入就会拒绝。
    """


@pitfall(
    "memory",
    cost="hours",
    kind="rehearsal",
    by="memory",
    sources=["https://github.com/meta-pytorch/torchtune/issues/2071"],
)
def oom_estimate_tool_optimistic() -> None:
    """An estimate promises that a run fits, and it does not.

    Why: Estimates leave out gathered layers, the peak while loading, logits, and what the allocator keeps. Ours counts
    these and was compared with measured runs, and the rehearsal measures the worst batch on the real card again.

    Fix: Trust the rehearsal where it differs, and report both figures.

    估算说能放下，实际放不下。

    为何：估算常漏掉聚集的层、加载峰值、logits 以及分配器的保留量。我们的计划包含这些并与实测对照，
    预演还会在真实显卡上再测最坏的批次。

    办法：两者不同时以预演为准，并报告两个数字。
    """


@pitfall(
    "memory",
    cost="hours",
    kind="rehearsal",
    by="memory",
    sources=[
        "https://github.com/huggingface/transformers/issues/11388",
        "https://github.com/hiyouga/LlamaFactory/issues/3668",
        "https://github.com/huggingface/trl/issues/1626",
        "https://github.com/k2-fsa/icefall/issues/910",
    ],
)
def oom_on_longest_batch_late() -> None:
    """The batch with the longest rows comes after hours, and only it does not fit.

    Why: Where a batch is a number of rows, its memory follows the longest one. Most batches are short; one in the
    middle of the epoch is not.

    Fix: Nothing to do here: a pass is a number of tokens, the plan counts the largest one, and the rehearsal runs the
    worst batch first. Elsewhere cap the length, or sort the longest rows to the front.

    最长的一批几小时后才出现，也只有它放不下。

    为何：以行数计的批次，显存由最长的一行决定。多数批次很短，轮次中间的某一批却很长。

    办法：这里无需处理：每次前向以 token 计，计划按最大的一次计算，预演先跑最坏的一批。在别处，限制长度，
    或把最长的行排到最前。
    """
