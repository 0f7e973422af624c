"""Forms of the finished model that this run asks for and that its base does not have. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.config.hand_over import parts_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall


def forms(facts: Facts, kind: str = "") -> list[str]:
    """What hand_over asks for, of one kind or of all."""
    if facts.resolved is None:
        return []
    return [form for form in facts.run.hand_over if kind in ("", parts_of(form)[0])]


def without(facts: Facts, refused: list[str]) -> dict[str, list[str]]:
    """The run file without the forms that cannot be made."""
    return {"hand_over": [form for form in facts.run.hand_over if form not in refused]}


@pitfall(
    "merge_export",
    cost="hours",
    sources=[
        "https://github.com/epfLLM/Megatron-LLM/pull/53",
        "https://github.com/meta-llama/llama-cookbook/pull/319",
    ],
)
def meta_form_impossible(facts: Facts) -> Iterable[Finding]:
    """Meta's files are asked for, and this model has no such form.

    Why: consolidated.*.pth and params.json describe the LLaMA of Meta's own code: no biases, its activation, its rotary
    positions, and sizes that the number of files divides. A vocabulary of 32,001 (one padding token added) does not
    go into two files. Usually this is found when the training is over.

    Fix: Ask for one file (meta), or for hf or gguf. Every program but Meta's own reads those.

    要求导出 Meta 格式的文件，而这个模型没有这种形式。

    为何：consolidated.*.pth 与 params.json 描述的是 Meta 代码中的 LLaMA：没有偏置，用它的激活和旋转位置，各尺寸能被文件
    数整除。词表为 32,001（加了一个填充词元）就分不成两个文件。通常要到训练结束才发现。

    办法：改为一个文件（meta），或改要 hf、gguf；除 Meta 自己的程序外，其他程序都读这些。
    """
    asked, model = forms(facts, "meta"), facts.model
    if not asked or model is None or not model.config:
        return
    from zhibei.export.meta_form import refusal

    config = dict(model.config)
    if facts.run.model.rope_scaling_factor is not None:
        config["rope_scaling"] = {"rope_type": "linear", "factor": facts.run.model.rope_scaling_factor}
        config.pop("rope_parameters", None)
    for form in asked:
        try:
            why = refusal(config, int(parts_of(form)[1] or 1))
        except (KeyError, TypeError, ValueError):
            return  # a config without its sizes is refused elsewhere
        if why:
            yield Finding(
                what=f"hand_over asks for {form}, and {model.path} has no such form: {why}",
                where=facts.origin("hand_over"),
                to_do="ask for meta (one file)"
                if form != "meta" and not refusal(config)
                else "take it out of hand_over; hf and gguf are read by every other program",
                changes=without(facts, [form]),
            )


@pitfall(
    "merge_export",
    cost="hours",
    sources=[
        "https://github.com/huggingface/peft/issues/2184",
        "https://github.com/huggingface/peft/pull/1626",
        "https://github.com/huggingface/peft/issues/1043",
    ],
)
def hand_over_cannot_merge(facts: Facts) -> Iterable[Finding]:
    """A whole model is asked for at the end, and the adapters of this run can never be merged.

    Why: Every form of hand_over is whole weights: base plus adapter, in 16 or 32 bits. A base that is stored in 4 or 8
    bits has no such weights to add to, and an adapter that took its share out of the base (PiSSA, OLoRA, LoftQ) or that
    is no product of two matrices is not base plus product.

    Fix: Name the 16-bit weights of the same model (model.path; `method: qlora` packs them while it loads), or take
    hand_over out and use base and adapter beside one another.

    最后要一个完整模型，而这次训练的适配器永远无法合并。

    为何：hand_over 的每种形式都是完整权重：基座加适配器，16 或 32 位。以 4 或 8 位存储的基座没有可以相加的权重；从基座
    里取走一部分的适配器（PiSSA、OLoRA、LoftQ），或不是两个矩阵之积的，也不是“基座加乘积”。

    办法：把 model.path 设为同一模型的 16 位权重（`method: qlora` 加载时才压缩），或去掉 hand_over，让基座与适配器并用。
    """
    asked, model = forms(facts), facts.model
    if not asked or model is None or facts.run.model.method == "full":
        return
    if model.quant_method:
        yield Finding(
            what=f"hand_over asks for {', '.join(asked)}, and {model.path} is stored quantised ({model.quant_method}): "
            "adapters on it cannot be merged",
            where=f"{model.folder or model.path}/config.json, quantization_config",
            to_do="set model.path to the 16-bit weights of this model, or remove hand_over",
        )
    refusal = facts.hand_over.adapter if facts.hand_over is not None else None
    if refusal is not None:
        yield Finding(
            what=f"hand_over asks for {', '.join(asked)}, and the adapter that is continued cannot be merged: "
            f"{refusal.what}",
            where=refusal.where or facts.origin("lora.adapter"),
            to_do="begin a new adapter, or remove hand_over",
        )
