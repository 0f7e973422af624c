"""Pitfalls of the model's own files: damaged, incomplete, dead or wild weights. Knows no tokenizer and no rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

MOST_NAMED = 4


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


@pitfall(
    "model",
    cost="run",
    errors=[
        r"tensors? hold(?:s)? NaN or infinity",
        r"(?:weights?|parameters?|tensors?) (?:contains?|has|have|with) (?:nan|inf)",
    ],
)
def weights_not_finite(facts: Facts) -> Iterable[Finding]:
    """The base weights hold NaN or infinity.

    Why: One such value in the weights makes every loss NaN. Trainers that filter NaN out of their logs show a loss of
    zero instead, run to the end and save a model in which every weight is NaN.

    Fix: Fetch the weights again, or go back to an earlier checkpoint if you trained them; `zhibei verify PATH` counts
    the broken values in every tensor.

    基座权重中含有 NaN 或无穷大。

    为何：只要权重里有一个这样的数，每一步的损失都会是 NaN。有些训练器在日志里滤掉 NaN，于是显示损失为零，
    训练照常结束，
    存下来的模型所有权重都是 NaN。

    办法：重新获取权重；若是自己训练的，退回更早的检查点。`zhibei verify 路径` 会列出每个张量里坏掉的数。
    """
    model = facts.model
    if model is None or not model.non_finite:
        return
    yield Finding(
        what=f"{len(model.non_finite)} of {len(model.tensors)} tensors hold NaN or infinity: {named(model.non_finite)}",
        where=str(model.folder or model.path),
        to_do=f"get these weights again (an earlier checkpoint, or a new download); count them with: zhibei verify "
        f"{model.folder or model.path}",
        evidence=model.non_finite,
    )


@pitfall(
    "model",
    cost="launch",
    errors=[
        r"MetadataIncompleteBuffer|HeaderTooLarge|InvalidHeaderDeserialization|incomplete metadata",
        r"Error while deserializing header",
        r"PytorchStreamReader failed|failed finding central directory|file in archive is not in a subdirectory",
        r"does not appear to have (?:a file named|files named) .*(?:safetensors|pytorch_model)",
        r"Error no file named .*(?:safetensors|pytorch_model\.bin)",
    ],
)
def weights_incomplete(facts: Facts) -> Iterable[Finding]:
    """A weight file is missing, cut short, or does not fit its index.

    Why: A download that broke off, a full disk or a copy of half a folder leaves files that look right by name.
    Loading fails minutes later with a message about a header, or fills the missing tensors with random values.

    Fix: Copy or download the named files again. Folders with pickled weights only (.bin, .pt) must be converted to
    safetensors where you trust them, since opening a pickle can run any program.

    权重文件缺失、被截断，或与索引不符。

    为何：下载中断、磁盘写满、只复制了一半的文件夹，留下的文件名字看上去都对。几分钟后加载才失败，报错只提到文件头；
    或者缺少的张量被随机数填上。

    办法：重新复制或下载所指出的文件。只有 pickle 权重（.bin、.pt）的文件夹，要先在可信的环境里转成 safetensors，
    因为打开 pickle 可能运行任意程序。
    """
    model = facts.model
    if model is None or model.folder is None:
        return
    for fault in model.weight_faults:
        place, _, what = fault.partition(": ")
        yield Finding(what=what or fault, where=place, to_do="copy or download this file again, from the same source")
    told = " ".join(model.weight_faults)
    for name in model.missing_files:
        if name not in told:
            yield Finding(
                what=f"{name} is missing, which the index names",
                where=str(model.folder),
                to_do="copy or download this file again, from the same source",
            )
    if not model.tensors and not model.weight_faults and not model.missing_files:
        pickles = model.pickled_files
        yield Finding(
            what=f"only pickled weights ({named(pickles)})" if pickles else "no file of weights",
            where=str(model.folder),
            to_do="convert them to safetensors where you trust them; pickles are never opened here"
            if pickles
            else "copy or download model.safetensors (or its shards and their index) into this folder",
        )


@pitfall("model", cost="launch")
def weights_do_not_fit_config(facts: Facts) -> Iterable[Finding]:
    """The tensors in the files are not those that config.json promises.

    Why: A config.json of another size or family, a missing layer or a replaced embedding is loaded by some programs
    with fresh random values in place of what is missing, and trained as if it were the pretrained model.

    Fix: Take config.json and the weights from the same source, whole.

    权重文件中的张量与 config.json 所述不符。

    为何：config.json 属于另一个尺寸或系列、少了一层、换过词嵌入时，有的程序会用随机数补上缺失的部分，
    然后把它当作预训练模型来训练。

    办法：config.json 与权重取自同一来源，并且完整。
    """
    model = facts.model
    if model is None or not model.shape_faults:
        return
    more = len(model.shape_faults) - 1
    others = f" (and {more} more {'difference' if more == 1 else 'differences'})" if more else ""
    yield Finding(
        what=f"config.json and the weights do not belong together: {model.shape_faults[0]}{others}",
        where=str(model.folder or model.path),
        to_do="take config.json and all weight files from the same source again",
        evidence=model.shape_faults,
    )


@pitfall("model", cost="run")
def weights_all_zero(facts: Facts) -> Iterable[Finding]:
    """A weight matrix holds nothing but zeros.

    Why: An export from sharded training that gathered nothing, or an allocation that was never filled, leaves zeros
    of the right shape. Every check of names and sizes passes, and the layer passes nothing on.

    Fix: Get the weights from where they are complete. Blocks that were inserted as zeros on purpose (block expansion)
    are the exception: then add `weights-all-zero` to `accept`.

    某个权重矩阵全是零。

    为何：分片训练导出时没有收集到数据，或分配后从未写入，都会留下形状正确的零。名称和大小的检查都能通过，
    而这一层什么也传不下去。

    办法：从完整的来源重新取得权重。若是有意插入的全零层（块扩展），请在 `accept` 里写上 `weights-all-zero`。
    """
    model = facts.model
    if model is None or not model.zero_tensors:
        return
    yield Finding(
        what=f"{len(model.zero_tensors)} matrices are all zero: {named(model.zero_tensors)}",
        where=str(model.folder or model.path),
        to_do="get the weights from a complete source; if the zeros are meant, set accept: [weights-all-zero]",
        evidence=model.zero_tensors,
    )


@pitfall("model", cost="run")
def weights_far_too_large(facts: Facts) -> Iterable[Finding]:
    """Weights are larger than any trained model's.

    Why: Values beyond ten thousand come from a diverged run, bytes read as another dtype, or weights quantised with a
    scale that was left out. They are finite, so they load, and the first loss is enormous.

    Fix: Look at the named tensors; convert or fetch the weights again, or take an earlier checkpoint.

    权重的数值比任何训练好的模型都大。

    为何：超过一万的数来自已经发散的训练、按错误的类型读取的字节，或漏掉了缩放系数的量化权重。它们是有限数，
    所以能加载，而第一步的损失就极大。

    办法：查看所列张量；重新转换或获取权重，或改用更早的检查点。
    """
    model = facts.model
    if model is None or not model.wild_tensors:
        return
    worst = max(model.wild_tensors, key=lambda name: model.wild_tensors[name])
    yield Finding(
        what=f"{len(model.wild_tensors)} tensors hold values beyond 10,000; {worst} reaches "
        f"{model.wild_tensors[worst]:.3g}",
        where=str(model.folder or model.path),
        to_do="get or convert these weights again, or go back to a checkpoint from before the run diverged",
        level="warning",
    )
