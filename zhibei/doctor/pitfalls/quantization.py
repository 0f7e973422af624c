"""Pits of weights held or written in few bits. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

TESTS = "tests/model/test_quantized.py::"
NEEDS_CAPABILITY = (6, 0)


def is_packed(facts: Facts) -> bool:
    """Whether the run file asks for a frozen base in few bits."""
    return facts.run.model.method == "qlora" or facts.run.model.quantize != "none"


def stored_kind(facts: Facts) -> str:
    """int8, nf4 or fp4 when the base's weights are stored so by bitsandbytes, else ""."""
    if facts.model is None or facts.model.quant_method != "bitsandbytes":
        return ""
    entry = facts.model.config.get("quantization_config") or {}
    return "int8" if entry.get("load_in_8bit") else str(entry.get("bnb_4bit_quant_type", "fp4"))


def runs_on_cpu(facts: Facts) -> bool:
    return facts.run.device == "cpu" or (facts.run.device == "auto" and not facts.machine.gpus)


@pitfall(
    "quantization",
    kind="construction",
    cost="run",
    because="a packed layer of zhibei never changes its weights, and is unpacked by bitsandbytes' own reader only",
    proof=[f"{TESTS}test_evaluation_changes_no_weight_though_bitsandbytes_own_layer_does"],
    sources=["measured with bitsandbytes 0.50.2 on a CPU with AVX512-BF16"],
)
def bnb_nf4_cpu_repacks_weights_in_place() -> None:
    """A 4-bit base on a CPU is repacked by the first evaluation and can then no longer be merged or saved.

    Why: On CPUs with AVX512-BF16 bitsandbytes' layer reorders 4-bit weights in place when it runs without gradients.
    Nothing undoes it: merging or dequantising afterwards gives garbage (relative error above 1), without an error.

    Fix: Elsewhere set `support_avx512bf16_for_cpu = False` on every Linear4bit after loading, or merge into a freshly
    loaded 16-bit base.

    CPU 上的 4 位基座在第一次评估时被原地重排，之后无法再合并或保存。

    为何：在带 AVX512-BF16 的 CPU 上，bitsandbytes 的层在不求梯度运行时会原地重排 4 位权重，且不再还原；之后合并或反量
    化得到的是垃圾（相对误差大于 1），没有任何报错。

    办法：在别处，加载后把每个 Linear4bit 的 `support_avx512bf16_for_cpu` 设为 False，或合并到重新加载的 16 位基座。
    """


@pitfall(
    "quantization",
    kind="construction",
    cost="run",
    because="every matrix is unpacked as one long row, for which the scales are right",
    proof=[f"{TESTS}test_rows_that_are_no_whole_number_of_blocks_get_their_own_scales"],
    sources=["measured with bitsandbytes 0.50.2 on a CPU with AVX512"],
)
def bnb_4bit_cpu_takes_wrong_scales() -> None:
    """A 4-bit model computes nonsense on a CPU because its matrices' width is no multiple of 64.

    Why: On CPUs with AVX512 bitsandbytes counts the blocks of 64 values anew in each row when it unpacks, and not when
    it packs. Scales then belong to other values; the error is two to four times that of 4 bits, without a message.

    Fix: Elsewhere keep such layers in 16 bits, or unpack the matrix as one row and give it its shape afterwards.

    4 位模型在 CPU 上算出错误结果，因为其矩阵宽度不是 64 的倍数。

    为何：在带 AVX512 的 CPU 上，bitsandbytes 解包时每行都重新数 64 个值的块，打包时却不是。缩放因子于是错位，误差达到
    4 位本身的两到四倍，没有任何提示。

    办法：在别处让这些层保持 16 位，或把矩阵当作一整行解包，再恢复形状。
    """


@pitfall(
    "quantization",
    kind="construction",
    cost="run",
    because="every matrix is looked at while it is packed, and loading stops at the first that is not finite",
    proof=[f"{TESTS}test_a_matrix_with_nan_is_refused_though_quantising_hides_it"],
)
def quantising_hides_nan() -> None:
    """Weights with NaN or infinity are quantised, and nothing looks wrong any more.

    Why: A block's scale is the largest value in it, and comparing with NaN is always false. The broken value becomes
    an ordinary one; infinity makes its whole row or block useless.

    Fix: Check the 16-bit weights before they are quantised; download them again.

    含有 NaN 或无穷的权重被量化后，看不出任何异常。

    为何：块的缩放因子是块内最大值，而与 NaN 的比较总为假。坏值变成普通数值；无穷则毁掉整行或整块。

    办法：量化前检查 16 位权重；重新下载。
    """


@pitfall(
    "quantization",
    kind="construction",
    cost="hours",
    because="activations are not rounded: the product is made in the model's type, and no threshold is needed",
    proof=[f"{TESTS}test_gradients_of_adapters_equal_those_on_the_unpacked_base"],
    errors=[r"MatMul8bitLt: inputs will be cast from \S+ to float16"],
    sources=["https://arxiv.org/abs/2208.07339"],
)
def int8_outlier_threshold() -> None:
    """An int8 model loses quality, or is slow, for its outlier threshold.

    Why: LLM.int8 rounds activations to 8 bits too, all but those columns in which a value is above the threshold (6.0).
    Set higher, large activations are cut down; set lower, most columns take the slow way.

    Fix: Elsewhere leave it at 6.0. Here int8 holds the weights only.

    int8 模型因离群阈值设置不当而质量下降或变慢。

    为何：LLM.int8 也把激活值舍入到 8 位，只有数值超过阈值（6.0）的列除外。阈值过高会压坏大的激活值，过低则多数列走慢
    路径。

    办法：在别处保持 6.0。在 zhibei 中 int8 只用于存放权重。
    """


