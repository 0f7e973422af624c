"""Pits of training data that are met while records are read, and fields that are read crosswise. Knows no rows."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.config.policy import PolicySection
from zhibei.config.run import Source
from zhibei.doctor.counts import noun_of, rows_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

QUESTION_NAMES = {"question", "prompt", "instruction", "query", "input", "ask", "problem", "user", "human"}
ANSWER_NAMES = {"answer", "output", "response", "completion", "reply", "solution", "assistant", "gpt", "target"}
BETTER_NAMES = {"chosen", "better", "good", "preferred", "win", "winner", "positive", "accepted", "best", "upvoted"}
WORSE_NAMES = {"rejected", "worse", "bad", "dispreferred", "lose", "loser", "negative", "refused", "worst", "downvoted"}
AXES = ((QUESTION_NAMES, ANSWER_NAMES), (BETTER_NAMES, WORSE_NAMES))
READERS = "tests/data/test_readers.py"
PREPARED = "tests/data/test_prepare.py"


@pitfall("data", cost="run")
def columns_mapped_crosswise(facts: Facts) -> Iterable[Finding]:
    """`columns` gives one side of the data the field whose name says the other side.

    Why: With chosen and rejected exchanged a model learns to prefer what people disliked; with question and answer
    exchanged it learns to ask. Everything trains, the loss falls, and only the finished model shows it.

    Fix: Exchange the two names in `columns`; `columns` maps {our name: name in the file}.

    `columns` 把名字表明是另一边的字段当成了这一边。

    为何：chosen 与 rejected 对调，模型会偏好人们不喜欢的回答；问与答对调，模型会学着提问。训练照常、损失下降，
    直到最后才看得出来。

    办法：在 `columns` 中把两个名字换过来；写法是 {我们的名字: 文件中的名字}。
    """
    if facts.resolved is None:
        return
    for number, source in enumerate(facts.run.data.sources):
        if not isinstance(source, Source):
            continue
        for ours, theirs in source.columns.items():
            if any(_says(ours, axis) and _says(theirs, axis) == -_says(ours, axis) for axis in AXES):
                yield Finding(
                    what=f"data.sources[{number}].columns reads {ours!r} from the field {theirs!r}, whose name says "
                    "the opposite",
                    where=facts.origin("data.sources"),
                    to_do="exchange the two names in columns: {our name: name in the file}",
                )
                break


def _says(name: str, axis: tuple[set[str], set[str]]) -> int:
    """1 or -1: which side of the axis a field's name speaks of; 0: neither, or both."""
    words = set(name.lower().replace("-", "_").replace(".", "_").split("_"))
    return bool(words & axis[0]) - bool(words & axis[1])


