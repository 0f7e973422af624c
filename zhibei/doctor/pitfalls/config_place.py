"""Pits of the model's context, of launchers, and of the folder a run writes into. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "DEEPSPEED_")
LAUNCHER_NOTHING = ("", "no", "false", "0", "none")
# The parameters that transformers requires for each kind of position scaling.
ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
    "mrope": (),
    "su": (),
}
ROPE_SINCE = {"llama3": (4, 43), "longrope": (4, 39), "yarn": (4, 41)}


@pitfall(
    "config",
    cost="run",
    sources=[
        "https://github.com/huggingface/open-r1/issues/645",
        "https://github.com/vllm-project/vllm/issues/2565",
        "https://github.com/vllm-project/vllm/issues/888",
    ],
)
def context_extension_needs_config_change(facts: Facts) -> Iterable[Finding]:
    """Rows are longer than the positions the model knows, or positions are scaled although no row needs it.

    Why: Beyond max_position_embeddings a model has never seen a position; it trains on noise there, and engines refuse
    such prompts because they read the limit from config.json. Scaling positions changes every row, also the short
    ones, so it only pays where rows are long.

    Fix: Set data.max_tokens to what the model knows, or model.rope_scaling_factor so that the product covers the rows;
    it is saved into config.json with the model.

    数据行比模型认识的位置更长，或并无长行却缩放了位置。

    为何：超过 max_position_embeddings 的位置模型从未见过，在那里等于用噪声训练；推理引擎从 config.json 读取上限，会拒
    绝这样的输入。缩放位置会影响每一行，短行也不例外，因此只有行很长时才值得。

    办法：把 data.max_tokens 设到模型认识的长度，或设 model.rope_scaling_factor 使乘积覆盖数据行；它会随模型写入
    config.json。
    """
    run, config = facts.run, _text_config(facts)
    positions, factor = config.get("max_position_embeddings"), run.model.rope_scaling_factor
    if not isinstance(positions, int) or positions <= 0:
        return
    reach = int(positions * (factor or 1))
    if run.data.max_tokens > reach:
        longest = f"; the longest row has {facts.rows.longest}" if facts.rows is not None else ""
        needed = -(-run.data.max_tokens // positions)
        yield Finding(
            what=f"data.max_tokens: {run.data.max_tokens}, but the model knows {reach} positions{longest}",
            where=facts.origin("data.max_tokens"),
            to_do=f"set data.max_tokens: {reach}, or model.rope_scaling_factor: {needed}",
            changes={"data.max_tokens": reach},
            is_safe=facts.rows is not None and 0 < facts.rows.longest <= reach,
        )
    elif factor is not None and facts.rows is not None and 0 < facts.rows.longest <= positions:
        yield Finding(
            what=f"model.rope_scaling_factor: {factor:g}, but the longest row has {facts.rows.longest} tokens and the "
            f"model knows {positions} positions without it",
            where=facts.origin("model.rope_scaling_factor"),
            to_do="remove model.rope_scaling_factor",
            level="warning",
            changes={"model.rope_scaling_factor": None},
        )


def _text_config(facts: Facts) -> Mapping[str, Any]:
    config = facts.model.config if facts.model is not None else {}
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


@pitfall(
    "config",
    cost="minutes",
    errors=[
        r"rope_scaling.{0,3} must be a dictionary with .{0,10}(two|three) fields",
        r"rope_scaling.{0,3}'s (type|factor) field must be",
        r"Unrecognized keys in `?rope_(scaling|parameters)",
        r"Missing required keys in `?rope_(scaling|parameters)",
    ],
    sources=[
        "https://github.com/meta-llama/llama3/issues/299",
        "https://github.com/hiyouga/LlamaFactory/issues/4962",
        "https://github.com/hiyouga/LlamaFactory/issues/4984",
        "https://github.com/runpod-workers/worker-vllm/issues/89",
        "https://github.com/foundation-model-stack/foundation-model-stack/issues/384",
    ],
)
def rope_scaling_llama31_old_transformers(facts: Facts) -> Iterable[Finding]:
    """The model's position scaling is of a kind, or lacks a number, that the installed transformers needs.

    Why: config.json says how positions are scaled, and each kind needs its own numbers. An older transformers refuses a
    kind it does not know; people then shorten the entry by hand until it loads, and the model computes other positions
    than it was trained with, without a word.

    Fix: Upgrade transformers, and take config.json from the model's source as it is.

    模型的位置缩放方式，或它所需的数值，与已安装的 transformers 不符。

    为何：config.json 写明位置如何缩放，每种方式各需自己的数值。旧版 transformers 会拒绝不认识的方式；有人便手动删改直
    到能加载，模型随后用与训练时不同的位置计算，却没有任何提示。

    办法：升级 transformers，并原样使用模型来源处的 config.json。
    """
    config = _text_config(facts)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or not rope or all(isinstance(value, dict) for value in rope.values()):
        return
    kind = rope.get("rope_type") or rope.get("type")
    where = f"{facts.model.path if facts.model else 'the model'}/config.json, rope_scaling"
    version = _version(facts.environment.packages.get("transformers", ""))
    if kind is None and "factor" not in rope:
        return
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        problem = f"is of kind {kind!r}, which transformers does not know"
    elif version and version < ROPE_SINCE.get(kind, (0,)):
        since = ".".join(map(str, ROPE_SINCE[kind]))
        problem = f"is of kind {kind}, which needs transformers {since} (installed: {'.'.join(map(str, version))})"
    elif missing := [name for name in ROPE_NEEDS[kind] if name not in rope]:
        problem = f"of kind {kind} lacks {', '.join(missing)}"
    elif kind != "llama3" and "low_freq_factor" in rope:
        problem = f"is of kind {kind}, but has the numbers of kind llama3: it was changed by hand"
    else:
        return
    yield Finding(
        what=f"the position scaling {problem}",
        where=where,
        to_do="upgrade transformers (pip install -U transformers), and copy config.json from the model's source again",
    )


def _version(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int(part) for part in parts) if len(parts) == 2 and all(part.isdigit() for part in parts) else ()


@pitfall(
    "config",
    cost="launch",
    errors=[r"More than one GPU was found, enabling multi-GPU training"],
    sources=[
        "https://github.com/huggingface/accelerate/issues/160",
        "https://github.com/huggingface/accelerate/issues/717",
        "https://github.com/huggingface/accelerate/issues/2920",
        "https://github.com/huggingface/accelerate/pull/2763",
    ],
)
def accelerate_default_config_surprise(facts: Facts) -> Iterable[Finding]:
    """Another program's launcher asks for settings that have no effect here.

    Why: `accelerate launch` merges a file from the user's home with its flags and hands the result over in environment
    variables: precision, FSDP, DeepSpeed. Whoever reads the command line sees none of it. zhibei reads its run file
    and nothing else, so what the launcher was told would be lost in silence.

    Fix: Start the run with `zhibei train`, and write what you want into the run file.

    其他程序的启动器要求了在这里不起作用的设置。

    为何：`accelerate launch` 会把用户目录下的配置与命令行合并，再通过环境变量传递精度、FSDP、DeepSpeed 等设置，从命令
    行上完全看不出来。 zhibei 只读取自己的运行文件，启动器的要求会无声地丢失。

    办法：用 `zhibei train` 启动，并把想要的设置写进运行文件。
    """
    asked = {
        name: value
        for name, value in facts.environment.variables.items()
        if name.startswith(LAUNCHER_PREFIXES) and value.lower() not in LAUNCHER_NOTHING
    }
    if asked:
        shown = ", ".join(f"{name}={value}" for name, value in sorted(asked.items())[:6])
        yield Finding(
            what=f"the launcher sets {shown}, and zhibei reads none of it",
            where="environment variables",
            to_do="start with zhibei train, and write what you want into the run file (model.precision, ...)",
            level="warning",
            evidence=tuple(f"{name}={value}" for name, value in sorted(asked.items())),
        )


@pitfall("config", cost="launch")
def output_directory_in_use(facts: Facts) -> Iterable[Finding]:
    """The run directory already holds something.

    Why: Other programs write over it, or find a checkpoint of some other run in it and "resume" that one: no step is
    trained, and the log says that training is complete.

    Fix: Choose another name (name=NEW on the command line), or go on with what is there: zhibei resume.

    运行目录里已经有内容。

    为何：其他程序会直接覆盖，或在其中发现别的训练的检查点并“恢复”它：一步也没有训练，日志却说训练完成。

    办法：换一个名字（命令行 name=NEW），或继续已有的训练：zhibei resume。
    """
    output = facts.output
    if output is None or not output.holds or facts.is_resumed:
        return
    remedy = f"continue it with: zhibei resume {output.path}; or choose another name: name=NEW"
    yield Finding(
        what=f"{output.path} exists already and holds {output.holds} ({', '.join(output.examples)})",
        where=facts.origin("name"),
        to_do=remedy if output.holds == "a run of zhibei" else "choose another name: name=NEW",
    )


@pitfall("config", cost="launch")
def output_directory_not_writable(facts: Facts) -> Iterable[Finding]:
    """The run directory cannot be made where it should be.

    Why: Many programs notice only when they write the first checkpoint or the finished model, after the whole run.

    Fix: Set runs: to a folder you can write, or change its permissions.

    运行目录无法在指定位置建立。

    为何：许多程序直到写第一个检查点或最终模型时才发现，训练早已跑完。

    办法：把 runs: 设为可写的文件夹，或修改其权限。
    """
    output = facts.output
    if output is not None and not output.is_writable:
        is_file = output.place.is_file()
        yield Finding(
            what=f"{output.path} cannot be made: {output.place} is {'a file' if is_file else 'not writable'}",
            where=facts.origin("runs"),
            to_do=f"set runs: to {'another folder' if is_file else 'a folder of yours, or make that one writable'}",
        )
