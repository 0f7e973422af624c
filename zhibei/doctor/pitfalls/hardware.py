"""Pits of cards: kernels they lack, cards that are not there, cards that are ill. Knows few software versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from zhibei.doctor.arithmetic import cards_of, described, is_older
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.plan.machines import Gpu

# bitsandbytes took block size 64 on AMD's 64-wide cards with 0.49.2 (its pull request 1856).
BITSANDBYTES_WITH_WIDE_WAVES = (0, 49, 2)
FLASH_CAPABILITY = (8, 0)
FLASH_NAMES = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention")


@pitfall(
    "hardware",
    cost="launch",
    errors=[
        r"FlashAttention only supports? Ampere GPUs or newer",
        r"flash.?attention.{0,100}(?:compute capability|sm80|Ampere|Turing is not)",
    ],
    sources=[
        "https://github.com/Dao-AILab/flash-attention/issues/762",
        "https://github.com/hiyouga/LlamaFactory/issues/3508",
        "https://github.com/dhcode-cpp/X-R1/issues/45",
        "https://github.com/vllm-project/vllm/issues/8189",
        "https://github.com/oobabooga/textgen/issues/5985",
    ],
)
def flash_attn_pre_ampere(facts: Facts) -> Iterable[Finding]:
    """A flash-attention kernel is asked of a device that has none.

    Why: FlashAttention 2 and torch's variable-length kernel need compute capability 8.0. On V100, T4 and older they
    fail at the first forward pass, after the model and the data were loaded. A model's own code may switch them on
    by itself (use_flash_attn in config.json) as soon as the package is installed.

    Fix: Set model.attention: auto; exact kernels for older cards and for processors are then used. For a model with
    code of its own, write "use_flash_attn": false into its config.json.

    要求某个设备运行它没有的 flash attention 内核。

    为何：FlashAttention 2 与 torch 的变长内核需要计算能力 8.0。在 V100、T4 及更旧的卡上，
    会在模型与数据加载之后的第一次前向计算时失败。模型自带的代码也可能在装有该软件包时自行启用它
    （config.json 中的 use_flash_attn）。

    办法：设置 model.attention: auto，旧显卡与处理器会使用精确的内核。
    对自带代码的模型，在其 config.json 中写入 "use_flash_attn": false。
    """
    if facts.resolved is None:
        return
    run, cards = facts.run, cards_of(facts)
    old = [one for one in cards if is_older(one[1], FLASH_CAPABILITY)]
    if run.model.attention == "varlen" and (old or (not cards and run.device in ("auto", "cpu"))):
        yield Finding(
            what=f"model.attention: varlen, and {described(*old[0]) if old else 'the run computes on the processor'}",
            where=facts.origin("model.attention"),
            to_do="set model.attention: auto",
            changes={"model.attention": "auto"},
            is_safe=True,
        )
    config = facts.model.config if facts.model else {}
    asked = flash_of(config)
    if asked and old and run.model.trust_remote_code and "auto_map" in config:
        yield Finding(
            what=f"config.json of the base says {asked} and brings its own code, and {described(*old[0])}",
            where=f"{facts.model.path if facts.model else ''}/config.json",
            to_do='write "use_flash_attn": false into that config.json',
        )


def flash_of(config: Mapping[str, object]) -> str:
    """The entry of a config.json by which a model's own code switches flash attention on; "" without one."""
    for name, value in config.items():
        is_switch = re.fullmatch(r"_?use_(?:flash_?attn|flash_?attention)(?:_?2)?", name, re.IGNORECASE)
        if is_switch and value not in (False, None, "false"):
            return f"{name}: {value}"
        if name.endswith("attn_implementation") and value in FLASH_NAMES:
            return f"{name}: {value}"
    return ""


@pitfall(
    "hardware",
    cost="launch",
    errors=[
        r"The blockwise of 64 is not supported",
        r"(?:rocm|hip|amd).{0,120}(?:blocksize|block size|blockwise).{0,40}(?:64|not supported)",
    ],
    sources=[
        "https://github.com/unslothai/unsloth/pull/3279",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1856",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1748",
        "https://github.com/unslothai/unsloth/pull/4161",
        "https://github.com/lllyasviel/stable-diffusion-webui-forge/issues/2462",
    ],
)
def rocm_4bit_blocksize(facts: Facts) -> Iterable[Finding]:
    """4-bit weights in blocks of 64 on an AMD card whose bitsandbytes cannot read them.

    Why: AMD's MI cards compute in groups of 64 lanes. Until version 0.49.2 bitsandbytes had no kernel there for
    blocks of 64 values, which is the default and what every ready-made 4-bit checkpoint uses.

    Fix: pip install "bitsandbytes>=0.49.2", or train adapters on the 16-bit base (model.method: lora).

    AMD 显卡上的 bitsandbytes 无法读取块大小为 64 的 4 位权重。

    为何：AMD 的 MI 系列以 64 个线程为一组计算。在 0.49.2 之前，bitsandbytes 在这类卡上没有块大小为 64 的内核，
    而 64 是默认值，现成的 4 位检查点都用它。

    办法：pip install "bitsandbytes>=0.49.2"，或在 16 位基座上训练适配器（model.method: lora）。
    """
    installed = facts.environment.packages.get("bitsandbytes")
    if facts.resolved is None or installed is None or not needs_4bit(facts):
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    for number, gpu in cards_of(facts):
        if has_wide_waves(gpu) and numbers < BITSANDBYTES_WITH_WIDE_WAVES:
            yield Finding(
                what=f"a 4-bit base on {described(number, gpu)} with bitsandbytes {installed}",
                where=facts.origin("model.quantize"),
                to_do='pip install "bitsandbytes>=0.49.2", or set model.method: lora without model.quantize',
            )
            return


