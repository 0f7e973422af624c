"""Messages about data and chat templates that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = "It is the library's own refusal, met at once; what can be seen before a run has checks of its own."


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"asking to pad but the tokenizer does not have a padding token",
        r"cannot handle batch sizes > 1 if no padding token is defined",
        r"pad_token.{0,30}(?:must be|is not) (?:set|defined)",
    ],
)
def padding_token_missing() -> None:
    """Padding was asked of a tokenizer without a padding token.

    Why: LLaMA-like tokenizers have none. Setting it to EOS is a trap: collators then mask the true end of every
    answer.

    Fix: Use a reserved or unknown token as padding, not EOS, and set model.config.pad_token_id alike. zhibei picks
    one that never stands in the data.

    分词器没有填充词元却被要求填充。

    为何：LLaMA 一类的分词器没有填充词元。设成 EOS 是个陷阱：整理函数会把每个答案真正的结尾也遮住。

    办法：用保留词元或未知词元作填充，不要用 EOS，并同样设置 model.config.pad_token_id。
    zhibei 会选数据中不会出现的词元。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"tokenizer\.chat_template is not set",
        r"chat_template.{0,30}(?:is not set|is None|not (?:found|defined|provided))",
        r"no template argument was passed",
        r"does not have a chat template",
    ],
)
def chat_template_missing() -> None:
    """Messages were given to a tokenizer without a chat template.

    Why: Base models have none, and trainers do not write the one they trained with. Newer libraries refuse to
    guess.

    Fix: Give the template of the training (never another family's). zhibei writes it into every model it saves.

    分词器没有对话模板却收到了消息列表。

    为何：基座模型没有模板，训练器也常不写出训练时所用的模板；新版库不再猜测。

    办法：提供训练时的模板（绝不能用别的系列的）。zhibei 会把它写进所保存的每个模型。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"\bJSONDecodeError\b",
        r"JSON parse error",
        r"\bArrowInvalid\b",
        r"\bDatasetGeneration(?:Cast)?Error\b",
        r"\bCastError\b|couldn't cast",
        r"column names don't match",
        r"error tokenizing data\. C error",
    ],
)
def data_file_unreadable() -> None:
    """A data file is not the form that it was read as, or its records differ in form.

    Why: One line broken by an editor, JSON read as JSONL or the other way round, or records whose field is once
    text and once a list.

    Fix: `zhibei data inspect FILE` names record, line and field. Mend that record; give all records the same fields
    and types.

    数据文件的格式与读取方式不符，或各条记录结构不一致。

    为何：可能是某一行被编辑器弄坏、把 JSON 当 JSONL（或相反），或同一字段有时是文本有时是列表。

    办法：`zhibei data inspect 文件` 会指出记录、行号和字段。修好该记录，让所有记录的字段和类型一致。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"^KeyError: '(?:text|prompts?|instruction|inputs?|outputs?|messages|conversations|chosen"
        r"|rejected|labels?|input_ids|content|role|response|completion|question|answer|query|from|value)'",
        r"column\S* .{1,60} (?:not|isn't) in the (?:dataset|current columns)",
        r"dataset must (?:have|contain) .{0,40}(?:column|field)",
    ],
)
def data_field_missing() -> None:
    """The data lack a field that the trainer reads.

    Why: The file is of another form than the trainer's setting says: alpaca has instruction, input, output;
    ShareGPT conversations; chat messages; preference data chosen and rejected.

    Fix: Name the columns (data.sources[].columns in zhibei) or the format. `zhibei data inspect FILE` shows which
    form it is.

    数据缺少训练器要读的字段。

    为何：文件格式与设置不符：alpaca 有 instruction、input、output；ShareGPT 是 conversations；聊天是 messages；
    偏好数据是 chosen 与 rejected。

    办法：指定列名（zhibei 中是 data.sources[].columns）或格式。`zhibei data inspect 文件` 会显示它属于哪种格式。
    """
