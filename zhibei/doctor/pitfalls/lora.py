"""Pits of adapters: which layers get one, how large they are, and what they cannot learn. Knows facts only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

REGEX_SIGNS = re.compile(r"[\\^$*+?()\[\]{}|]")
# PEFT's own word for every linear layer but the head; as an item of a list it would be the name of one layer.
WORD_FOR_ALL = "all-linear"
NEAR_ENOUGH = 0.6
# alpha / rank is 1 to 2 in most published runs, 1/4 in QLoRA (alpha 16, rank 64), 4 in Alpaca-LoRA's cousins.
LEAST_SCALE, MOST_SCALE = 0.1, 16.0
# An embedding row that training never touched is zero, or the mean of others, far shorter than one that was learned.
UNTRAINED_NORM_SHARE = 0.4


def has_fresh_adapters(facts: Facts) -> bool:
    """Whether this run makes new adapters; lora.adapter brings its own rank and targets."""
    return facts.run.model.method != "full" and facts.run.lora.adapter is None


def trains_embeddings(facts: Facts) -> bool:
    """Whether embedding and head learn beside the adapters."""
    if facts.run.model.method == "full":
        return True
    saved = facts.run.lora.modules_to_save
    if facts.adapter is not None and facts.run.lora.adapter is not None:
        saved = list(facts.adapter.config.get("modules_to_save") or [])
    names = [name.rsplit(".", 1)[-1] for name in saved]
    return any("embed" in name or name in ("wte", "word_embeddings") for name in names)


def matched(name: str, modules: Sequence[str]) -> list[str]:
    """The modules that a name in lora.targets means: itself, or the end of a dotted name."""
    return [module for module in modules if module == name or module.endswith(f".{name}")]


def last_parts(modules: Iterable[str]) -> list[str]:
    """`model.layers.0.self_attn.q_proj` -> `q_proj`, each once."""
    return sorted({module.rsplit(".", 1)[-1] for module in modules} - {""})


def _nearest(name: str, modules: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts(modules), n=1, cutoff=NEAR_ENOUGH)
    return near[0] if near else ""


def _targets(facts: Facts) -> list[str]:
    """Names in lora.targets that can be judged: a list, a model whose layers are known, and no regex among them."""
    targets = facts.run.lora.targets
    if not has_fresh_adapters(facts) or isinstance(targets, str) or facts.model is None:
        return []
    return [name for name in targets if not is_regex(name)] if facts.model.linear_names else []


def is_regex(name: str) -> bool:
    """Whether a list item was meant as a pattern: layer names hold letters, digits, dots, _ and -."""
    return bool(REGEX_SIGNS.search(name)) or name == WORD_FOR_ALL


@pitfall(
    "lora",
    cost="minutes",
    errors=[r"Target modules \[?['\"]?.*[\\*^$|].*not found in the base model"],
    sources=["https://github.com/huggingface/peft/issues/1206"],
)
def lora_target_regex_in_list(facts: Facts) -> Iterable[Finding]:
    """A pattern stands in the list of target layers, where only names are read.

    Why: PEFT reads one plain text as a regular expression and the items of a list as ends of layer names. A pattern in
    a list matches nothing, and versions differed in it. "all-linear" is a word of its own and no item of a list.

    Fix: Write the names of the layers ([q_proj, v_proj]), or all-linear without a list.

    目标层的列表里写了正则式，而列表只接受名字。

    为何：PEFT 把单独一段文本当作正则式，把列表的各项当作层名的结尾。列表里的正则式什么也匹配不到，而且各版本的行为不
    同。“all-linear” 是单独的词，不能放进列表。

    办法：写层的名字（[q_proj, v_proj]），或不带列表地写 all-linear。
    """
    targets = facts.run.lora.targets
    if not has_fresh_adapters(facts) or isinstance(targets, str):
        return
    modules = facts.model.linear_names if facts.model is not None else ()
    for name in targets:
        if not is_regex(name):
            continue
        ends = [end for end in last_parts(modules) if end in re.split(r"[^\w-]+", name)]
        better = "all-linear" if name == WORD_FOR_ALL else f"[{', '.join(ends)}]" if ends else "all-linear"
        yield Finding(
            what=f"lora.targets holds {name!r}, and items of the list are ends of layer names, not patterns",
            where=facts.origin("lora.targets"),
            to_do=f"write lora.targets: {better}",
            changes={"lora.targets": "all-linear"} if better == "all-linear" else {"lora.targets": ends},
        )


@pitfall(
    "lora",
    cost="launch",
    errors=[
        r"Target modules .{1,400} not found in the base model",
        r"Please specify `?target_modules`?.{0,40}in `?peft_config",
        r"Target modules? .{1,80} is not supported\. Currently, only",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/181",
        "https://github.com/hiyouga/LlamaFactory/issues/3597",
        "https://github.com/linhduongtuan/BLOOM-LORA/issues/15",
        "https://github.com/lyhue1991/torchkeras/issues/58",
        "https://github.com/mikeybellissimo/LoRA-MPT/issues/4",
    ],
)
def lora_targets_not_in_model(facts: Facts) -> Iterable[Finding]:
    """None of the target layers exists in this model.

    Why: Families name their layers differently (q_proj, query_key_value, W_pack, c_attn, Wqkv), and the names were
    taken from another one. The model is loaded first and the run stops then.

    Fix: Set lora.targets: all-linear, or names from the list in the finding.

    目标层在这个模型里一个也不存在。

    为何：各家族对层的命名不同（q_proj、query_key_value、W_pack、c_attn、Wqkv），所写的名字属于另一个家族。模型先被加
    载，然后才报错停止。

    办法：设 lora.targets: all-linear，或使用结果中列出的名字。
    """
    names = _targets(facts)
    model = facts.model
    if names and model is not None and not any(matched(name, model.linear_names) for name in names):
        yield Finding(
            what=f"lora.targets: [{', '.join(names)}] matches no linear layer of this "
            f"{model.config.get('model_type', 'model')}; it has {', '.join(last_parts(model.linear_names))}",
            where=facts.origin("lora.targets"),
            to_do="set lora.targets: all-linear, or names of that list",
            changes={"lora.targets": "all-linear"},
        )


@pitfall("lora", cost="run", sources=["https://github.com/huggingface/peft/issues/1959"])
def lora_target_typo_ignored(facts: Facts) -> Iterable[Finding]:
    """One name among the target layers, or among those trained in full, matches nothing.

    Why: PEFT complains only when no name matches. A misspelt one beside a right one is passed over, and is even
    recorded as a target in adapter_config.json; part of the capacity is missing and nothing says so.

    Fix: Correct the name (the finding proposes the nearest), or remove it.

    目标层或全量训练层的名字里有一个匹配不到任何层。

    为何：只有全部名字都不匹配时 PEFT 才报错。拼错的名字若与正确的并列，就被悄悄略过，adapter_config.json 里却仍记为目
    标；部分容量缺失而毫无提示。

    办法：改正名字（结果中给出最接近的），或删去。
    """
    names, model = _targets(facts), facts.model
    if model is None:
        return
    wrong = [name for name in names if not matched(name, model.linear_names)]
    if wrong and len(wrong) < len(names):
        for name in wrong:
            yield _no_such_layer(facts, "lora.targets", name, names, model.linear_names)
    saved = facts.run.lora.modules_to_save if has_fresh_adapters(facts) and model.module_names else []
    for name in saved:
        if not matched(name, model.module_names):
            yield _no_such_layer(facts, "lora.modules_to_save", name, saved, model.module_names)


def _no_such_layer(facts: Facts, key: str, name: str, names: Sequence[str], modules: Sequence[str]) -> Finding:
    near = _nearest(name, modules)
    mended = list(dict.fromkeys(near if one == name and near else one for one in names if one != name or near))
    everything = facts.model.module_names if facts.model is not None else ()
    kind = "a module that is no linear layer" if matched(name, everything) else "no layer of this model"
    return Finding(
        what=f"{key}: {name!r} is {kind}; known: {', '.join(last_parts(modules)[:12])}",
        where=facts.origin(key),
        to_do=f"write {near!r} instead" if near else "remove it, or take a name of that list",
        changes={key: mended},
    )


@pitfall(
    "lora",
    cost="launch",
    errors=[r"Target modules (\[\]|set\(\)|\{\}) not found in the base model"],
    sources=[
        "https://github.com/yangjianxin1/Firefly/issues/23",
        "https://github.com/yangjianxin1/Firefly/issues/219",
        "https://github.com/yangjianxin1/Firefly/issues/134",
        "https://github.com/EvilPsyCHo/train_custom_LLM/issues/8",
        "https://github.com/AutoGPTQ/AutoGPTQ/issues/667",
    ],
)
def lora_targets_empty_after_quant_detect(facts: Facts) -> Iterable[Finding]:
    """There is no layer that could get an adapter.

    Why: Scripts look for layers of a quantised class, and the model was not quantised after all; or the weights are
    stored in a format whose layers are no ordinary linear ones. The list of targets is then empty.

    Fix: Use the unquantised weights, name the layers yourself, or train with method full.

    没有任何层可以加适配器。

    为何：脚本按量化层的类型寻找，而模型其实没有被量化；或权重的存储格式里没有普通的线性层。目标列表因而为空。

    办法：使用未量化的权重，自行写出层名，或用 method full 训练。
    """
    model = facts.model
    if model is None or not model.tensors or not has_fresh_adapters(facts):
        return
    targets = facts.run.lora.targets
    if not model.linear_names or (isinstance(targets, list) and not targets):
        what = "lora.targets is an empty list" if model.linear_names else "no linear layer was found in the weights"
        quantised = f" (stored as {model.quant_method})" if model.quant_method else ""
        yield Finding(
            what=f"{what}{quantised}: no adapter would be made",
            where=facts.origin("lora.targets") if model.linear_names else str(model.folder or model.path),
            to_do="set lora.targets: all-linear" if model.linear_names else "use the model's unquantised weights",
            changes={"lora.targets": "all-linear"} if model.linear_names else {},
        )


@pitfall("lora", cost="hours")
def lora_rank_exceeds_layer(facts: Facts) -> Iterable[Finding]:
    """The adapter's rank is as large as the layer it is put on.

    Why: A product of rank r has 2 x r x width parameters; from half the width on it is larger than the layer itself and
    cannot do more than training the layer in full. It costs memory and learns worse.

    Fix: Take a rank of 8 to 64, or method full.

    适配器的秩与所在层一样大。

    为何：秩为 r 的乘积有 2 × r × 宽度 个参数，秩超过宽度的一半就比这一层本身还大，而能力不会超过全量训练；既占显存，
    又学得更差。

    办法：秩取 8 到 64，或使用 method full。
    """
    model, rank = facts.model, facts.run.lora.rank
    if model is None or not has_fresh_adapters(facts):
        return
    targets = facts.run.lora.targets
    chosen = [one for name in _targets(facts) for one in matched(name, model.linear_names)]
    sizes = [
        (min(model.tensors[f"{layer}.weight"][1]), layer)
        for layer in (chosen if isinstance(targets, list) else model.linear_names)
        if len(model.tensors.get(f"{layer}.weight", ("", ()))[1]) == 2
    ]
    if sizes and rank >= max(sizes)[0]:
        yield Finding(
            what=f"lora.rank: {rank}, and the largest layer it is put on has only {max(sizes)[0]} dimensions",
            where=facts.origin("lora.rank"),
            to_do=f"set lora.rank: {max(1, min(16, min(sizes)[0] // 4))}, or model.method: full",
            level="warning",
            changes={"lora.rank": max(1, min(16, min(sizes)[0] // 4))},
        )


@pitfall("lora", cost="hours", sources=["https://arxiv.org/abs/2312.03732"])
def lora_scale_out_of_range(facts: Facts) -> Iterable[Finding]:
    """The adapters' scale is far from any that was published.

    Why: The adapter's output is multiplied by alpha / rank, or with rslora by alpha / sqrt(rank). An alpha chosen for
    one of the two is wrong by sqrt(rank) for the other: updates are then ten times too large, or hardly felt.

    Fix: Set alpha to one or two times the rank; with lora.rslora to one or two times its square root.

    适配器的缩放与任何公开取值相去甚远。

    为何：适配器的输出乘以 alpha / rank，启用 rslora 时乘以 alpha / sqrt(rank)。为其中一种选的 alpha 用在另一种上会差
    sqrt(rank) 倍：更新要么大十倍，要么几乎没有作用。

    办法：alpha 取秩的一到两倍；启用 lora.rslora 时取秩的平方根的一到两倍。
    """
    lora = facts.run.lora
    if not has_fresh_adapters(facts):
        return
    scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
    if not LEAST_SCALE <= scale <= MOST_SCALE:
        good = 2 * lora.rank if not lora.rslora else max(1, round(2 * lora.rank**0.5))
        key = "lora.alpha" if facts.origin("lora.alpha") != "default" else "lora.rank"
        formula = "alpha / sqrt(rank)" if lora.rslora else "alpha / rank"
        yield Finding(
            what=f"lora.alpha: {lora.alpha:g} with lora.rank: {lora.rank}: the scale {formula} is {scale:.3g}; "
            "published runs use 0.25 to 4",
            where=facts.origin(key),
            to_do=f"set lora.alpha: {good}",
            level="warning",
            changes={"lora.alpha": good},
        )
