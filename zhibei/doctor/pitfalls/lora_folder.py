"""Pits of adapter folders that a run continues from: damaged, incomplete, of another kind or base. Knows facts only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts, ModelFacts
from zhibei.doctor.pitfall import Finding, pitfall

ADAPTER_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(\.default)?(\.weight)?")
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
MOST_SHOWN = 3

Shape = tuple[int, ...]


def place(facts: Facts) -> str:
    """Where the run file names the adapter."""
    key = "lora.adapter" if facts.run.lora.adapter is not None else "model.path"
    return f"{key} ({facts.origin(key)})"


def lora_tensors(adapter: AdapterFacts) -> dict[str, dict[str, Shape]]:
    """Shapes of lora_A and lora_B by the module that they stand beside."""
    found: dict[str, dict[str, Shape]] = {}
    for name, (_, shape) in adapter.tensors.items():
        match = ADAPTER_TENSOR.fullmatch(name)
        if match and not match["side"].startswith("embedding"):
            found.setdefault(match["module"].removeprefix(PREFIX), {})[match["side"]] = shape
    return found


def base_name(module: str, names: Iterable[str] | Mapping[str, Any]) -> str:
    """The base's name of a module; checkpoints of some families leave the first part (`transformer.`) out."""
    return next((name for name in (module, module.partition(".")[2], f"model.{module}") if name in names), "")


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def is_lora(adapter: AdapterFacts | None) -> bool:
    return adapter is not None and adapter.config.get("peft_type", "LORA") == "LORA"


@pitfall("lora", cost="launch", errors=[r"Error while deserializing header.*adapter", r"adapter_model.*not found"])
def adapter_folder_damaged(facts: Facts) -> Iterable[Finding]:
    """The adapter's weights are missing, cut off, pickled or not finite.

    Why: A copy that was broken off, a save that was killed or a run that diverged leaves a folder that looks whole.
    Some loaders then begin with fresh adapters, and NaN spreads to every loss.

    Fix: Copy the folder again, or go back to an earlier checkpoint of the run that wrote it.

    适配器的权重缺失、被截断、是 pickle 格式，或含有非有限数。

    为何：中断的复制、保存时被杀掉的进程或发散的训练，都会留下看似完整的文件夹。有的加载器于是从全新的适配器开始，而
    NaN 会传到每一个损失。

    办法：重新复制该文件夹，或退回到写出它的那次运行的较早检查点。
    """
    adapter = facts.adapter
    if adapter is not None and adapter.fault and is_lora(adapter):
        yield Finding(
            what=f"the adapter {adapter.path} cannot be used: {adapter.fault}",
            where=place(facts),
            to_do=f"copy {adapter.path / WEIGHTS} again, or take an earlier checkpoint of the run that wrote it "
            "(zhibei verify names what is damaged)",
        )


@pitfall("lora", cost="launch", errors=[r"KeyError: ['\"]peft_type", r"Can't find a valid.*peft_type"])
def adapter_of_another_kind(facts: Facts) -> Iterable[Finding]:
    """The folder holds an adapter that is no LoRA.

    Why: IA3, prompt tuning and prefix tuning share the file names of LoRA and have other mathematics; merging,
    conversion and serving of such an adapter differ.

    Fix: Continue from a LoRA adapter, or begin a new one without lora.adapter.

    该文件夹里的适配器不是 LoRA。

    为何：IA3、prompt tuning、prefix tuning 与 LoRA 文件名相同而数学不同；合并、转换与部署方式也不同。

    办法：从 LoRA 适配器继续，或去掉 lora.adapter 重新开始。
    """
    if facts.adapter is not None and not is_lora(facts.adapter):
        yield Finding(
            what=f"{facts.adapter.path}/adapter_config.json says peft_type {facts.adapter.config.get('peft_type')}",
            where=place(facts),
            to_do="name a LoRA adapter, or remove lora.adapter and begin a new one",
        )


@pitfall(
    "lora",
    cost="launch",
    errors=[r"size mismatch for base_model\.model\..*lora_[AB]"],
)
def adapter_does_not_fit_base(facts: Facts) -> Iterable[Finding]:
    """The adapter was made for a model of other layers, sizes or vocabulary.

    Why: An adapter is a correction of the very weights it was trained beside. Layers of other names are skipped by some
    loaders, so that nothing of the adapter is left and nothing says so; embeddings of another vocabulary stop late.

    Fix: Set model.path to the base that adapter_config.json names.

    适配器是为另一个层数、尺寸或词表的模型做的。

    为何：适配器是对当时那份权重的修正。名字不同的层会被有的加载器略过，适配器于是不起作用而毫无提示；词表不同的词嵌入
    则很晚才报错。

    办法：把 model.path 设为 adapter_config.json 所写的底座。
    """
    adapter, model = facts.adapter, facts.model
    if adapter is None or model is None or not model.tensors or adapter.fault or not is_lora(adapter):
        return
    faults = [*_foreign_layers(adapter, model), *_foreign_sizes(adapter, model)]
    if faults:
        yield Finding(
            what=f"the adapter {adapter.path} does not fit the base {model.path}: {faults[0]}",
            where=f"{place(facts)}, {WEIGHTS}",
            to_do="set model.path to the base it was trained on (adapter_config.json names "
            f"{adapter.config.get('base_model_name_or_path') or 'none'}), or take an adapter of this base",
            evidence=tuple(faults[1:]),
        )


