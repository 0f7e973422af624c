"""Pits of weights held or written in few bits. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall


def holds_base_in_4_bits(facts: Facts) -> bool:
    """Whether the frozen base is held as nf4."""
    model = facts.run.model
    return model.quantize == "nf4" or (model.method == "qlora" and model.quantize == "none")


def runs_on_cpu(facts: Facts) -> bool:
    return facts.run.device == "cpu" or (facts.run.device == "auto" and not facts.machine.gpus)


@pitfall(
    "quantization",
    cost="run",
    sources=["measured with bitsandbytes 0.50.2 on a CPU with AVX512-BF16"],
)
def bnb_nf4_cpu_repacks_weights_in_place(facts: Facts) -> Iterable[Finding]:
    """A 4-bit base on this CPU is repacked by the first evaluation and can then no longer be merged or saved.

    Why: On CPUs with AVX512-BF16 bitsandbytes reorders 4-bit weights in place when the model runs without gradients.
    Nothing undoes it: merging or dequantising afterwards gives garbage (relative error above 1), without an error.

    Fix: Merge into a freshly loaded unquantised base, or train an unquantised model (model.method: lora) on a CPU.

    在这种 CPU 上，4 位基座在第一次评估时被原地重排，之后无法再合并或保存。

    为何：在带 AVX512-BF16 的 CPU 上，模型不求梯度运行时 bitsandbytes 会原地重排 4 位权重，且不再还原；之后合并或反量
    化得到的是垃圾（相对误差大于 1），没有任何报错。

    办法：合并到重新加载的未量化基座上；或在 CPU 上训练未量化的模型（model.method: lora）。
    """
    if holds_base_in_4_bits(facts) and runs_on_cpu(facts) and "avx512_bf16" in facts.machine.cpu_flags:
        yield Finding(
            what=f"model.method: {facts.run.model.method} holds the base in nf4 on a CPU with avx512_bf16, where its "
            "weights are repacked in place",
            where=facts.origin("model.quantize" if facts.run.model.method != "qlora" else "model.method"),
            to_do="set model.method: lora and model.quantize: none, or use a GPU",
            changes={"model.method": "lora", "model.quantize": "none"},
        )


@pitfall("quantization", cost="launch")
def quantised_base_not_trained_here(facts: Facts) -> Iterable[Finding]:
    """Adapters on a quantised base are asked for, and this version does not train them.

    Why: The run file describes such runs, so that they can be checked and planned; training refuses them.

    Fix: Set model.method: lora and model.quantize: none, and see with `zhibei plan` whether that fits.

    要求在量化基座上训练适配器，而这个版本不支持训练。

    为何：运行文件可以描述这样的训练，以便检查与规划；训练时则会拒绝。

    办法：设 model.method: lora 与 model.quantize: none，并用 `zhibei plan` 看是否放得下。
    """
    model = facts.run.model
    if model.method == "qlora" or model.quantize != "none":
        key = "model.method" if model.method == "qlora" else "model.quantize"
        yield Finding(
            what=f"model.method: {model.method}, model.quantize: {model.quantize}: quantised bases are not trained yet",
            where=facts.origin(key),
            to_do="set model.method: lora and model.quantize: none",
            changes={"model.method": "lora", "model.quantize": "none"},
        )


@pitfall(
    "quantization",
    kind="construction",
    cost="launch",
    because="the whole model is put on the one device of the run; there is no device_map to set",
    proof=[
        "tests/doctor/test_constructions.py::test_the_whole_model_lies_on_the_device_of_the_run",
        "tests/doctor/test_constructions.py::test_options_of_other_trainers_are_refused_with_what_to_write",
    ],
    errors=[r"can't train a model .{0,60}\b(?:8|4)-bit\b.{0,60}(?:on a )?different device"],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/9",
        "https://github.com/artidoro/qlora/issues/137",
        "https://github.com/artidoro/qlora/issues/186",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/148",
        "https://github.com/yangjianxin1/Firefly/issues/270",
    ],
)
def kbit_device_map_vs_ddp() -> None:
    """A quantised model is spread by device_map while several processes train.

    Why: device_map="auto" or {"": 0} puts every process's model on the same cards; each rank has to load onto its own.

    Fix: Elsewhere device_map={"": LOCAL_RANK}. Here the device is that of the run.

    多进程训练时，量化模型却被 device_map 分散放置。

    为何：device_map="auto" 或 {"": 0} 会让每个进程的模型都落在同样的卡上，而每个进程必须加载到自己的卡。

    办法：在别处用 device_map={"": LOCAL_RANK}。在 zhibei 中即为该训练的设备。
    """


@pitfall(
    "quantization",
    kind="explained",
    cost="hours",
    because="zhibei has no calibrated quantisation that could fall back",
    errors=[
        r"(hessian|cholesky).{0,80}(fail|not positive|singular).{0,120}(round.to.nearest|RTN|fall)",
        r"fall(ing|s)? back to (RTN|round.to.nearest)",
    ],
    sources=[
        "https://github.com/keras-team/keras/pull/23512",
        "https://github.com/vllm-project/llm-compressor/issues/2952",
    ],
)
def ptq_silently_falls_back_to_rtn() -> None:
    """Calibrated quantisation ran, and the result is plain rounding.

    Why: The hooks that collect activations never fired, or every matrix could not be inverted, and the tool rounded to
    nearest instead. The model is written as usual and is worse than what was paid for.

    Fix: Count the modules that fell back (it must be none), and compare held-out perplexity with plain rounding.

    校准量化跑完了，结果却只是简单舍入。

    为何：收集激活的钩子从未触发，或每个矩阵都无法求逆，工具于是改为就近舍入。模型照常写出，质量却不如所付出的代价。

    办法：统计回退的模块数（应为零），并与简单舍入比较留出集困惑度。
    """


@pitfall(
    "quantization",
    kind="explained",
    cost="hours",
    because="zhibei does not write GGUF files in this version",
    errors=[r"requantizing from type \S+ is disabled", r"failed to quantize: requantizing"],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/8603",
        "https://github.com/ggml-org/llama.cpp/pull/1691",
        "https://github.com/ggml-org/llama.cpp/pull/1787",
        "https://github.com/ggml-org/llama.cpp/issues/3785",
    ],
)
def requantise_from_quantised_gguf() -> None:
    """A GGUF file that is already quantised is quantised again.

    Why: The converter was told to write q8_0, or only a downloaded quantised file is at hand. Rounding twice loses
    quality, so llama.cpp refuses; forced, it goes on and the perplexity rises.

    Fix: Keep a file in f16 or bf16 as the master, and make every quantised file from it.

    把已经量化过的 GGUF 再量化一次。

    为何：转换时写成了 q8_0，或手头只有下载来的量化文件。两次舍入会损失质量，llama.cpp 因此拒绝；强行继续则困惑度上升。

    办法：保留一份 f16 或 bf16 的母本，所有量化文件都从它生成。
    """
