"""Pitfalls of a tokenizer and a model that do not belong together, or that say different things about one id."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.tokenizer import as_ids, parents, special_differences

MOST_UNUSED_SHARE = 0.10
MOST_UNUSED_ROWS = 32
"""Embeddings are padded to round numbers: by at most 4 in 100 in the models known to us."""


@pitfall("tokenizer", cost="run")
def tokenizer_of_another_model(facts: Facts) -> Iterable[Finding]:
    """The tokenizer belongs to another model.

    Why: Ids are row numbers. With another vocabulary every word is looked up in the row of a different one: the run
    starts, the loss falls from a higher value, and what was learned in pretraining is lost.

    Fix: Remove model.tokenizer, or name the tokenizer that the weights were trained with.

    分词器属于另一个模型。

    为何：编号就是行号。换了词表，每个词查到的都是别的词的行：训练照常开始，损失从更高处下降，而预训练所学都丢了。

    办法：删去 model.tokenizer，或指明训练这些权重时所用的分词器。
    """
    tokenizer, model = facts.tokenizer, facts.model
    if tokenizer is None or model is None:
        return
    to_do = "remove model.tokenizer, or name the tokenizer that these weights were trained with"
    where = facts.origin("model.tokenizer") if facts.run.model.tokenizer else tokenizer.source
    if tokenizer.other_than_models:
        yield Finding(what=tokenizer.other_than_models, where=where, to_do=to_do)
        return
    rows, used = model.embedding_rows, tokenizer.highest_id + 1
    if rows is not None and rows - used > max(MOST_UNUSED_ROWS, MOST_UNUSED_SHARE * rows):
        yield Finding(
            what=f"the tokenizer has {used:,} ids, and the model {rows:,} embedding rows: "
            f"{(rows - used) / rows:.0%} of them could never be used",
            where=where,
            to_do=to_do,
        )


@pitfall(
    "tokenizer",
    cost="run",
    sources=["https://github.com/tloen/alpaca-lora/issues/279"],
)
def train_infer_special_ids_disagree(facts: Facts) -> Iterable[Finding]:
    """Training and inference use other special ids.

    Why: One script takes ids from the tokenizer, the next from config.json, a third sets them by hand. The model
    learns to end with one token and is stopped at another, so answers end in `<unk>` or not at all.

    Fix: One source: the tokenizer. Correct generation_config.json of the base to its ids; continue a run with the
    tokenizer it was trained with.

    训练与推理使用的特殊符号编号不同。

    为何：一个脚本从分词器取编号，另一个从 config.json 取，第三个手工指定。模型学会用一个符号结束，
    却在另一个符号处被停，
    于是回答以 `<unk>` 收尾，或停不下来。

    办法：只认一个来源，即分词器。把基座的 generation_config.json 改成它的编号；继续训练时用当初的分词器。
    """
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return
    for place, manifest in parents(facts):
        for what in special_differences(tokenizer, manifest):
            yield Finding(
                what=f"the id of {what} ({place})",
                where=tokenizer.source,
                to_do="use the tokenizer in the folder of the trained model",
            )
    config = tokenizer.declared_ids.get("config.json", {})
    generation = tokenizer.declared_ids.get("generation_config.json", {})
    for name in ("bos", "eos"):
        mine, theirs = tokenizer.ids.get(name), as_ids(generation.get(name))
        is_told = bool(as_ids(config.get(name))) and mine not in as_ids(config.get(name))
        if mine is None or not theirs or mine in theirs or is_told:
            continue
        folder = facts.model.folder if facts.model and facts.model.folder else tokenizer.source
        yield Finding(
            what=f"{name}_token_id is {', '.join(map(str, theirs))}, and the tokenizer's "
            f"{getattr(tokenizer, name)!r} has id {mine}",
            where=f"{folder}/generation_config.json",
            to_do=f"put {mine} into {name}_token_id there",
            level="stop" if name == "eos" or tokenizer.adds_bos else "warning",
        )
