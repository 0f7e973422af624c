"""Pits of merging adapters and writing models, as far as they are decided before training. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.store.tensor_names import embedding_name

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "wordembeddings")
HEADS = ("lm_head", "embed_out", "output_layer", "output", "head")
READ_BY_TORCH = ("", "bitsandbytes")
SHOWN = 4


@pitfall(
    "merge_export",
    cost="run",
    errors=[
        r"size mismatch for base_model\.model.{0,200}",
        r"size mismatch for .{0,200}lora_[AB]",
        r"size mismatch for .{0,120}embed_tokens.{0,200}",
    ],
    sources=[
        "https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/issues/360",
        "https://github.com/oobabooga/textgen/issues/959",
    ],
)
def adapter_on_wrong_base(facts: Facts) -> Iterable[Finding]:
    """An adapter is put on another base than the one it was trained on.

    Why: An adapter is a difference from the very weights below it. Where shapes fit, another base (a chat version, a
    base with a longer vocabulary, another revision) gives no error, only nonsense or a slow loss of quality.

    Fix: Give the base the adapter was trained on. Adapters of zhibei carry its fingerprint in the manifest of their
    run; for others their adapter_config.json names it.

    把适配器放在了不是它训练时所用的基座上。

    为何：适配器是相对于其下那份权重的差。只要形状相符，换成另一个基座（聊天版、扩充词表的版本、另一个修订）不会报错，
    只会胡言乱语或悄悄变差。

    办法：使用训练它时的基座。zhibei 的适配器在其训练的清单中带有基座指纹；其他适配器由 adapter_config.json 指明。
    """
    adapter, model = facts.adapter, facts.model
    if adapter is None or model is None or facts.resolved is None:
        return
    key = "lora.adapter" if facts.run.lora.adapter is not None else "model.path"
    named = str(adapter.config.get("base_model_name_or_path") or "")
    if adapter.base_fingerprint and model.fingerprint and adapter.base_fingerprint != model.fingerprint:
        trained_on = (adapter.manifest or {}).get("base", {}).get("path") or named
        yield Finding(
            what=f"{key}: {adapter.path} was trained on base {adapter.base_fingerprint[:12]} ({trained_on}), and "
            f"{model.path} is {model.fingerprint[:12]}",
            where=facts.origin(key),
            to_do=f"set model.path: {trained_on}, or train an adapter on {model.path}",
        )
        return
    if misfits := list(_misfits(facts)):
        yield Finding(
            what=f"{key}: {adapter.path} does not fit {model.path}: {misfits[0]}",
            where=facts.origin(key),
            to_do=f"set model.path to the base the adapter was trained on{f' ({named})' if named else ''}",
            evidence=tuple(misfits[1 : SHOWN + 1]),
        )
    elif not adapter.base_fingerprint and named and not _same_name(named, model.path, str(model.folder or "")):
        yield Finding(
            what=f"{key}: {adapter.path} says it was trained on {named}, and model.path is {model.path}",
            where=f"{adapter.path}/adapter_config.json, base_model_name_or_path",
            to_do="make sure that both are the same weights, then accept this; else set model.path to that base",
            level="warning",
        )


def _misfits(facts: Facts) -> Iterable[str]:
    """Adapter tensors whose layer the model lacks, or whose sizes are not the layer's."""
    assert facts.adapter is not None
    assert facts.model is not None
    shapes = {name.removesuffix(".weight"): shape for name, (_, shape) in facts.model.tensors.items()}
    if not facts.model.module_names or not shapes:
        return
    is_transposed = bool(facts.adapter.config.get("fan_in_fan_out"))
    for name, (_, shape) in facts.adapter.tensors.items():
        inner = name.removeprefix("base_model.model.")
        module, _, kind = inner.partition(".lora_")
        if not kind:
            continue
        if module not in facts.model.module_names and module not in shapes:
            yield f"it adapts {module}, which the model does not have"
            continue
        base = shapes.get(module)
        if base is None or len(base) != 2 or len(shape) != 2:
            continue
        outputs, inputs = (base[1], base[0]) if is_transposed else (base[0], base[1])
        have, wanted = (shape[1], inputs) if kind.startswith("A") else (shape[0], outputs)
        if kind.startswith(("A", "B")) and have != wanted:
            yield f"{module} has {wanted} {'inputs' if kind.startswith('A') else 'outputs'}, the adapter {have}"