def _foreign_layers(adapter: AdapterFacts, model: ModelFacts) -> list[str]:
    modules = set(model.module_names)
    lost = [module for module in lora_tensors(adapter) if modules and not base_name(module, modules)]
    return [f"the base has no layer {some(lost)}"] if lost else []


def _foreign_sizes(adapter: AdapterFacts, model: ModelFacts) -> list[str]:
    faults = []
    for module, sides in lora_tensors(adapter).items():
        shape = model.tensors.get(f"{base_name(module, model.module_names)}.weight", ("", ()))[1]
        if len(shape) != 2 or any(len(side) != 2 for side in sides.values()):
            continue
        # GPT-2's layers keep their weights the other way round.
        ways = (shape, shape[::-1])
        fits_input = "A" not in sides or any(sides["A"][1] == way[1] for way in ways)
        fits_output = "B" not in sides or any(sides["B"][0] == way[0] for way in ways)
        if not fits_input or not fits_output:
            held = ", ".join(f"lora_{side} is {list(sizes)}" for side, sizes in sorted(sides.items()))
            faults.append(f"{module} is {list(shape)} in the base, and {held}")
    for name, (_, shape) in adapter.tensors.items():
        whole = name.removeprefix(PREFIX)
        if ADAPTER_TENSOR.fullmatch(name) or whole not in model.tensors:
            continue
        if model.tensors[whole][1] != shape:
            faults.append(f"{whole} is {list(model.tensors[whole][1])} in the base and {list(shape)} in the adapter")
    return faults


@pitfall("lora", cost="run", sources=["https://github.com/tloen/alpaca-lora/issues/293"])
def adapter_incomplete(facts: Facts) -> Iterable[Finding]:
    """The adapter's file lacks tensors that its adapter_config.json promises.

    Why: PEFT fills what is missing with fresh adapters, whose product is zero, and says nothing: a part of what was
    learned is lost. Empty files are what DeepSpeed and old scripts leave; another rank is a file of another run.

    Fix: Copy adapter_config.json and adapter_model.safetensors together from the run that wrote them.

    适配器文件缺少 adapter_config.json 所承诺的张量。

    为何：PEFT 用乘积为零的新适配器补上缺失部分而不作声，学到的东西就少了一块。空文件多由 DeepSpeed 或旧脚本留下；秩不
    同则是另一次运行的文件。

    办法：从写出它的运行里一并复制 adapter_config.json 与 adapter_model.safetensors。
    """
    adapter = facts.adapter
    if adapter is None or adapter.fault or not is_lora(adapter):
        return
    for what in _missing_parts(adapter, facts.model):
        yield Finding(
            what=f"the adapter {adapter.path} is incomplete: {what}",
            where=f"{place(facts)}, {WEIGHTS}",
            to_do="copy adapter_config.json and adapter_model.safetensors together from the run that wrote them",
        )


def _missing_parts(adapter: AdapterFacts, model: ModelFacts | None) -> Iterable[str]:
    held = lora_tensors(adapter)
    embeddings = any("lora_embedding" in name for name in adapter.tensors)
    if not held and not embeddings:
        yield f"{WEIGHTS} holds no adapter tensors ({len(adapter.tensors)} tensors, {adapter.num_bytes:,} bytes)"
        return
    one_sided = [module for module, sides in held.items() if len(sides) == 1]
    if one_sided:
        yield f"only one of lora_A and lora_B is there for {some(one_sided)}"
    yield from _other_ranks(adapter, held)
    expected = _promised_modules(adapter.config, model)
    lost = [module for module in expected if not _is_held(module, held)]
    if lost and len(lost) < len(expected):
        yield f"it has nothing for {len(lost)} of {len(expected)} target layers: {some(lost)}"


def _is_held(module: str, held: Mapping[str, Any]) -> bool:
    """Whether the adapter has the module under one of the names that can mean it."""
    return any(name in held for name in (module, f"model.{module}", f"transformer.{module}", module.partition(".")[2]))


def _other_ranks(adapter: AdapterFacts, held: Mapping[str, Mapping[str, Shape]]) -> Iterable[str]:
    rank = adapter.config.get("r")
    if not isinstance(rank, int) or adapter.config.get("rank_pattern"):
        return
    other = [module for module, sides in held.items() if len(sides.get("A", ())) == 2 and sides["A"][0] != rank]
    if other:
        found = held[other[0]]["A"][0]
        yield f"adapter_config.json says rank r: {rank}, and the tensors of {some(other)} have rank {found}"


def _promised_modules(config: Mapping[str, Any], model: ModelFacts | None) -> list[str]:
    """The layers of the base that adapter_config.json names as targets; none where a rule picks among them."""
    targets = config.get("target_modules")
    rules = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
    if model is None or not isinstance(targets, list) or any(config.get(rule) for rule in rules):
        return []
    return [
        module
        for module in model.linear_names
        if any(module == target or module.endswith(f".{target}") for target in targets)
    ]
