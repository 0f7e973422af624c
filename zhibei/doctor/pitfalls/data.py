"""Pits of training data that comparing and counting all rows shows. Knows counts, not rows, tokenizers or files."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.data.remedies import remedy_of
from zhibei.doctor.counts import counted, first_place, found_in_rows, kept, noun_of, rows_of, share
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

# Rules of zhibei.data.clean whose hits are faults of the data rather than matters of taste.
NOISE = (
    "placeholder_answer", "no_input_phrase", "merged_instructions", "service_message", "digit_flood",
    "wrong_arithmetic", "empty_code", "repeated_lines", "replacement_characters", "mojibake",
)  # fmt: skip
MARKUP = ("html_remnants", "escaped_characters")
# The share from which a fault of the data shows in what a model says. The original Alpaca data (52,002 rows), whose
# cleaning was worth a project of its own, holds 2 to 3 % of such rows; sets that were cleaned hold below 1 %.
NOISE_SHARE, NOISE_ROWS = 0.01, 50
MARKUP_SHARE, MARKERS_SHARE = 0.02, 0.05
LEAST_HITS = 3
DROPPED_SHARE = 0.05
REPEATED_SHARE, REPEATED_LEAST = 0.1, 2
# So many were never meant: a file joined twice, a source named twice, dialogues that nobody split.
REPEATED_STOP, MARKERS_STOP = 0.25, 0.3
LEAKED_SHARE, ASKED_SHARE, ASKED_OF_ALL, ASKED_LEAST = 0.01, 0.3, 0.8, 10


@pitfall(
    "data",
    cost="run",
    sources=[
        "https://github.com/tloen/alpaca-lora/pull/32",
        "https://github.com/tloen/alpaca-lora/issues/65",
        "https://github.com/gururise/AlpacaDataCleaned/pull/1",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/177",
    ],
)
def alpaca_data_noise(facts: Facts) -> Iterable[Finding]:
    """Many rows hold placeholders, merged tasks, dead links or wrong sums.

    Why: Data that a model wrote contains answers such as "N/A", the word <noinput>, two tasks in one row, pages that
    cannot be opened and sums that are wrong. A fine-tuned model repeats these habits, and no loss curve shows them.

    Fix: Look at the rows with `zhibei data inspect FILE`, repair or remove them, or use a cleaned edition of the data.

    许多行含有占位答案、混在一起的任务、打不开的链接或算错的数。

    为何：由模型生成的数据里常有“N/A”一类的回答、<noinput> 字样、一行里两个任务、无法访问的网页和错误的算式。微调后的
    模型会重复这些毛病，而任何损失曲线都看不出来。

    办法：用 `zhibei data inspect 文件` 查看这些行，修正或删除，或改用清洗过的版本。
    """
    rows = rows_of(facts)
    if rows is None:
        return
    found = {name: rows.suspicious[name] for name in NOISE if name in rows.suspicious and rows.suspicious[name].count}
    total, hits = kept(rows.audit), sum(seen.count for seen in found.values())
    if hits < LEAST_HITS or (share(hits, total) < NOISE_SHARE and hits < NOISE_ROWS):
        return
    if share(hits, total) < NOISE_SHARE / 10:
        return
    worst = max(found, key=lambda name: found[name].count)
    counts = ", ".join(
        f"{name.replace('_', ' ')} {seen.count}" for name, seen in sorted(found.items(), key=lambda one: -one[1].count)
    )
    yield Finding(
        what=f"{counted(hits, total, noun_of(facts))} look faulty: {counts}",
        where=first_place(found[worst], "data.sources"),
        to_do="look at them with `zhibei data inspect FILE`, and repair or remove them",
        level="warning",
        evidence=tuple(place for seen in found.values() for place in seen.places[:2]),
    )


@pitfall(
    "data",
    cost="minutes",
    errors=[
        r"\bStopIteration\b.{0,80}next\(iter\(|^StopIteration\b",
        r"no row is left to train on",
        r"num_samples should be a positive integer value, but got num_samples=0",
        r"dataset (?:is empty|has (?:no|0) (?:rows|examples|samples))\b",
        r"ValueError: .{0,40}empty dataset",
    ],
    sources=["https://github.com/hiyouga/LlamaFactory/issues/5810"],
)
def dataset_all_rows_dropped(facts: Facts) -> Iterable[Finding]:
    """A large part of the records never reaches training.

    Why: Rows that are too long, broken or without an answer are filtered out. Where that is many of them, the mapping
    of fields, the template or the length limit is usually wrong, and the run learns from a remainder that nobody chose.

    Fix: Read the counts per reason in the audit and the ledger; correct the fields (`columns`), raise data.max_tokens,
    or set data.too_long: cut.

    很大一部分记录根本没有进入训练。

    为何：过长、损坏或没有答案的行会被过滤掉。若数量很多，通常是字段对应、模板或长度上限弄错了，训练用的只是没人挑选过的剩余部分。

    办法：看审计与台账里按原因列出的数目；改正字段（`columns`）、增大 data.max_tokens，或设 data.too_long: cut。
    """
    rows = rows_of(facts)
    if rows is None:
        return
    read, dropped = int(rows.audit.get("rows_read", 0)), dict(rows.audit.get("dropped", {}))
    # Told by checks of their own: what labels and templates leave out, and rows that the validation file holds too.
    for told in ("in_validation", *(("too_long", "nothing_learned", "template") if facts.rows is not None else ())):
        dropped.pop(told, None)
    total = sum(dropped.values())
    if total < LEAST_HITS or share(total, read) < DROPPED_SHARE:
        return
    reasons = ", ".join(f"{reason.replace('_', ' ')} {number}" for reason, number in dropped.items())
    example = next((entry for entry in rows.ledger if entry.get("reason") in dropped), None)
    yield Finding(
        what=f"{counted(total, read, noun_of(facts))} are dropped: {reasons}"
        + (f"; e.g. {example['detail']}" if example else ""),
        where=str(example["where"]) if example else "data",
        to_do=remedy_of(dropped, kind=str(rows.audit.get("kind", ""))),
        level="warning",
    )


@pitfall(
    "data",
    cost="run",
    sources=["https://github.com/hiyouga/LlamaFactory/issues/1332"],
)
def dataset_whole_dialogue_in_instruction(facts: Facts) -> Iterable[Finding]:
    """Whole dialogues stand in one field, with speakers' names or special tokens inside of the text.

    Why: Turns that were not split become one long question; the model learns to write the user's turns too, or to
    treat "Human:" as a word of an answer, and does not stop where it should.

    Fix: Split the text into turns (formats sharegpt or openai), or name the right fields with `columns`.

    整段对话被塞进一个字段，文本里带着说话人名字或特殊词元。

    为何：没有切分的轮次变成一个很长的问题；模型会连用户的话也一起写，或把“Human:”当作回答里的词，该停时停不下来。

    办法：把文本切成轮次（sharegpt 或 openai 格式），或用 `columns` 指明正确的字段。
    """
    rows = rows_of(facts)
    marked = rows.suspicious.get("role_markers") if rows is not None else None
    if rows is None or marked is None:
        return
    total = max(kept(rows.audit), int(rows.audit.get("rows_read", 0)))
    if marked.count >= LEAST_HITS and share(marked.count, total) >= MARKERS_SHARE:
        yield found_in_rows(
            marked,
            what=f"{counted(marked.count, total, noun_of(facts))} hold speakers' names or special tokens inside of one "
            "turn",
            to_do="split the text into turns (`zhibei data formats`), or name the right fields with columns",
            level="stop" if share(marked.count, total) >= MARKERS_STOP else "warning",
        )


@pitfall("data", cost="run", sources=["https://github.com/lm-sys/FastChat/issues/2462"])
def markup_artefacts_in_answers(facts: Facts) -> Iterable[Finding]:
    """Answers carry the remains of a web page: HTML tags, entities, written-out escapes.

    Why: Conversations that were copied from a page keep "&lt;", "<div", "\\\\_" or "Copy code". The model learns to
    write them, in code most of all, where they break it.

    Fix: Convert the HTML again or clean the answers; then look at the share again with `zhibei data inspect`.

    回答里残留着网页痕迹：HTML 标签、实体、未还原的转义符。

    为何：从网页复制来的对话会保留“&lt;”“<div”“\\\\_”或“Copy code”。模型会学着写出来，代码尤其会因此出错。

    办法：重新转换 HTML 或清洗回答，然后用 `zhibei data inspect` 再看占比。
    """
    rows = rows_of(facts)
    if rows is None:
        return
    found = {name: rows.suspicious[name] for name in MARKUP if name in rows.suspicious}
    total, hits = kept(rows.audit), sum(seen.count for seen in found.values())
    if hits >= LEAST_HITS and share(hits, total) >= MARKUP_SHARE:
        worst = max(found, key=lambda name: found[name].count)
        yield Finding(
            what=f"{counted(hits, total, noun_of(facts))} hold remains of markup: "
            + ", ".join(f"{name.replace('_', ' ')} {seen.count}" for name, seen in found.items()),
            where=first_place(found[worst], "data.sources"),
            to_do="convert the HTML again, or clean the answers",
            level="warning",
            evidence=found[worst].places,
        )


@pitfall(
    "data",
    cost="run",
    sources=[
        "https://github.com/huggingface/datasets/issues/4261",
        "https://github.com/ai-forever/ru-gpts/issues/23",
        "https://github.com/TIGER-AI-Lab/MAmmoTH/issues/11",
        "https://github.com/embeddings-benchmark/mteb/issues/1036",
        "https://github.com/huggingface/open-r1/pull/416",
    ],
)
def train_val_leakage_duplicates(facts: Facts) -> Iterable[Finding]:
    """Held-out rows are also trained on, so the held-out loss flatters.

    Why: A validation file cut from the same rows, or a split made after rows were repeated, puts the same text on both
    sides. The best checkpoint is then the one that has learned the rows by heart. Rows that say the same word for word
    are kept on one side here, and rows of a validation file are taken out of training; what differs only in case or
    spacing, or asks the same question, is counted.

    Fix: Remove repeated rows before splitting, or give a validation file from another source.

    留出的行也在训练里，留出损失因而好看得不真实。

    为何：验证文件取自同一批行，或先重复再划分，都会让同样的文本落在两边。于是“最佳”检查点只是背得最熟的那个。这里逐字相同的行
    总在同一边，验证文件里的行会从训练中取出；仅大小写或空白不同、或问题相同的行会被统计出来。

    办法：划分之前先去重，或换用来源不同的验证文件。
    """
    rows = rows_of(facts)
    if rows is None:
        return
    held, leaked, asked = int(rows.audit.get("rows_heldout", 0)), rows.heldout_in_training, rows.asked_in_training
    is_file = isinstance(facts.run.data.validation, str)
    where = facts.origin("data.validation")
    taken = int(rows.audit.get("dropped", {}).get("in_validation", 0))
    if leaked.count and (is_file or share(leaked.count, held) >= LEAKED_SHARE):
        what = f"{leaked.count:,} training {noun_of(facts)} say what held-out ones say" + (
            f" ({taken:,} of them were therefore taken out of training)" if taken else ""
        )
        yield Finding(
            what=what,
            where=first_place(leaked, where),
            to_do="remove them from the training files, or choose another data.validation",
            level="warning",
            evidence=leaked.places,
        )
    least = ASKED_LEAST if share(asked.count, held) < ASKED_OF_ALL else ASKED_LEAST // 2
    if asked.count >= least and share(asked.count, held) >= ASKED_SHARE:
        yield found_in_rows(
            asked,
            what=f"{counted(asked.count, held, 'held-out ' + noun_of(facts))} ask what is also asked in training",
            to_do="hold out whole questions: give a validation file whose questions are not trained on",
            place=where,
        )


@pitfall("data", cost="run")
def rows_repeated(facts: Facts) -> Iterable[Finding]:
    """The same rows stand in the data several times.

    Why: A file that was joined twice, or two sources that overlap, weighs some rows more than anybody decided, brings
    learning by heart forward and makes an epoch longer than it need be. Other programs count nothing.

    Fix: Remove the repetitions; where more weight is meant, give the source a `weight`.

    同样的行在数据里出现多次。

    为何：文件被拼接两次，或两个来源重叠，会让一部分行获得没人决定过的额外权重，更早开始死记，也让每一轮变长。其他程序对此毫无提示。

    办法：去掉重复；若确实想加大权重，请为来源设 `weight`。
    """
    rows = rows_of(facts)
    if rows is None:
        return
    total = kept(rows.audit)
    if rows.duplicates.count >= REPEATED_LEAST and share(rows.duplicates.count, total) >= REPEATED_SHARE:
        yield found_in_rows(
            rows.duplicates,
            what=f"{counted(rows.duplicates.count, total, noun_of(facts))} say what an earlier one says",
            to_do="remove the repetitions, or say with a source's `weight` that they are meant",
            level="stop" if share(rows.duplicates.count, total) >= REPEATED_STOP else "warning",
        )
