"""Pits of a template that nobody chose. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.config.resolve import PLANNED
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

SINGLE_TASKS = "alpaca"
"""What `data.template: auto` takes where the tokenizer has no chat template."""


@pitfall(
    "template",
    cost="run",
    errors=[
        r"tokenizer\.chat_template is not set",
        r"no template argument was passed",
        r"does not have a (chat|default chat) template",
    ],
)
def conversations_without_chat_template(facts: Facts) -> Iterable[Finding]:
    """Conversations are trained with a template for single tasks, because the tokenizer has no chat template.

    Why: A base model's tokenizer often has none. Some programs then glue the turns together without borders, others
    stop. Here `data.template: auto` falls back to alpaca, which marks each turn and ends each answer, but was made for
    one task and one response; a template for conversations says better who speaks.

    Fix: Name a template that was made for conversations, for example data.template: vicuna; or write
    data.template: alpaca if that is what you want.

    分词器没有聊天模板，多轮对话于是用了单任务模板来训练。

    为何：基座模型的分词器常常没有聊天模板。有的程序把各轮直接拼在一起而没有分界，有的则停下。这里的
    `data.template: auto` 会退回到 alpaca：它会标出每一轮并结束每个回答，但它是为一问一答设计的，
    面向对话的模板更能说明谁在说话。

    办法：指定为对话设计的模板，例如 data.template: vicuna；若确实要用 alpaca，请写明 data.template: alpaca。
    """
    rows, tokenizer = facts.rows, facts.tokenizer
    if rows is None or tokenizer is None or tokenizer.chat_template or facts.origin("data.template") != PLANNED:
        return
    answers, kept = int(rows.audit.get("answers", 0)), int(rows.audit.get("rows_kept", 0))
    if rows.audit.get("template") == SINGLE_TASKS and answers > kept:
        yield Finding(
            what=f"the tokenizer has no chat template, so {kept:,} conversations with {answers:,} answers are written "
            f"with template {SINGLE_TASKS}, which was made for single tasks",
            where="data.template (auto)",
            to_do="set data.template: vicuna (`zhibei data templates` shows all), or data.template: alpaca to keep it",
            level="warning",
            changes={"data.template": "vicuna"},
        )
