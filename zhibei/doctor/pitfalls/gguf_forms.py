"""What keeps the GGUF files that a run asks for from being made: decided before it trains. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.config.errors import UserError
from zhibei.config.hand_over import parts_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.hand_over import GGUF_PACKAGES
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.checkpoint import free_bytes, planned_disk, size
from zhibei.doctor.pitfalls.merge_export_forms import forms, without


def _of_the_tokenizer(facts: Facts, name: str) -> Iterable[Finding]:
    """What the exporter refused of the words, where it is the pitfall of this name."""
    refusal = facts.hand_over.tokenizer if facts.hand_over is not None else None
    asked = forms(facts, "gguf")
    if refusal is not None and refusal.pitfall == name and asked:
        yield Finding(
            what=f"hand_over asks for {', '.join(asked)}: {refusal.what}",
            where=refusal.where or facts.origin("hand_over"),
            to_do=f"take them out of hand_over, or: {refusal.fix}",
            changes=without(facts, asked),
        )


@pitfall(
    "gguf",
    cost="hours",
    errors=[
        r"failed to quantize: basic_ios::clear",
        r"basic_ios::clear: iostream error",
        r"llama_model_quantize: failed to quantize(?!.{0,80}requantiz)",
        r"gguf.{0,80}no space left on device",
    ],
    sources=[
        "https://github.com/unslothai/unsloth/pull/8500",
        "https://github.com/unslothai/unsloth/issues/835",
        "https://github.com/unslothai/unsloth/issues/1197",
    ],
)
def export_peak_disk_gguf(facts: Facts) -> Iterable[Finding]:
    """A GGUF export runs out of disk half-way, with a message about a stream.

    Why: Merged 16-bit weights, the 16-bit GGUF and the quantised one lie on the disk at the same time, about 5
    bytes per parameter; llama.cpp reports a full disk only as an iostream error.

    Fix: zhibei export quantises while it reads, writes no intermediate file, and asks for the room first. Elsewhere:
    export to a volume with room for all three, and delete each intermediate file once the next is verified.

    GGUF 导出到一半磁盘写满，报的却是流错误。

    为何：合并后的 16 位权重、16 位 GGUF 和量化后的 GGUF 同时占用磁盘，约每参数 5 字节；
    llama.cpp 只报告 iostream 错误。

    办法：zhibei export 边读边量化，不写中间文件，并且先检查空间。用别的程序时：
    导出到放得下三份文件的磁盘，每步校验后删除上一步的中间文件。
    """
    disk, free = planned_disk(facts), free_bytes(facts)
    if disk is None or free is None or not disk.handed_over_bytes:
        return
    if not max(disk.checkpoints_bytes, disk.finishing_bytes) <= free[0] < disk.finishing_bytes + disk.handed_over_bytes:
        return  # room for all, or too little for the run itself, which its own checks say
    yield Finding(
        what=f"hand_over ({', '.join(forms(facts))}) needs about {size(disk.handed_over_bytes)} beside the finished "
        f"model and its checkpoints, together {size(disk.finishing_bytes + disk.handed_over_bytes)}, and "
        f"{size(free[0])} are free",
        where=free[1],
        to_do="put runs: on a larger disk, ask for fewer forms, or export elsewhere afterwards (zhibei export --out)",
        changes=without(facts, forms(facts)),
    )


@pitfall(
    "gguf",
    cost="hours",
    errors=[
        r"no working quantizer found",
        r"(?:llama-quantize|quantize|convert(?:[-_]hf[-_]to[-_]gguf)?\.py).{0,80}(?:not found|no such"
        r" file|does not exist|command not found)",
        r"(?:can't open file|cannot find).{0,80}(?:convert\S*\.py|llama-quantize)",
        r"llama\.cpp.{0,60}(?:build failed|failed to (?:build|compile)|does not exist)",
        r"unsloth: .{0,60}(?:llama\.cpp|quantiz).{0,80}(?:fail|not|error)",
    ],
    sources=[
        "https://github.com/unslothai/unsloth/issues/3817",
        "https://github.com/unslothai/unsloth/issues/341",
        "https://github.com/unslothai/unsloth/issues/3928",
    ],
)
def export_toolchain_missing(facts: Facts) -> Iterable[Finding]:
    """The tools for a GGUF export are missing or have been renamed.

    Why: Exporters clone and build llama.cpp at the very end, which needs git, cmake and a compiler; its scripts
    were renamed more than once (convert.py, quantize to llama-quantize).

    Fix: zhibei export needs two packages and no compiler: pip install 'zhibei[gguf]'. Elsewhere: build a pinned
    llama.cpp and run llama-quantize --help before the training, not after it.

    GGUF 导出所需的工具缺失或已改名。

    为何：导出程序在最后才克隆并编译 llama.cpp，需要 git、cmake 和编译器；它的脚本也多次改名（convert.py，
    quantize 改为 llama-quantize）。

    办法：zhibei export 只需两个软件包，不用编译器：pip install 'zhibei[gguf]'。用别的程序时：
    在训练之前就编译好固定版本的 llama.cpp，并运行 llama-quantize --help 确认。
    """
    asked = forms(facts, "gguf")
    missing = [name for name in GGUF_PACKAGES if name not in facts.environment.packages]
    if asked and missing and not facts.machine.is_described:
        yield Finding(
            what=f"hand_over asks for {', '.join(asked)}, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not installed",
            where=facts.origin("hand_over"),
            to_do="pip install 'zhibei[gguf]'",
        )


@pitfall(
    "gguf",
    cost="run",
    errors=[
        r"Model \w+ is not supported",
        r"NotImplementedError: Architecture '?\w+'? not supported",
        r"unknown model architecture: ",
        r"model architecture .{0,40}not supported",
        r"Conversion impossible",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/13421",
        "https://github.com/ggml-org/llama.cpp/issues/17197",
    ],
)
def gguf_arch_unsupported(facts: Facts) -> Iterable[Finding]:
    """llama.cpp knows no such architecture, so the trained model cannot become a GGUF.

    Why: The converter has a list of architectures and tokenizers; a base outside of it fails at the very end, or
    loads only in a newer llama.cpp than the one installed.

    Fix: Convert the untrained base first. If it fails, update llama.cpp, choose another base, or serve with another
    program.

    llama.cpp 不认识该结构，训练好的模型无法转成 GGUF。

    为何：转换器只支持列表中的结构和分词器；不在其中的基座会在最后一步失败，或只能用更新的 llama.cpp 加载。

    办法：先转换未训练的基座试一下；失败就升级 llama.cpp、换基座或换推理程序。
    """
    asked, model = forms(facts, "gguf"), facts.model
    if not asked or model is None or not model.config or model.quant_method:
        return  # a quantised base is refused by name elsewhere
    from zhibei.export.gguf.families import family_of

    try:
        family_of(model.config, where=f"{model.folder or model.path}/config.json")
    except UserError as refusal:
        yield Finding(
            what=f"hand_over asks for {', '.join(asked)}: {refusal.what}",
            where=refusal.where,
            to_do=f"take them out of hand_over; {refusal.fix}",
            changes=without(facts, asked),
        )


@pitfall(
    "gguf",
    cost="run",
    errors=[
        r"BPE pre-tokenizer was not recognized",
        r"get_vocab_base_pre\(\)",
        r"unknown pre-tokenizer type",
        r"missing (?:or unrecognized )?pre-tokenizer type",
    ],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/8649",
        "https://github.com/ggml-org/llama.cpp/issues/9927",
        "https://github.com/ggml-org/llama.cpp/issues/22700",
    ],
)
def gguf_pretokenizer_hash_unknown(facts: Facts) -> Iterable[Finding]:
    """llama.cpp does not recognise how the tokenizer splits text.

    Why: It knows families by a hash over the ids of a test text; an added token or another version of tokenizers
    changes the hash although the family is supported.

    Fix: Convert with the base's tokenizer files plus added_tokens.json, or update llama.cpp; a quick vocab-only
    conversion before the training shows it.

    llama.cpp 不认识分词器的切分方式。

    为何：它用测试文本编号的哈希识别系列；加了一个词元或换了 tokenizers 版本，哈希就变了，尽管系列本身受支持。

    办法：用基座的分词器文件加 added_tokens.json 转换，或升级 llama.cpp；训练前做一次只含词表的转换就能发现。
    """
    yield from _of_the_tokenizer(facts, "gguf-pretokenizer-hash-unknown")


@pitfall(
    "gguf",
    cost="hours",
    errors=[r"error loading model vocabulary: unknown tokenizer"],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/1764",
        "https://github.com/intel/auto-round/issues/946",
    ],
)
def gguf_tokenizer_without_engine(facts: Facts) -> Iterable[Finding]:
    """The tokenizer is of a kind that llama.cpp has no engine for.

    Why: The GGUF files made here hold sentencepiece's BPE with byte fallback, or BPE over bytes. A Unigram or WordPiece
    vocabulary, or BPE over characters, would be read as other tokens there, or not at all.

    Fix: Take gguf out of hand_over and serve the Hugging Face folder (`zhibei serve`), or begin with a base whose
    tokenizer llama.cpp knows.

    llama.cpp 没有能处理这种分词器的引擎。

    为何：这里写出的 GGUF 只容纳带字节回退的 sentencepiece BPE，或字节级 BPE。Unigram、WordPiece 或字符级 BPE 的词表在那
    里会被读成别的词元，或根本读不了。

    办法：从 hand_over 中去掉 gguf，直接用 Hugging Face 文件夹提供服务（`zhibei serve`），或换用 llama.cpp 认识其分词器
    的基座。
    """
    yield from _of_the_tokenizer(facts, "gguf-tokenizer-without-engine")


@pitfall(
    "gguf",
    cost="minutes",
    errors=[r"tensor cols \d+ x \d+ are not divisible by", r"not divisible by 256.{0,60}(?:fallback|falling back)"],
    sources=[
        "https://github.com/ggml-org/llama.cpp/issues/6614",
        "https://github.com/ggml-org/llama.cpp/pull/1921",
    ],
)
def gguf_rows_no_multiple_of_block(facts: Facts) -> Iterable[Finding]:
    """A GGUF type of small blocks is asked for, and rows of this model are no multiple of its block.

    Why: K and IQ types hold 256 values in a block. Matrices whose rows are no multiple of that are written in another
    type, mostly of more bits, so that the file is larger than its name says, and some of it loses more.

    Fix: Nothing has to be done. On such a model gguf:Q8_0 (blocks of 32) or gguf:F16 costs little more and loses less.

    要求用分块的 GGUF 类型，而模型矩阵的行长不是块长的整数倍。

    为何：K 与 IQ 类型每块 256 个值。行长不是其整数倍的矩阵会改用别的类型，多数位数更高，于是文件比类型名所说的大，部分
    矩阵损失也更多。

    办法：不必处理。这种模型上 gguf:Q8_0（每块 32 个值）或 gguf:F16 只大一点，损失更小。
    """
    asked, model = forms(facts, "gguf"), facts.model
    if not asked or model is None:
        return
    from zhibei.export.gguf.kinds import BLOCKS, KINDS, PLAIN, fitting

    widths = {name: model.config.get(name) for name in ("hidden_size", "intermediate_size")}
    told = []
    for form in asked:
        kind = KINDS[parts_of(form)[1]]
        block = BLOCKS.get(kind.type, 256)
        odd = {name: width for name, width in widths.items() if isinstance(width, int) and width % block}
        if kind.name not in PLAIN and odd:
            instead = ", ".join(f"{name} {width:,} as {fitting(kind.type, width)}" for name, width in odd.items())
            told.append(f"{form} has blocks of {block} values, and rows are written otherwise: {instead}")
    if told:
        yield Finding(
            what=f"{model.path}: {told[0]}",
            where=facts.origin("hand_over"),
            to_do="nothing, if larger files are no matter; gguf:F16 is written as its name says",
            level="warning",
            evidence=tuple(told[1:]),
        )
