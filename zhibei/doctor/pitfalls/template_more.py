"""Pitfalls of chat templates that refuse, repeat or belong to another family. Knows no weights."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.template import setting, template_origin

STOPPING_SHARE = 0.5


@pitfall(
    "template",
    cost="minutes",
    errors=[
        r"Conversation roles must alternate",
        r"jinja2\.exceptions\.TemplateError: .{0,60}roles",
        r"roles? must alternate",
        r"System role not supported",
        r"Only user and assistant roles are supported",
        r"No user query found in messages",
    ],
    sources=[
        "https://github.com/FasterDecoding/Medusa/issues/102",
        "https://github.com/huggingface/smol-course/issues/260",
        "https://github.com/huggingface/alignment-handbook/issues/93",
        "https://github.com/unslothai/unsloth/issues/334",
    ],
)
def roles_must_alternate(facts: Facts) -> Iterable[Finding]:
    """Conversations have an order of roles that the template cannot express.

    Why: Many templates want user and assistant in turn, and some know no system prompt. A conversation that begins
    with an answer or says two things in a row raises an error, in the middle of a run where rows are rendered late.
    All rows are rendered here before training.

    Fix: Merge neighbouring messages of one role, put the system prompt into the first question, drop what begins with
    an answer; or use a template without an order of roles (chatml, llama3).

    对话的角色顺序是模板无法表达的。

    为何：许多模板要求用户与助手轮流发言，有的不认识系统提示。以回答开头或同一角色连说两次的对话会报错；
    若数据在训练中才渲染，
    就在运行途中报错。这里在训练前渲染所有数据。

    办法：合并相邻的同角色消息，把系统提示并入第一个问题，去掉以回答开头的对话；或使用不限制角色顺序的模板
    （chatml、llama3）。
    """
    template, rows = facts.template, facts.rows
    if template is not None and facts.run.data.system and "system/user/assistant" in template.refusals:
        yield Finding(
            what=f"data.system is set, and template {template.name} refuses system prompts: "
            f"{template.refusals['system/user/assistant']}",
            where=setting(facts, "data.system"),
            to_do="remove data.system, or use a template with a place for it",
        )
    refused = rows.audit.get("dropped", {}).get("template", 0) if rows is not None else 0
    if rows is None or not refused:
        return
    entries = [entry for entry in rows.ledger if entry.get("reason") == "template"]
    first = entries[0] if entries else {}
    read = rows.audit.get("rows_read") or refused
    yield Finding(
        what=f"{refused:,} of {read:,} rows are left out, because the template cannot express them"
        + (f"; the first: {first.get('detail')}" if first else ""),
        where=str(first.get("where") or template_origin(facts)),
        to_do="merge neighbouring messages of one role in the rows of the ledger, or use data.template: chatml",
        level="stop" if refused > STOPPING_SHARE * read else "warning",
        evidence=tuple(f"{entry.get('where')}: {entry.get('detail')}" for entry in entries[:8]),
    )


@pitfall(
    "template",
    cost="run",
    sources=["https://github.com/axolotl-ai-cloud/axolotl/issues/1921"],
)
def template_inserts_eos_between_turns(facts: Facts) -> Iterable[Finding]:
    """The template writes an end-of-sequence token after every turn's own terminator.

    Why: An old conversation format and the tokenizer both end the turn. The model learns to say its terminator and
    nothing after it, and then meets a token between turns that its pretraining never had there.

    Fix: Use the model's own template alone; take `eos_token` out of the loop over messages.

    模板在每一轮自己的结束标记之后又写了一个结束符。

    为何：旧的对话格式与分词器各自结束一次。模型学会说出结束标记，之后却在轮与轮之间遇到预训练时不会出现在那里的符号。

    办法：只用模型自己的模板；把 `eos_token` 从消息循环中去掉。
    """
    template = facts.template
    if template is None or not template.doubled_end:
        return
    yield Finding(
        what=f"every turn ends in {template.doubled_end!r}: the terminator {template.terminator.strip()!r}, then EOS",
        where=f"template {template.name} ({template_origin(facts)})",
        to_do="take eos_token out of the chat template's loop over messages, or choose a template of zhibei",
        level="warning",
    )


@pitfall(
    "template",
    cost="run",
    sources=[
        "https://github.com/hiyouga/LlamaFactory/pull/10773",
        "https://github.com/hiyouga/LlamaFactory/issues/9092",
        "https://github.com/QwenLM/Qwen3/issues/1420",
        "https://github.com/huggingface/trl/issues/6361",
        "https://github.com/huggingface/trl/pull/6363",
        "https://github.com/THUDM/slime/pull/330",
    ],
)
def thinking_template_mismatch(facts: Facts) -> Iterable[Finding]:
    """Training rows are written in another thinking mode than prompts.

    Why: Templates of reasoning models open or close a `<think>` block depending on a switch and on the place of the
    turn. When prompts end in an open block and training rows have a closed one there, the model is asked to go on
    from a beginning it never saw: it thinks without end, or writes empty thoughts.

    Fix: Choose one mode and keep to it: train on rows with thoughts, or serve with the mode that fits
    (`enable_thinking=false`), or use a template without thoughts (chatml for Qwen).

    训练数据与提示的思考模式不同。

    为何：推理模型的模板按开关和轮次位置打开或关闭 `<think>` 块。若提示以打开的块结尾，而训练数据在那里是关闭的，
    模型就要从未见过的开头继续：思考没完没了，或写出空的思考。

    办法：选定一种模式并保持一致：用带思考的数据训练，或按相符的模式服务（`enable_thinking=false`），
    或使用没有思考块的模板（Qwen 可用 chatml）。
    """
    template = facts.template
    if template is None or not template.knows_thinking or "default" in template.thinking_modes:
        return
    fitting = ", ".join(template.thinking_modes)
    yield Finding(
        what="prompts in the template's default mode do not begin as training rows do"
        + (f" (only {fitting} does)" if fitting else "")
        + (f": {template.prompt_differs}" if template.prompt_differs else ""),
        where=f"template {template.name} ({template_origin(facts)})",
        to_do=(f"serve the model with {fitting}" if fitting else "put thoughts into the answers of the data")
        + ", or train with a template without thoughts (data.template: chatml)",
        level="warning",
    )


@pitfall(
    "template",
    cost="run",
    sources=["https://github.com/hiyouga/LlamaFactory/issues/6736"],
)
def wrong_family_template(facts: Facts) -> Iterable[Finding]:
    """The template belongs to another family than the model.

    Why: A template is a name typed by hand. Control tokens of one family are plain text to another's tokenizer: they
    fall into many pieces, which the model must learn to spell, and turns end at a text instead of a token.

    Fix: `data.template: auto` takes the model's own; for a base model without one, alpaca or vicuna_v1.1.

    模板与模型不属于同一系列。

    为何：模板是手写的名字。一个系列的控制符号，对另一系列的分词器只是普通文本：会被切成许多片段，模型得学着拼写它们，
    每一轮也以文本而不是符号结束。

    办法：`data.template: auto` 采用模型自己的模板；没有模板的基座用 alpaca 或 vicuna_v1.1。
    """
    template, tokenizer = facts.template, facts.tokenizer
    if template is None or tokenizer is None:
        return
    where = template_origin(facts)
    own = "data.template: auto (the model's own)" if tokenizer.chat_template else "data.template: alpaca"
    # A model may have been tuned with markers in plain text (Zephyr's <|user|>), but not to end its turns so.
    ends_in_a_token = template.is_the_tokenizers_own and len(template.terminator_ids) == 1
    if template.split_marks and not ends_in_a_token:
        sizes = {mark: len(template.special_pieces.get(mark, ())) for mark in template.split_marks}
        shown = ", ".join(f"{mark} ({size} pieces)" for mark, size in sizes.items())
        yield Finding(
            what=f"template {template.name} uses control tokens that this tokenizer does not have: {shown}",
            where=where,
            to_do=f"set {'data.template: alpaca' if template.is_the_tokenizers_own else own}",
            level="warning",
        )
        return
    plain = {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk}
    foreign = [mark for mark in template.foreign_marks if mark not in plain]
    if foreign and tokenizer.chat_template:
        yield Finding(
            what=f"template {template.name} uses {', '.join(foreign)}, which this model's own chat template does not",
            where=where,
            to_do=f"set {own}",
            level="warning",
        )
