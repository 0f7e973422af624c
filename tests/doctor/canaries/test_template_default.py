"""Canaries of templates that nobody chose."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy, healthy_audit
from zhibei.config.resolve import with_planned
from zhibei.doctor.facts.facts import Facts


def chats(answers: int, *, chosen: str = "", own: str | None = None, template: str = "alpaca") -> Facts:
    """52,000 rows with so many answers; `chosen` is what the run file says, `own` the tokenizer's chat template."""
    facts = healthy(f"data.template={chosen or 'auto'}")
    assert facts.resolved is not None
    resolved = facts.resolved if chosen else with_planned(facts.resolved, {"data.template": template})
    audit = {**healthy_audit(), "answers": answers, "template": template}
    return broken(broken(replace(facts, resolved=resolved), "rows.audit", audit), "tokenizer.chat_template", own)


CANARIES: Canaries = {
    "conversations-without-chat-template": (
        [chats(130_000), chats(52_001)],
        [
            healthy(),
            chats(52_000),
            chats(130_000, chosen="alpaca"),
            chats(130_000, chosen="vicuna", template="vicuna"),
            chats(130_000, own="{{ messages }}", template="tokenizer"),
        ],
    ),
}
