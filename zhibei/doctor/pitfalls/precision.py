"""Pits of bf16, fp16 and tf32: what a card cannot compute, and what overflows. Knows no card by name."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.arithmetic import BF16_CAPABILITY, cards_of, described, is_older, precision_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

# Families whose published weights were all trained in bf16, whatever dtype a copy is stored in (their papers or model
# cards say so). LLaMA is told apart by its context: the first LLaMA has 2,048 positions and was trained in fp16 mixed
# precision; Llama 2 and later have 4,096 or more and were trained in bf16.
BF16_FAMILIES = (
    "gemma", "qwen", "mistral", "mixtral", "ministral", "phi3", "phimoe", "olmo", "deepseek", "cohere", "glm4",
    "granite", "smollm", "starcoder2", "falcon", "gpt_oss", "llama4", "internlm", "minicpm", "exaone", "nemotron",
    "stablelm", "seed_oss", "hunyuan", "ernie4", "minimax", "apertus", "dbrx", "jamba", "mpt", "arcee",
)  # fmt: skip
FIRST_LLAMA_POSITIONS = 2048
UNKNOWN = "unknown"  # the name of a machine that could not be read


@pitfall(
    "precision",
    cost="launch",
    errors=[
        r"setup doesn'?t support bf16",
        r"bf16.{0,60}(?:requires? (?:an? )?ampere|(?:is )?not supported|isn'?t supported|no bf16)",
        r"bfloat16 is (?:only supported|not supported)",
        r"Bfloat16 is only supported on GPUs with compute capability",
    ],
    sources=[
        "https://github.com/tatsu-lab/stanford_alpaca/issues/133",
        "https://github.com/lm-sys/FastChat/issues/399",
        "https://github.com/OptimalScale/LMFlow/issues/88",
        "https://github.com/OptimalScale/LMFlow/issues/251",
        "https://github.com/databrickslabs/dolly/issues/11",
    ],
)
def bf16_on_pre_ampere(facts: Facts) -> Iterable[Finding]:
    """bf16 is asked of a card that has no bf16 units.

    Why: Matrix units learned bf16 with compute capability 8.0 (Ampere, 2020). V100, T4, P100, RTX 20 and GTX cards
    cannot, and a recipe copied from an A100 fails on them only after the model is loaded, or computes in slow
    emulation. One old card among new ones is enough.

    Fix: Set model.precision: fp16, which keeps fp32 master weights and scales the loss, or fp32 for a small model.
    If the base was trained in bf16 its activations may not fit into fp16; `zhibei check` then says so too.

    在没有 bf16 单元的显卡上要求 bf16。

    为何：矩阵单元从计算能力 8.0（Ampere，2020 年）起才支持 bf16。V100、T4、P100、RTX 20 与 GTX 系列都不行；
    从 A100 抄来的配置要么在模型加载之后才报错，要么以很慢的仿真方式计算。新卡里混入一张旧卡就足以触发。

    办法：设置 model.precision: fp16（保留 fp32 主权重并缩放损失）；小模型可用 fp32。
    如果基座是用 bf16 训练的，其激活值可能超出 fp16 的范围，`zhibei check` 会另行提示。
    """
    if facts.resolved is None or facts.run.model.precision != "bf16":
        return
    for number, gpu in cards_of(facts):
        if is_older(gpu, BF16_CAPABILITY):
            yield Finding(
                what=f"model.precision: bf16, and {described(number, gpu)} has no bf16 units",
                where=facts.origin("model.precision"),
                to_do="set model.precision: fp16 (with fp32 master weights and loss scaling), or fp32",
                changes={"model.precision": "fp16"},
            )
            return


@pitfall(
    "precision",
    cost="launch",
    errors=[r"not implemented for 'Half'", r"fp16 .{0,60}(?:requires|needs|only) .{0,30}(?:cuda|gpu)\b"],
    sources=["https://github.com/lm-sys/FastChat/issues/399"],
)
def fp16_on_cpu(facts: Facts) -> Iterable[Finding]:
    """fp16 is asked of a run that has no card to compute it.

    Why: A processor multiplies halves by converting each one, and some operations are missing. Other programs accept
    the setting and compute in fp32 in silence, so that what was measured is not what was asked for.

    Fix: Set model.precision: auto (fp32 on a processor), or bf16, which processors with AVX512-BF16 or AMX do well.

    在没有显卡的机器上要求 fp16。

    为何：处理器计算半精度时要逐个转换，有些算子根本没有。其他程序会接受这一设置却悄悄用 fp32 计算，
    于是测得的并不是所要求的。

    办法：设置 model.precision: auto（处理器上为 fp32）；带 AVX512-BF16 或 AMX 的处理器也可用 bf16。
    """
    if facts.resolved is None or facts.run.model.precision != "fp16" or facts.machine.name == UNKNOWN:
        return
    if cards_of(facts) or facts.run.device not in ("auto", "cpu"):
        return
    yield Finding(
        what=f"model.precision: fp16, and the run computes on the processor (device: {facts.run.device})",
        where=facts.origin("model.precision"),
        to_do="set model.precision: auto, which is fp32 here",
        changes={"model.precision": "auto"},
    )


@pitfall(
    "precision",
    cost="run",
    errors=[r"fp16.{0,80}(?:overflow|nan).{0,80}(?:bf16|bfloat16)"],
    sources=[
        "https://github.com/huggingface/transformers/issues/25065",
        "https://github.com/arielnlee/Platypus/issues/14",
        "https://github.com/huggingface/trl/issues/1173",
        "https://github.com/meta-llama/llama-cookbook/issues/146",
        "https://github.com/LIN-SHANG/InstructERC/issues/6",
    ],
)
def fp16_on_bf16_pretrained_nan(facts: Facts) -> Iterable[Finding]:
    """A base that was trained in bf16 will compute in fp16.

    Why: bf16 reaches to 3e38, fp16 only to 65,504. Models trained in bf16 (Llama 2 and later, Qwen, Gemma, Mistral)
    have activations beyond that in late layers; in fp16 they become infinite, and the loss turns into NaN, sometimes
    only after thousands of steps. On cards without bf16 units, precision: auto means fp16.

    Fix: Compute in bf16 on a card that has it. On V100 and T4 choose fp32 if it fits, or a base trained in fp16 (the
    first LLaMA). If you try fp16 anyway, name this finding in `accept`; the watchdogs stop at the first NaN.

    用 bf16 训练出的基座将以 fp16 计算。

    为何：bf16 的范围到 3e38，fp16 只到 65504。用 bf16 训练的模型（Llama 2 及以后、Qwen、Gemma、Mistral）
    在靠后的层里激活值会超出这一范围，在 fp16 下变为无穷大，损失变成 NaN，有时几千步之后才出现。
    在没有 bf16 单元的显卡上，precision: auto 就是 fp16。

    办法：在支持 bf16 的显卡上用 bf16。V100 与 T4 上若放得下就用 fp32，或选用以 fp16 训练的基座（初代 LLaMA）。
    若仍要尝试 fp16，请在 `accept` 中写上这一条；一旦出现 NaN，看门狗会停下。
    """
    if facts.resolved is None or facts.model is None or precision_of(facts) != "fp16" or not cards_of(facts):
        return
    if not (why := trained_in_bf16(facts)):
        return
    asked = facts.run.model.precision
    cards = cards_of(facts)
    can_bf16 = not any(is_older(gpu, BF16_CAPABILITY) for _, gpu in cards)
    chosen = "fp16" if asked == "fp16" else f"auto, which is fp16 on {described(*cards[0])}"
    yield Finding(
        what=f"model.precision: {chosen}, and {why}",
        where=facts.origin("model.precision"),
        to_do="set model.precision: bf16"
        if can_bf16
        else "set model.precision: fp32 if it fits (zhibei plan), use a card with bf16, or a base trained in fp16",
        level="warning",
        changes={"model.precision": "bf16"} if can_bf16 else {},
    )


def trained_in_bf16(facts: Facts) -> str:
    """Why a base counts as trained in bf16; "" when it does not."""
    assert facts.model is not None
    config = facts.model.config
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    for name in ("dtype", "torch_dtype"):
        if str(config.get(name) or inner.get(name) or "").removeprefix("torch.") == "bfloat16":
            return f"config.json of the base says {name}: bfloat16"
    if facts.model.dtype == "bfloat16":
        return "the weights of the base are stored in bfloat16"
    family = str(config.get("model_type", ""))
    if family.startswith(BF16_FAMILIES):
        return f"the published models of family {family} were trained in bf16, whatever dtype this copy has"
    positions = config.get("max_position_embeddings")
    is_stretched = bool(config.get("rope_scaling"))  # Vicuna 16k: a longer context on an older base
    if family == "llama" and isinstance(positions, int) and positions > FIRST_LLAMA_POSITIONS and not is_stretched:
        return f"a llama with max_position_embeddings {positions} descends from Llama 2 or later, trained in bf16"
    return ""


@pitfall(
    "precision",
    cost="launch",
    errors=[
        r"FlashAttention only supports? fp16 and bf16",
        r"flash.?attention.{0,40}only support.{0,40}(?:fp16|bf16|float16|half)",
    ],
    sources=[
        "https://github.com/unslothai/unsloth/issues/827",
        "https://github.com/unslothai/unsloth/issues/933",
        "https://github.com/huggingface/transformers/issues/26066",
        "https://github.com/Dao-AILab/flash-attention/issues/398",
        "https://github.com/yangjianxin1/Firefly/issues/259",
    ],
)
def flash_attn_needs_half(facts: Facts) -> Iterable[Finding]:
    """A flash-attention kernel is asked to compute in fp32.

    Why: The fused kernels exist for fp16 and bf16 only. With fp32 they fail at the first forward pass, after the
    model and the data were loaded.

    Fix: Set model.attention: auto, which takes an exact kernel for fp32, or model.precision: bf16.

    要求 flash attention 内核以 fp32 计算。

    为何：这类融合内核只支持 fp16 与 bf16。用 fp32 时会在第一次前向计算时失败，而那时模型与数据都已加载。

    办法：设置 model.attention: auto（fp32 时会选用精确的内核），或 model.precision: bf16。
    """
    if facts.resolved is None or facts.run.model.attention != "varlen" or not cards_of(facts):
        return
    if precision_of(facts) == "fp32":
        yield Finding(
            what="model.attention: varlen is a flash-attention kernel, and model.precision is fp32",
            where=facts.origin("model.attention"),
            to_do="set model.attention: auto, or model.precision: bf16",
            changes={"model.attention": "auto"},
            is_safe=True,
        )


@pitfall(
    "precision",
    cost="run",
    kind="watchdog",
    by="skipped_steps",
    errors=[r"Attempted loss scale: 1(?:\.0)?, reducing to 1(?:\.0)?\b"],
    sources=[
        "https://github.com/deepspeedai/DeepSpeed/issues/697",
        "https://github.com/deepspeedai/DeepSpeed/issues/931",
    ],
)
def ds_fp16_all_steps_skipped() -> None:
    """Every optimiser step is skipped while losses go on being printed.

    Why: With fp16 a step whose gradients overflow is left out. When all of them overflow, speed and loss look normal,
    the learning-rate schedule goes on, and nothing is learned.

    Fix: The watchdog counts skipped steps and stops. Use bf16 or fp32, a lower learning rate, or look for the rows
    that it names.

    每个优化步都被跳过，而损失照常打印。

    为何：在 fp16 下，梯度溢出的步会被略过。若每一步都溢出，速度与损失看上去正常，学习率照常变化，却什么也没学到。

    办法：看门狗会统计被跳过的步并停下。改用 bf16 或 fp32，降低学习率，或检查它指出的数据行。
    """


@pitfall(
    "precision",
    cost="hours",
    kind="watchdog",
    by="skipped_steps",
    errors=[r"loss scale already at minimum"],
    sources=[
        "https://github.com/ymcui/Chinese-LLaMA-Alpaca/issues/534",
        "https://github.com/CarperAI/trlx/issues/342",
        "https://github.com/LIN-SHANG/InstructERC/issues/6",
    ],
)
def ds_loss_scale_collapse() -> None:
    """The loss scale falls to its minimum, and the run ends.

    Why: Gradients are infinite or NaN at every step, through a broken row, too high a rate or a base that does not
    fit into fp16. The scale is halved each time; at its minimum, halving no longer helps.

    Fix: Resume from the last checkpoint with bf16 or a lower learning rate, after looking at the rows of the skipped
    steps (`zhibei data show`).

    损失缩放系数降到最小值，训练终止。

    为何：由于坏数据、过高的学习率，或不适合 fp16 的基座，每一步的梯度都是无穷大或 NaN。
    系数每次减半，降到最小值后再减半也无济于事。

    办法：先查看被跳过的步所用的数据行（`zhibei data show`），再用 bf16 或更低的学习率从最近的检查点恢复。
    """


MASTERS = "tests/train/test_masters.py"


@pitfall(
    "precision",
    cost="launch",
    kind="construction",
    because="Master weights are made from the loaded parameters, after loading; a step at rate 0 changes no bit.",
    proof=[f"{MASTERS}::test_a_step_at_rate_zero_changes_no_weight"],
    sources=["https://github.com/EleutherAI/gpt-neox/issues/947"],
)
def fp16_bf16_llama_neox_wrong_weights_map() -> None:
    """The first update replaces the loaded weights by others.

    Why: When fp32 master copies are made before the weights are loaded, or are mapped to the wrong parameters, the
    first update writes them over the model: the loss is right at step 1 and that of a random model at step 2.

    Fix: Make master weights after loading. zhibei does; a step with learning rate 0 leaves every weight as it was.

    第一次更新用别的数值覆盖了已加载的权重。

    为何：如果 fp32 主权重在加载权重之前就已建立，或对应到了错误的参数，第一次更新会把它们写进模型：
    第 1 步损失正常，第 2 步就与随机模型一样。

    办法：在加载之后再建立主权重。zhibei 正是如此；学习率为 0 的一步不会改变任何权重。
    """


@pitfall(
    "precision",
    cost="launch",
    kind="construction",
    because="Parameters may be fp16: gradients are unscaled in fp32 and go to fp32 masters; no GradScaler is used.",
    proof=[f"{MASTERS}::test_fp16_weights_learn_through_fp32_masters"],
    errors=[r"Attempting to unscale FP16 gradients"],
    sources=[
        "https://github.com/Facico/Chinese-Vicuna/issues/168",
        "https://github.com/haotian-liu/LLaVA/issues/363",
        "https://github.com/mst272/LLM-Dojo/issues/11",
        "https://github.com/oobabooga/textgen/issues/3240",
        "https://github.com/OpenGVLab/Ask-Anything/issues/200",
    ],
)
def fp16_trainable_params_gradscaler() -> None:
    """Trainable weights are fp16 themselves, and torch's GradScaler refuses their gradients.

    Why: The scaler expects fp32 weights whose copies compute in fp16. A model or adapter loaded with
    torch_dtype=float16 has fp16 weights, and the first step fails.

    Fix: In other programs load the trained weights in fp32 (peft: autocast_adapter_dtype=True) and leave only the
    frozen base in fp16, or use bf16. zhibei keeps fp32 masters and scales the loss itself.

    可训练的权重本身就是 fp16，torch 的 GradScaler 拒绝处理其梯度。

    为何：GradScaler 要求权重为 fp32，计算时才转为 fp16。以 torch_dtype=float16 加载的模型或适配器，
    其权重就是 fp16，第一步便失败。

    办法：在其他程序中以 fp32 加载要训练的权重（peft：autocast_adapter_dtype=True），只让冻结的基座用 fp16，
    或改用 bf16。zhibei 自己保留 fp32 主权重并缩放损失。
    """


@pitfall(
    "precision",
    cost="hours",
    kind="construction",
    because="Every optimiser updates fp32 masters, whatever dtype the model computes in.",
    proof=[
        f"{MASTERS}::test_fp16_weights_learn_through_fp32_masters",
        f"{MASTERS}::test_updates_below_the_resolution_of_halves_are_not_lost",
    ],
    sources=["https://github.com/huggingface/transformers/issues/27212"],
)
def pure_fp16_no_master_weights_nan() -> None:
    """Weights, gradients and optimiser states are all fp16.

    Why: Adam's epsilon of 1e-8 is zero in fp16, squares of gradients vanish or overflow, and updates smaller than a
    thousandth of a weight are rounded away: NaN after a few steps, or no learning.

    Fix: Keep fp32 master weights and optimiser states. zhibei always does.

    权重、梯度与优化器状态全是 fp16。

    为何：Adam 的 1e-8 在 fp16 中就是零，梯度的平方会下溢或溢出，小于权重千分之一的更新会被舍掉：
    几步之后出现 NaN，或根本学不到东西。

    办法：保留 fp32 的主权重与优化器状态。zhibei 始终如此。
    """