def needs_4bit(facts: Facts) -> bool:
    """Whether the base is held or stored in bitsandbytes' 4 bits."""
    run = facts.run
    is_stored = facts.model is not None and facts.model.quant_method == "bitsandbytes"
    return run.model.quantize == "nf4" or (run.model.method == "qlora" and run.model.quantize == "none") or is_stored


def has_wide_waves(gpu: Gpu) -> bool:
    """AMD's data-centre cards (gfx9: MI100 to MI300) have waves of 64 lanes; gaming cards (gfx10 and up) of 32."""
    return gpu.vendor == "amd" and gpu.capability[0] == 9


@pitfall(
    "hardware",
    cost="hours",
    errors=[
        r"\bXid\b.{0,40}\b(?:48|63|64|74|79|92|94|95|119|120)\b",
        r"uncorrectable ECC error",
        r"GPU has fallen off the bus|GPU is lost",
    ],
    sources=[
        "https://github.com/NVIDIA/nccl/issues/968",
        "https://github.com/NVIDIA/nccl/issues/1063",
        "https://github.com/marin-community/marin/issues/7344",
        "https://github.com/ray-project/ray/pull/64928",
        "https://github.com/vllm-project/vllm/issues/30112",
    ],
)
def unhealthy_gpu_stalls_collectives(facts: Facts) -> Iterable[Finding]:
    """A card reports hardware errors.

    Why: A card with memory errors, a broken link, or one that has fallen off the bus stops in the middle of a sum
    over ranks. All others wait for it at full load and low power until a time-out, and the log blames the network.

    Fix: Leave the card out (CUDA_VISIBLE_DEVICES), reset or restart the node, and have the card looked at if the
    error comes back. `zhibei doctor` computes and compares on every card.

    某张显卡报告了硬件错误。

    为何：显存出错、链路损坏或已从总线掉线的卡，会在跨进程求和的中途停住。其他卡满负荷低功耗地等它直到超时，
    而日志把原因归到网络。

    办法：用 CUDA_VISIBLE_DEVICES 排除这张卡，重置或重启该节点；若错误再次出现，请送检该卡。
    `zhibei doctor` 会在每张卡上计算并核对结果。
    """
    for fault in facts.environment.gpu_faults:
        yield Finding(
            what=fault,
            where=fault.partition(":")[0],
            to_do="leave this card out with CUDA_VISIBLE_DEVICES, or restart the node and see whether it comes back",
        )


@pitfall(
    "hardware",
    cost="launch",
    errors=[r"invalid device ordinal", r"No CUDA GPUs are available", r"Invalid device id"],
    sources=["https://github.com/huggingface/accelerate/issues/663"],
)
def device_that_is_not_there(facts: Facts) -> Iterable[Finding]:
    """The run names a device that this machine does not have.

    Why: A run file copied from another machine names cuda:3, or a card is hidden by CUDA_VISIBLE_DEVICES, which also
    renumbers the visible ones from 0.

    Fix: Set device: auto, or the number of a card that is there.

    运行文件指定了本机没有的设备。

    为何：从别的机器抄来的运行文件写着 cuda:3，或者某张卡被 CUDA_VISIBLE_DEVICES 隐藏了，
    而可见的卡会从 0 重新编号。

    办法：设置 device: auto，或写一张存在的卡的编号。
    """
    if facts.resolved is None or facts.machine.name == "unknown":
        return
    device, num_gpus = facts.run.device, len(facts.machine.gpus)
    if device in ("auto", "cpu") or (num_gpus and re.fullmatch(r"cuda(:0)?", device)):
        return
    named = re.fullmatch(r"cuda:(\d+)", device)
    if named and int(named[1]) < num_gpus:
        return
    there = f"cuda:0 to cuda:{num_gpus - 1}" if num_gpus > 1 else "cuda" if num_gpus else "no card, only cpu"
    hidden = None if facts.machine.is_described else facts.environment.variables.get("CUDA_VISIBLE_DEVICES")
    yield Finding(
        what=f"device: {device}, and {facts.machine.name} has {there}"
        + (f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""),
        where=facts.origin("device"),
        to_do="set device: auto",
        changes={"device": "auto"},
    )