def _same_name(named: str, *paths: str) -> bool:
    """The last part of a hub id or path, apart from case, is the same."""
    last = named.rstrip("/").rsplit("/", 1)[-1].lower()
    return any(last == path.rstrip("/").rsplit("/", 1)[-1].lower() for path in paths if path)


def last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower()


def _tied_names(facts: Facts, names: Iterable[str]) -> list[str]:
    """Those that mean the embeddings or the head, by what the model calls them or by what families do."""
    own = embedding_name(facts.model.tensors) if facts.model is not None else None
    known = {*EMBEDDINGS, *HEADS, *([last_part(own.removesuffix(".weight"))] if own else [])}
    return [name for name in names if last_part(name) in known]


def _has_adapters(facts: Facts) -> bool:
    return facts.resolved is not None and facts.run.model.method != "full"


def _adapter_list(facts: Facts, ours: str, theirs: str) -> list[str]:
    """Names in the run file, or in the adapter that is continued."""
    if facts.adapter is not None and facts.run.lora.adapter is not None:
        value: Any = facts.adapter.config.get(theirs) or []
    else:
        value = getattr(facts.run.lora, ours)
    return [value] if isinstance(value, str) else [str(name) for name in value]


@pitfall(
    "merge_export",
    cost="run",
    errors=[
        r"model with `?tie_word_embeddings=True`? and the `?(target_modules|modules_to_save|tied)",
        r"tied_target_modules=.{0,80}part of the adapter",
        r"ensure_weight_tying",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/45127",
        "https://github.com/huggingface/peft/pull/2972",
        "https://github.com/unslothai/unsloth/pull/9331",
        "https://github.com/huggingface/peft/pull/2803",
        "https://github.com/hiyouga/LlamaFactory/issues/6749",
    ],
)
def tied_embedding_modules_to_save_diverge(facts: Facts) -> Iterable[Finding]:
    """Embeddings or head are trained in full beside adapters, on a model where both are one tensor.

    Why: Each name in lora.modules_to_save becomes a copy of its own. Two copies of one tensor learn apart, and the
    config still says that they are one: after merging and saving, one of them overwrites the other, and the model
    repeats a token for ever.

    Fix: Leave lora.modules_to_save empty on such a model, or train it in full. New tokens can be trained in full
    training (model.method: full) or on a model whose embeddings are not tied.

    在嵌入与输出头共用一个张量的模型上，又要在适配器之外完整训练它们。

    为何：lora.modules_to_save 中的每个名字都会成为单独的副本。同一张量的两个副本各学各的，而 config 仍说它们是一个：合
    并保存后其中一个会覆盖另一个，模型便无休止地重复一个词。

    办法：在这种模型上让 lora.modules_to_save 为空，或改为全参训练。新增的符号可以用全参训练（model.method: full）来学，
    或使用嵌入不共享的模型。
    """
    if not _has_adapters(facts) or facts.model is None or not facts.model.is_tied:
        return
    names = _tied_names(facts, _adapter_list(facts, "modules_to_save", "modules_to_save"))
    if names:
        key = "lora.adapter" if facts.run.lora.adapter is not None else "lora.modules_to_save"
        others = [name for name in facts.run.lora.modules_to_save if name not in names]
        yield Finding(
            what=f"{key}: {', '.join(names)} would be trained as copies, and in {facts.model.path} embeddings and head "
            "are one tensor (tie_word_embeddings)",
            where=facts.origin(key),
            to_do="remove them from lora.modules_to_save, or set model.method: full",
            changes={"lora.modules_to_save": others} if key == "lora.modules_to_save" else {},
        )