@pitfall(
    "data",
    cost="minutes",
    errors=[r"training rows are fewer than one optimiser step", r"fewer (?:rows|samples|examples) than .{0,30}batch"],
)
def fewer_rows_than_a_batch(facts: Facts) -> Iterable[Finding]:
    """There are fewer training rows than one optimiser step takes.

    Why: Other programs repeat rows or make one short step and report success; the model they save has learned nothing,
    or a few rows by heart.

    Fix: Lower global_batch, hold out less, or bring more rows.

    训练行数不足一个优化步所需。

    为何：其他程序会重复这些行，或只走一个不完整的步就报告成功；保存下来的模型要么什么也没学到，要么只背下了几行。

    办法：减小 global_batch、少留出一些，或增加数据。
    """
    if facts.resolved is None:
        return
    rows, training, stage = rows_of(facts), facts.run.training, facts.run.stage
    trained = int(rows.audit.get("rows_train", 0)) if rows is not None else 0
    # A policy may answer the same prompt again and again: its answers are new each time.
    if not isinstance(training, PolicySection) and 0 < trained < training.global_batch:
        yield Finding(
            what=f"{trained} training {noun_of(facts)} are fewer than one optimiser step takes "
            f"({stage}.global_batch: {training.global_batch})",
            where=facts.origin(f"{stage}.global_batch"),
            to_do=f"set {stage}.global_batch: {max(1, trained // 4)}, lower data.validation, or add rows",
            changes={f"{stage}.global_batch": max(1, trained // 4)},
        )


@pitfall(
    "data",
    cost="minutes",
    kind="gate",
    proof=[
        "tests/data/test_pairs.py::test_records_of_another_stage_are_refused_and_the_fitting_stage_is_named",
        "tests/data/test_pairs.py::test_supervised_training_refuses_what_has_no_answer_to_imitate",
    ],
    errors=[r"KeyError: '(?:chosen|rejected)'"],
)
def records_of_another_stage() -> None:
    """The records are made for another stage than the one that is run.

    Why: Pairs of answers, single answers with a label, prompts without answers and conversations are four kinds of
    data. A tool that reads the fields it knows trains on half of a record or on the word None.

    Fix: Set `stage` to what the error names, or give data of the right kind.

    记录是为另一个阶段准备的。

    为何：成对回答、带标签的单个回答、没有回答的提示和对话是四种不同的数据。只读自己认识的字段的工具，会拿半条记录甚至“None”一词去训练。

    办法：按报错把 `stage` 改成相应的阶段，或换用正确类型的数据。
    """


@pitfall(
    "data",
    cost="run",
    kind="gate",
    proof=[
        f"{READERS}::test_what_is_wrong_with_a_record",
        f"{PREPARED}::test_broken_records_are_in_the_ledger_with_field_and_remedy",
    ],
)
def empty_answers() -> None:
    """An answer is empty.

    Why: A model that is shown empty answers learns to stop at once; as the rejected side of a pair an empty answer
    teaches only that something is better than nothing, and the falling loss looks like success.

    Fix: Fill the answer, remove the record, or set data.on_error: drop, which lists every such record in the ledger.

    回答是空的。

    为何：模型看到空回答会学着立刻停止；作为成对数据里被拒绝的一方，空回答只教会“有总比没有好”，而下降的损失看起来像成功。

    办法：补上回答、删除该记录，或设 data.on_error: drop（所有这类记录都会列入台账）。
    """


@pitfall(
    "data",
    cost="minutes",
    kind="gate",
    proof=[
        "tests/config/test_read_faults.py::test_faults_inside_a_source_name_its_number",
        f"{READERS}::test_ambiguous_and_unknown_fields_name_the_candidates",
    ],
    errors=[
        r"KeyError: '?(?:instruction|conversations)'?",
        r"undefined dataset",
        r"unknown (?:dataset|data) format",
    ],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/7577",
        "https://github.com/hiyouga/LlamaFactory/issues/5503",
    ],
)
def dataset_format_key_ignored() -> None:
    """A misspelt key in the description of the data is ignored, and the data are read as another format.

    Why: Where unknown keys are skipped, `format` instead of `formatting` leaves the default format in force, and the
    error that follows speaks of a field nobody wrote.

    Fix: Here every unknown key of a source is refused with the nearest right one, and the format is recognised from
    the fields of the rows; name it with `format` only where two fit.

    数据描述里拼错的键被忽略，数据按另一种格式读取。

    为何：若未知的键被跳过，把 `formatting` 写成 `format` 就会沿用默认格式，接下来的报错谈的是谁也没写过的字段。

    办法：这里来源中的任何未知键都会被拒绝并给出最接近的正确写法，格式由字段自动识别；只有两种都像时才需写 `format`。
    """


@pitfall(
    "data",
    cost="minutes",
    kind="gate",
    proof=[f"{READERS}::test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file"],
    errors=[
        r"UnicodeDecodeError",
        r"codec can'?t decode byte",
        r"invalid (?:start|continuation) byte",
        r"is not UTF-8",
    ],
    sources=[
        "https://github.com/xxw1995/chatglm3-finetune/issues/11",
        "https://github.com/IBM/Grapher/issues/4",
        "https://github.com/aizpy/chatglm-finetune/pull/3",
        "https://github.com/openai/openai-cookbook/pull/648",
    ],
)
def dataset_not_utf8() -> None:
    """A data file is not UTF-8, or is read as something else.

    Why: Programs that open files in the system's encoding read UTF-8 as GBK on a Chinese Windows and fail, or read a
    GBK file as Latin letters and train on them.

    Fix: Files are read as UTF-8 here, whatever the system says; the error names the byte and the encoding that fits.
    Convert the file with iconv.

    数据文件不是 UTF-8，或被按别的编码读取。

    为何：按系统编码打开文件的程序，在中文 Windows 上会把 UTF-8 当 GBK 读而报错，或把 GBK 文件读成乱码并照样训练。

    办法：这里无论系统如何一律按 UTF-8 读取；报错会指出字节位置和合适的编码。用 iconv 转换文件即可。
    """


@pitfall(
    "data",
    cost="minutes",
    kind="gate",
    proof=[f"{READERS}::test_speakers_weights_tools_and_parts", f"{READERS}::test_what_is_wrong_with_a_record"],
    errors=[
        r"invalid role tag",
        r"KeyError: '(?:user|assistant|human|gpt|system|bing|chatgpt)'",
        r"unknown speaker",
        r"(?:unknown|unexpected|unsupported) role(?! assigned)",
    ],
    sources=[
        "https://github.com/QwenLM/Qwen3/pull/1314",
        "https://github.com/hiyouga/LlamaFactory/issues/6878",
        "https://github.com/hiyouga/LlamaFactory/issues/6924",
    ],
)
def dataset_role_tags_mismatch() -> None:
    """Speakers in the rows are called otherwise than the reader expects.

    Why: "human" and "gpt", "user" and "assistant", "prompter", "bot" all mean the same two. Readers with one fixed
    pair fail on the others, or mask the wrong turns.

    Fix: Here all usual names are known; an unknown one stops with the record and the nearest known name.

    行里的说话人名字与读取器期望的不同。

    为何：“human”与“gpt”、“user”与“assistant”、“prompter”、“bot”说的是同样两方。只认一种写法的读取器会报错，或遮错轮次。

    办法：常见的名字这里都认识；遇到不认识的会停下，并给出记录位置和最接近的名字。
    """


@pitfall(
    "data",
    cost="launch",
    kind="gate",
    proof=[
        f"{READERS}::test_what_is_wrong_with_a_record",
        f"{READERS}::test_a_question_at_the_end_is_cut_off_and_kept",
    ],
    errors=[
        r"conversation of (?:size|length) 0",
        r"assert .{0,40}role == conv\.roles",
        r"first message must be from (?:the )?(?:user|human)",
    ],
    sources=["https://github.com/lm-sys/FastChat/pull/628", "https://github.com/lm-sys/FastChat/issues/1100"],
)
def sharegpt_turn_order_or_empty() -> None:
    """Conversations are empty, begin with the assistant, or have two turns of one speaker in a row.

    Why: Collected dialogues are full of these. Trainers assert in the middle of an epoch, skip rows without a word, or
    cut the first turn so that an answer stands without its question.

    Fix: Every row is checked while it is read; the error names record, turn and what may stand there. Set
    data.on_error: drop to leave such rows out and list them.

    对话为空、以助手开头，或同一说话人连说两轮。

    为何：收集来的对话里这类情况很多。训练器会在一轮中途断言失败、悄悄跳过，或砍掉第一轮，让答案没有问题。

    办法：每一行读取时都会检查；报错指出记录、轮次以及该处允许谁说话。设 data.on_error: drop 可略去并列出这些行。
    """
