"""Random conversations for property tests: any Unicode, and the pieces that are known to cause trouble."""

from __future__ import annotations

from hypothesis import strategies as st

from zhibei.text.messages import Message

AWKWARD = [" ", "  ", "\n", "\n\n", "\t", ":", "###", "\u00e9", "e\u0301", "你好", "😀", "\U0001f469\u200d\U0001f467"]
AWKWARD += ["\u200b", "\r\n", "a", "Hello", "1", "\u0627", "</", ">"]

words = st.one_of(st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), max_size=12), st.sampled_from(AWKWARD))
texts = st.lists(words, min_size=1, max_size=5).map("".join)
solid = texts.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn, *, with_context: bool = True) -> list[Message]:
    """A system prompt or none, then one to three turns of user and assistant."""
    messages = [Message("system", draw(solid))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        context = draw(st.one_of(st.just(""), solid)) if with_context else ""
        messages.append(Message("user", draw(solid), context=context))
        messages.append(Message("assistant", draw(solid), learn=draw(st.integers(0, 4)) > 0))
    return messages