@pitfall(
    "merge_export",
    cost="run",
    sources=[
        "https://github.com/huggingface/peft/issues/2018",
        "https://github.com/thinking-machines-lab/tinker-cookbook/pull/593",
    ],
)
def tied_lm_head_lora_merged_into_embedding(facts: Facts) -> Iterable[Finding]:
    """An adapter on the output head (or the embeddings) of a model where both are one tensor.

    Why: Beside the base the adapter changes one of the two only. Merging writes its difference into the shared tensor,
    so the other changes as well, and the merged model is another than the one that was evaluated.

    Fix: Take head and embeddings out of lora.targets (all-linear leaves them out). `zhibei merge` makes two tensors of
    the one, which is right but larger; other programs do not.

    在嵌入与输出头共用一个张量的模型上，对输出头（或嵌入）加了适配器。

    为何：不合并时适配器只改变其中一个；合并会把差写进共享张量，另一个也随之改变，合并后的模型不再是评估过的那个。

    办法：从 lora.targets 中去掉输出头和嵌入（all-linear 本就不含它们）。`zhibei merge` 会把一个张量拆成两个，结果正确但
    更大；其他程序不会。
    """
    if not _has_adapters(facts) or facts.model is None or not facts.model.is_tied:
        return
    names = _tied_names(facts, _adapter_list(facts, "targets", "target_modules"))
    if names:
        key = "lora.adapter" if facts.run.lora.adapter is not None else "lora.targets"
        targets = facts.run.lora.targets
        others = [name for name in targets if name not in names] if isinstance(targets, list) else []
        yield Finding(
            what=f"{key}: {', '.join(names)} of {facts.model.path}, where embeddings and head are one tensor",
            where=facts.origin(key),
            to_do="take them out of lora.targets",
            changes={"lora.targets": others} if others and key == "lora.targets" else {},
        )


@pitfall(
    "merge_export",
    cost="run",
    errors=[
        r"cannot merge adapters to a quantized model",
        r"(gptq|awq).{0,80}(does not|doesn't|not) support.{0,40}merg",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/5625",
        "https://github.com/hiyouga/LlamaFactory/issues/4647",
        "https://github.com/hiyouga/LlamaFactory/issues/5171",
        "https://github.com/hiyouga/LlamaFactory/issues/2795",
    ],
)
def qlora_on_gptq_awq_cannot_merge(facts: Facts) -> Iterable[Finding]:
    """Training begins on weights that were stored quantised (GPTQ, AWQ, FP8, ...).

    Why: An adapter on such a base can never be merged into it, and its 16-bit sibling may have other shapes, so the
    result is tied to that file for ever. Full training of such weights is not possible at all.

    Fix: Take the 16-bit weights of the same model.

    在以量化形式存储的权重（GPTQ、AWQ、FP8 等）上开始训练。

    为何：这种基座上的适配器永远无法合并进去，它的 16 位版本形状又可能不同，结果只能一直依附于那份文件；全参训练则根本
    不可能。

    办法：使用同一模型的 16 位权重。
    """
    model = facts.model
    if model is None or facts.resolved is None or model.quant_method in READ_BY_TORCH:
        return
    yield Finding(
        what=f"{model.path} is stored quantised ({model.quant_method}): what is trained on it cannot be merged",
        where=f"{model.folder or model.path}/config.json, quantization_config",
        to_do="set model.path to the 16-bit weights of this model",
    )


@pitfall(
    "merge_export",
    cost="run",
    sources=[
        "https://github.com/unslothai/unsloth-zoo/pull/810",
        "https://github.com/huggingface/peft/issues/2105",
    ],
)
def merge_wrong_precision_base_qlora(facts: Facts) -> Iterable[Finding]:
    """An adapter that was trained on a quantised base is merged into the 16-bit one.

    Why: It has learned against the rounded weights, rounding errors included. On the exact weights it is mostly as
    good; on models with large weights it can be useless, and nothing says so.

    Fix: Compare held-out loss and answers of base with adapter and of the merged model before you use it:
    `zhibei merge` ends with this comparison (against the adapter on the exact weights).

    在量化基座上训练的适配器被合并进 16 位基座。

    为何：它是对着舍入后的权重（连同舍入误差）学的。放到精确权重上多半一样好，但在权重数值较大的模型上可能毫无用处，而且
    没有任何提示。

    办法：使用之前，比较“基座加适配器”与合并后模型的留出损失和回答；`zhibei merge` 最后会做这一比较（对照精确权重上的
    适配器）。
    """
    adapter = facts.adapter
    if adapter is None or facts.resolved is None or facts.run.model.method != "full":
        return
    manifest = adapter.manifest or {}
    kind = ((manifest.get("settings") or {}).get("model") or {}).get("quantize", "none")
    if manifest.get("method") == "qlora" or kind != "none":
        bits = "" if kind == "none" else f" ({kind})"
        yield Finding(
            what=f"model.path: {adapter.path} was trained on a base in few bits{bits}, and full training merges it "
            "into the unquantised base",
            where=facts.origin("model.path"),
            to_do="compare the held-out loss at step 0 with that of the adapter's run; else continue with lora.adapter",
            level="warning",
        )
