"""What to do about rows that were dropped, by the reason of most of them. Knows reasons, not rows."""

from __future__ import annotations

from collections.abc import Mapping

REMEDIES = {
    "too_long": "raise data.max_tokens if the model and memory allow it, or set data.too_long: cut",
    "nothing_learned": "raise data.max_tokens, or see with `zhibei data inspect` whether the rows hold answers",
    "prompt_fills_window": "raise data.max_tokens, or shorten the prompts",
    "special_token": "remove special tokens from the text, or set data.special_tokens_in_text: keep if they are meant",
    "broken": "repair the records that the ledger names, or correct the field names with `columns`",
    "template": "use a template that can express these turns (`zhibei data templates`)",
    "in_validation": "give data.validation another file: it holds the very rows that are to be trained on",
    "identical_after_cut": "raise data.max_tokens so that the difference of the answers is kept",
}

OF_PROMPTS = {"too_long": "raise data.max_tokens if the model and memory allow it; prompts are never cut"}


def remedy_of(dropped: Mapping[str, int], *, kind: str = "") -> str:
    """The remedy for the commonest reason. `kind`: the audit's, where the records are not supervised rows."""
    commonest = max(dropped, key=lambda reason: dropped[reason], default="")
    if kind == "prompts" and commonest in OF_PROMPTS:
        return OF_PROMPTS[commonest]
    return REMEDIES.get(commonest, "lower data.validation, or check the data with `zhibei data inspect`")
