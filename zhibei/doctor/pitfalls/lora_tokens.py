"""Pits of adapters and tokens they cannot learn, and of adapters that were not saved. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.lora import UNTRAINED_NORM_SHARE, trains_embeddings


def untrained_tokens(facts: Facts) -> dict[str, tuple[int, float]]:
    """Control strings of the template whose embedding row was never trained: {text: (id, share of the median norm)}."""
    model, template = facts.model, facts.template
    if model is None or template is None or not model.median_row_norm:
        return {}
    pieces = dict(template.special_pieces)
    if template.terminator and len(template.terminator_ids) == 1:
        pieces.setdefault(template.terminator.strip(), template.terminator_ids)
    return {
        text: (ids[0], model.row_norms[ids[0]] / model.median_row_norm)
        for text, ids in pieces.items()
        if len(ids) == 1
        and ids[0] in model.row_norms
        and model.row_norms[ids[0]] < UNTRAINED_NORM_SHARE * model.median_row_norm
    }


@pitfall(
    "lora",
    cost="run",
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/7943",
        "https://github.com/unslothai/unsloth/issues/416",
    ],
)
def lora_cannot_learn_new_eot_on_base(facts: Facts) -> Iterable[Finding]:
    """The template ends turns with a token that the base model never learned, and adapters cannot teach it.

    Why: Base models carry reserved rows for <|im_end|> or <|eot_id|> that no training ever touched. Adapters on
    attention and MLP leave embedding and head as they are, so the model cannot tell that token from the other
    reserved ones and never stops. Full training of the same data works, which hides the reason.

    Fix: Train embeddings and head too (lora.modules_to_save: [embed_tokens, lm_head]; where both are one tensor,
    model.method: full), use the instruct model, or a template that ends turns with the EOS token.

    模板用一个基座模型从未学过的词元结束一轮，而适配器教不会它。

    为何：基座模型为 <|im_end|>、<|eot_id|> 等预留了行，但从未训练过。注意力与 MLP 上的适配器不改动词嵌入和输出层，模
    型因此分不清它与其他预留词元，也就停不下来。同样的数据全量训练却没有问题，原因因此更难发现。

    办法：同时训练词嵌入与输出层（lora.modules_to_save: [embed_tokens, lm_head]；两者共用一个张量时用
    model.method: full），改用指令模型，或使用以 EOS 结束每轮的模板。
    """
    if trains_embeddings(facts):
        return
    found, changes = untrained_tokens(facts), _trains_embeddings_too(facts)
    if found:
        shown = ", ".join(f"{text} (id {number}: {share:.0%})" for text, (number, share) in sorted(found.items())[:4])
        yield Finding(
            what=f"template {facts.template.name if facts.template else ''} uses tokens whose embedding was never "
            f"trained: {shown} of the median row's length; adapters do not change embeddings",
            where=facts.origin("data.template"),
            to_do=f"set {_as_words(changes)}, use the instruct model, or a template whose turns end with the EOS token "
            f"(alpaca, vicuna_v1.1){_why_in_full(facts)}",
            changes=changes,
        )


def _trains_embeddings_too(facts: Facts) -> dict[str, Any]:
    """The change with which embeddings learn. Where they and the head are one tensor, copies of it would learn apart
    (tied-embedding-modules-to-save-diverge), so only full training is left."""
    if facts.model is not None and facts.model.is_tied:
        return {"model.method": "full"}
    return {"lora.modules_to_save": _embedding_modules(facts)}


def _as_words(changes: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}: [{', '.join(value)}]" if isinstance(value, list) else f"{key}: {value}"
        for key, value in changes.items()
    )


def _why_in_full(facts: Facts) -> str:
    is_tied = facts.model is not None and facts.model.is_tied
    return "; embeddings and head of this model are one tensor, so lora.modules_to_save cannot train them" * is_tied


def _embedding_modules(facts: Facts) -> list[str]:
    names = facts.model.module_names if facts.model is not None else ()
    ends = {name.rsplit(".", 1)[-1] for name in names}
    embedding = next((name for name in ("embed_tokens", "wte", "word_embeddings", "embed_in") if name in ends), None)
    head = next((name for name in ("lm_head", "embed_out", "output") if name in ends), None)
    return [name for name in (embedding or "embed_tokens", head) if name]


@pitfall(
    "lora",
    cost="run",
    sources=["https://github.com/huggingface/peft/issues/1173", "https://github.com/arcee-ai/mergekit/issues/328"],
)
def added_tokens_not_trained_qlora(facts: Facts) -> Iterable[Finding]:
    """Tokens were added to the vocabulary, and adapters leave their embeddings as they are.

    Why: A larger tokenizer needs new rows in the embedding and the head. Adapters on linear layers neither train nor
    save them: the rows stay as they were made, the text in the new tokens is noise to the model, and the adapter folder
    does not hold them.

    Fix: lora.modules_to_save: [embed_tokens, lm_head], or method full; only full where both are one tensor.

    词表加了新词元，而适配器不训练它们的词嵌入。

    为何：更大的分词器要求词嵌入与输出层有新的行。线性层上的适配器既不训练也不保存这些行：它们停留在初始值，含新词元的
    文本对模型只是噪声，适配器文件夹里也没有它们。

    办法：设 lora.modules_to_save: [embed_tokens, lm_head]，或用 method full；两者共用一个张量时只能用 full。
    """
    tokenizer, model, rows = facts.tokenizer, facts.model, facts.rows
    if tokenizer is None or model is None or rows is None or trains_embeddings(facts):
        return
    own = tokenizer.models_own_ids
    if facts.run.model.tokenizer is None or own is None or rows.highest_id < own:
        return
    changes = _trains_embeddings_too(facts)
    yield Finding(
        what=f"model.tokenizer: {facts.run.model.tokenizer} has {tokenizer.num_ids - own:,} tokens more than the "
        f"model's own ({own:,}), the rows use them (up to id {rows.highest_id}), and adapters do not train embeddings",
        where=facts.origin("model.tokenizer"),
        to_do=f"set {_as_words(changes)}{_why_in_full(facts) or ', or model.method: full'}",
        changes=changes,
    )


@pitfall(
    "lora",
    kind="rehearsal",
    by="reload",
    cost="run",
    errors=[r"adapter_model\.(?:bin|safetensors).{0,40}\b443\b|\b443\b.{0,60}adapter_model\.(?:bin|safetensors)"],
    sources=[
        "https://github.com/tloen/alpaca-lora/issues/293",
        "https://github.com/tloen/alpaca-lora/pull/533",
        "https://github.com/PhoebusSi/Alpaca-CoT/issues/111",
        "https://github.com/ymcui/Chinese-LLaMA-Alpaca/issues/711",
        "https://github.com/AILab-CVC/GPT4Tools/issues/14",
        "https://github.com/aim-uofa/LoRAPrune/issues/4",
    ],
)
def adapter_443_bytes_old_state_dict_patch() -> None:
    """The saved adapter is empty (443 bytes), although training ended normally.

    Why: Old scripts replace model.state_dict by one that gives adapter weights only; newer PEFT filters once more,
    finds no name it knows, and writes an empty file.

    Fix: Remove the replacement and save with PEFT alone. If a checkpoint kept pytorch_model.bin, its lora_ entries
    can be taken from there. Here every written adapter is read back and compared tensor by tensor, first in the
    rehearsal.

    保存的适配器是空的（443 字节），训练却正常结束。

    为何：旧脚本把 model.state_dict 换成只给适配器权重的版本；新版 PEFT 再过滤一次，认不出任何名字，于是写出空文件。

    办法：去掉这个替换，只用 PEFT 保存。若检查点里还有 pytorch_model.bin，可从中取出 lora_ 开头的权重。在 zhibei 中，
    写出的适配器都会读回并逐张量比较，彩排时就会进行第一次。
    """


@pitfall(
    "lora",
    kind="rehearsal",
    by="adapters",
    cost="run",
    sources=["https://github.com/axolotl-ai-cloud/axolotl/issues/3772"],
)
def fsdp2_lora_saved_one_shard() -> None:
    """The saved adapter holds one card's share only; the other rows of each matrix are zero.

    Why: A layer's state was taken as it lies on one rank instead of gathered from all, or gradients reached only one
    rank. With eight cards seven eighths of lora_B are zero, and the evaluation is of a crippled adapter.

    Fix: Gather before saving. The rehearsal and `zhibei verify` look for adapter matrices with rows that are zero.

    保存的适配器只有一张卡上的部分，其余各行为零。

    为何：保存时取了单个进程上的分片而没有汇总，或梯度只到了一个进程。八张卡时 lora_B 有八分之七是零，评测的是残缺的适
    配器。

    办法：保存前先汇总。彩排与 `zhibei verify` 会查找含零行的适配器矩阵。
    """


@pitfall(
    "lora",
    kind="watchdog",
    by="dead_gradient",
    cost="run",
    errors=[r"None of the inputs have requires_grad=True\. Gradients will be None"],
    sources=["https://github.com/locuslab/open-unlearning/issues/178"],
)
def gc_lora_silent_partial_training() -> None:
    """Most adapters never get a gradient, because recomputed layers cut them off.

    Why: Reentrant checkpointing passes no gradient to layers whose input needs none. As long as something else learns
    (a head in modules_to_save) nothing complains, and lora_B stays zero in every layer.

    Fix: Use non-reentrant checkpointing or enable_input_require_grads. Here recomputation is never reentrant, and the
    watchdog names parameters that got no gradient in the first steps.

    多数适配器得不到梯度，因为重算的层把梯度截断了。

    为何：可重入的检查点不会把梯度传给输入不需要梯度的层。只要还有别的部分在学习（例如 modules_to_save 里的输出层），
    就不会报错，各层的 lora_B 始终为零。

    办法：使用非重入的检查点，或 enable_input_require_grads。zhibei 的重算从不重入，监视器会在最初几步指出没有梯度的参
    数。
    """


@pitfall(
    "lora",
    kind="rehearsal",
    by="reload",
    cost="run",
    errors=[
        r"size mismatch for .*lora_[AB].*torch\.Size\(\[0\]\)",
        r"copying a param with shape torch\.Size\(\[0\]\) from checkpoint",
    ],
    sources=[
        "https://github.com/huggingface/peft/issues/453",
        "https://github.com/huggingface/accelerate/issues/3508",
        "https://github.com/OpenRLHF/OpenRLHF/issues/651",
        "https://github.com/hiyouga/LlamaFactory/issues/446",
        "https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/issues/392",
        "https://github.com/texttron/tevatron/issues/108",
    ],
)
def zero3_lora_empty_adapter() -> None:
    """Under ZeRO-3 the adapter's tensors are saved empty.

    Why: ZeRO-3 splits the adapters too; outside of a gathering each parameter is an empty stand-in, and that is what
    gets written. The file is a few kilobytes and differs from rank to rank.

    Fix: Gather before saving; recover the tensors from DeepSpeed's own checkpoint with zero_to_fp32.py. Here what was
    written is read back in a new process and compared with memory.

    ZeRO-3 下适配器的张量被存成空的。

    为何：ZeRO-3 把适配器也切分了；未汇总时每个参数只是空的占位，写出的就是它。文件只有几 KB，各进程的还不一样。

    办法：保存前先汇总；可用 zero_to_fp32.py 从 DeepSpeed 自己的检查点恢复。在 zhibei 中，写出的内容会在新进程里读回并
    与内存比较。
    """