@pitfall("quantization", cost="launch")
def full_training_of_a_quantised_base(facts: Facts) -> Iterable[Finding]:
    """All weights are to be trained, and they are stored in 8 or 4 bits.

    Why: A step of the optimiser is far smaller than a step between two 8-bit values, and packed values have no
    gradient. Only adapters can learn on such a base.

    Fix: Set model.method: lora to train adapters on it, or take the 16-bit weights of the model.

    要训练全部权重，而权重以 8 位或 4 位存储。

    为何：优化器的一步远小于两个 8 位数值之间的间隔，打包的数值也没有梯度。在这样的基座上只能训练适配器。

    办法：设 model.method: lora 在其上训练适配器，或改用该模型的 16 位权重。
    """
    model = facts.model
    if model is not None and model.quant_method == "bitsandbytes" and facts.run.model.method == "full":
        yield Finding(
            what=f"model.method: full, and the weights of {model.path} are stored in {stored_kind(facts)}",
            where=facts.origin("model.method"),
            to_do="set model.method: lora, or name the 16-bit weights",
        )


@pitfall("quantization", cost="launch")
def base_stored_in_other_bits(facts: Facts) -> Iterable[Finding]:
    """The base is to be held in one kind of few bits and is stored in another.

    Why: Weights that were rounded once cannot be rounded to another grid without losing twice.

    Fix: Set model.quantize to what is stored, or start from the 16-bit weights.

    要求以一种低位格式持有基座，而它以另一种低位格式存储。

    为何：已经舍入过的权重再舍入到另一种网格，会损失两次。

    办法：把 model.quantize 设为存储的格式，或从 16 位权重开始。
    """
    stored, asked = stored_kind(facts), facts.run.model.quantize
    if stored and asked not in ("none", stored) and facts.model is not None:
        yield Finding(
            what=f"model.quantize: {asked}, and the weights of {facts.model.path} are stored as {stored}",
            where=facts.origin("model.quantize"),
            to_do=f"set model.quantize: {stored}" if stored != "fp4" else "name the 16-bit weights of this model",
        )


@pitfall("quantization", cost="launch")
def modules_to_save_in_few_bits(facts: Facts) -> Iterable[Finding]:
    """A layer that is held in few bits is to be trained in full beside the adapters.

    Why: `lora.modules_to_save` trains a copy of a module. The copy of a packed layer is packed too: it has no values
    that could learn, and PEFT says nothing.

    Fix: Leave it out (adapters on it still learn: lora.targets), or hold the base unquantised.

    要求在适配器之外全量训练一个以低位存放的层。

    为何：`lora.modules_to_save` 训练模块的副本。打包层的副本同样是打包的：没有可学习的数值，而 PEFT 不会提示。

    办法：去掉它（仍可用 lora.targets 在其上放适配器），或让基座不量化。
    """
    model = facts.model
    if model is None or facts.run.model.method == "full" or not (is_packed(facts) or stored_kind(facts)):
        return
    for wanted in facts.run.lora.modules_to_save:
        packed = [n for n in model.linear_names if n == wanted or n.endswith(f".{wanted}")]
        if packed and not wanted.endswith(("lm_head", "embed_out")):
            left = [name for name in facts.run.lora.modules_to_save if name != wanted]
            yield Finding(
                what=f"lora.modules_to_save: {wanted}, whose {len(packed)} layers are held in few bits",
                where=facts.origin("lora.modules_to_save"),
                to_do=f"take {wanted} out of lora.modules_to_save",
                changes={"lora.modules_to_save": left},
            )


@pitfall("quantization", cost="launch", sources=["https://huggingface.co/docs/bitsandbytes/main/en/installation"])
def few_bits_on_an_old_card(facts: Facts) -> Iterable[Finding]:
    """A base is to be held in few bits on a card that bitsandbytes has no kernels for.

    Why: Its CUDA kernels begin with compute capability 6.0 (Pascal).

    Fix: Use a newer card, or adapters on an unquantised base (model.quantize: none).

    在 bitsandbytes 没有内核的显卡上以低位持有基座。

    为何：它的 CUDA 内核从计算能力 6.0（Pascal）开始。

    办法：换较新的显卡，或在未量化的基座上训练适配器（model.quantize: none）。
    """
    if not (is_packed(facts) or stored_kind(facts)) or runs_on_cpu(facts):
        return
    for gpu in facts.machine.gpus:
        if gpu.vendor == "nvidia" and gpu.capability < NEEDS_CAPABILITY:
            yield Finding(
                what=f"a base in few bits on {gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}",
                where=facts.origin("model.quantize" if facts.run.model.method != "qlora" else "model.method"),
                to_do="use a card of compute capability 6.0 or newer, or set model.method: lora and quantize: none",
            )
            return


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
