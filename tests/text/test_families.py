"""The named templates: exact spellings, the same as jinja, BOS once, misfits refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from transformers.utils.chat_template_utils import render_jinja_template

from tests.text.conversations import conversations
from tests.text.small_tokenizers import byte_level, sentencepiece_like
from zhibei.config.errors import UserError
from zhibei.text.families import ALIASES, TEMPLATES, find_template
from zhibei.text.messages import Message
from zhibei.text.native import NativeTemplate, bind

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_V0 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
U1, A1, U2, A2 = Message("user", "u1"), Message("assistant", "a1"), Message("user", "u2"), Message("assistant", "a2")
SYSTEM = Message("system", "sys")

# One turn, two turns, and two turns after a system prompt.
SPELLINGS = {
    "alpaca": (
        f"<s>{INTRO}\n\n### Instruction:\nu1\n\n### Response:a1</s>",
        "\n\n### Instruction:\nu2\n\n### Response:a2</s>",
        "<s>sys\n\n### Instruction:\nu1\n\n### Response:a1</s>",
    ),
    "alpaca_lora": (
        f"<s>{INTRO}\n\n### Instruction:\nu1\n\n### Response:\na1</s>",
        "\n\n### Instruction:\nu2\n\n### Response:\na2</s>",
        "<s>sys\n\n### Instruction:\nu1\n\n### Response:\na1</s>",
    ),
    "alpaca_legacy": (
        f"<s>{INTRO}\n\n### Instruction:\nu1\n\n### Response:a1</s>",
        "\n\n### Instruction:\nu2\n\n### Response:a2</s>",
        "<s>sys\n\n### Instruction:\nu1\n\n### Response:a1</s>",
    ),
    "alpaca_short": (
        "<s>### Instruction:\nu1\n\n### Response:\na1</s>",
        "\n\n### Instruction:\nu2\n\n### Response:\na2</s>",
        "<s>sys\n\n### Instruction:\nu1\n\n### Response:\na1</s>",
    ),
    "alpaca_cpp": (
        f"<s>{INTRO}\n\n### Instruction:\n\nu1\n### Response:\n\na1</s>",
        "### Instruction:\n\nu2\n### Response:\n\na2</s>",
        "<s>sys\n\n### Instruction:\n\nu1\n### Response:\n\na1</s>",
    ),
    "vicuna_v0": (
        f"<s>{VICUNA_V0}\n### Human: u1\n### Assistant: a1\n###",
        " Human: u2\n### Assistant: a2\n###",
        "<s>sys\n### Human: u1\n### Assistant: a1\n###",
    ),
    "vicuna_v1.1": (
        f"<s>{VICUNA} USER: u1 ASSISTANT: a1</s>",
        "USER: u2 ASSISTANT: a2</s>",
        "<s>sys USER: u1 ASSISTANT: a1</s>",
    ),
    "coati": (
        f"<s>{INTRO} Do not generate new instructions.\n\n### Instruction:\nu1\n\n### Response:\na1</s>",
        "\n\n### Instruction:\nu2\n\n### Response:\na2</s>",
        "<s>sys\n\n### Instruction:\nu1\n\n### Response:\na1</s>",
    ),
    "llama2": (
        "<s>[INST] u1 [/INST] a1 </s>",
        "<s>[INST] u2 [/INST] a2 </s>",
        "<s>[INST] <<SYS>>\nsys\n<</SYS>>\n\nu1 [/INST] a1 </s>",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nu2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nsys<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>",
    ),
    "chatml": (
        "<s><|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n",
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n",
        "<s><|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n",
    ),
    "mistral": (
        "<s>[INST] u1 [/INST] a1</s>",
        "[INST] u2 [/INST] a2</s>",
        "<s>[INST] sys\n\nu1 [/INST] a1</s>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nu1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n",
        "<start_of_turn>user\nu2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n",
        "<s><start_of_turn>user\nsys\n\nu1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n",
    ),
}


def bound(name: str) -> NativeTemplate:
    return bind(TEMPLATES[name], bos="<s>", eos="</s>")


def as_jinja(template: NativeTemplate, messages: list[Message], *, answer_next: bool = False) -> str:
    chat = [
        {"role": one.role, "content": one.content} | ({"context": one.context} if one.context else {})
        for one in messages
    ]
    found: Any = render_jinja_template(
        conversations=[chat],
        chat_template=template.as_jinja(),
        add_generation_prompt=answer_next,
        bos_token=template.bos,
        eos_token=template.eos,
    )
    return found[0][0]


def test_every_family_has_its_spelling_here() -> None:
    assert set(SPELLINGS) == set(TEMPLATES)
    assert set(ALIASES.values()) <= {*TEMPLATES, "tokenizer"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    one, more, with_system = SPELLINGS[name]
    template = bound(name)
    assert template.render([U1, A1]).text == one
    assert template.render([U1, A1, U2, A2]).text == one + more
    assert template.render([SYSTEM, U1, A1, U2, A2]).text == with_system + more


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_prompt_is_the_beginning_of_the_row(name: str) -> None:
    template = bound(name)
    for messages in ([U1, A1], [U1, A1, U2, A2], [SYSTEM, U1, A1, U2, A2]):
        row = template.render(messages)
        prompt = template.render(messages[:-1], answer_next=True).text
        assert row.text.startswith(prompt)
        start = min(span.start for span in row.spans if span.turn == len(messages) - 1)
        assert start == len(prompt), "everything the model must write itself is in the span"


@pytest.mark.parametrize("name", ["alpaca", "alpaca_lora", "alpaca_legacy"])
def test_alpaca_input_has_its_own_introduction_and_slot(name: str) -> None:
    text = bound(name).render([Message("user", "u", context="c"), A1]).text
    assert text.startswith(f"<s>{INTRO_WITH_INPUT}\n\n### Instruction:\nu\n\n### Input:\nc\n\n### Response:")


def test_context_without_a_slot_follows_the_content() -> None:
    assert "USER: u\nc ASSISTANT:" in bound("vicuna_v1.1").render([Message("user", "u", context="c"), A1]).text


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "coati", "chatml", "llama2"])
def test_an_empty_system_prompt_means_none(name: str) -> None:
    text = bound(name).render([Message("system", ""), U1, A1]).text
    family = TEMPLATES[name]
    assert text == ("<s>" + family.user[0] + "u1" + family.user[1] + text.partition("u1" + family.user[1])[2])
    assert text.count("u1") == 1


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=25, deadline=None)
def test_jinja_says_the_same(name: str, messages: list[Message]) -> None:
    template = bound(name)
    assert as_jinja(template, messages) == template.render(messages).text
    asked = template.render(messages[:-1], answer_next=True).text
    assert as_jinja(template, messages[:-1], answer_next=True) == asked
    bare = bind(TEMPLATES[name], bos="", eos="</s>")
    assert as_jinja(bare, messages) == bare.render(messages).text


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=25, deadline=None)
def test_spans_hold_what_was_said(name: str, messages: list[Message]) -> None:
    template = bound(name)
    family = TEMPLATES[name]
    rendered = template.render(messages)
    reached = 0
    for span in rendered.spans:
        assert reached <= span.start <= span.end <= len(rendered.text)
        reached = span.end
    for turn, message in enumerate(messages):
        content = [s for s in rendered.spans if s.turn == turn and s.part == "content"]
        said = "".join(rendered.text[s.start : s.end] for s in content)
        clean = (lambda text: text.strip()) if family.is_trimmed else (lambda text: text)
        pieces = [clean(message.content), clean(message.context)]
        joined = "" if family.context and message.role == "user" else "\n"
        expected = joined.join(piece for piece in pieces if piece) if pieces[1] else pieces[0]
        lead = family.lead if message.role == "assistant" else ""
        assert said == lead + expected
        ends = [s for s in rendered.spans if s.turn == turn and s.part == "terminator"]
        if message.role == "assistant":
            assert [rendered.text[s.start : s.end] for s in ends] == [template.terminator]
            assert ends[0].start == content[-1].end
            assert all(s.learn == message.learn for s in (*ends, *content))


def test_any_order_families_take_any_order() -> None:
    odd = [A1, SYSTEM, U1, U2, Message("tool", "noon"), A2]
    for name in ("chatml", "llama3"):
        template = bound(name)
        text = template.render(odd, answer_next=True).text
        assert text == as_jinja(template, odd, answer_next=True)
        assert [text.index(word) for word in ("a1", "sys", "u1", "u2", "noon", "a2")] == sorted(
            text.index(word) for word in ("a1", "sys", "u1", "u2", "noon", "a2")
        )


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("chatml", "llama3")])
@pytest.mark.parametrize(
    "messages", [[A1], [U1, U2], [U1, A1, A2], [U1, SYSTEM, A1], [SYSTEM], [U1, Message("tool", "t")], []]
)
def test_what_a_family_cannot_express_is_refused_by_both_forms(name: str, messages: list[Message]) -> None:
    template = bound(name)
    with pytest.raises(UserError, match="cannot express"):
        template.render(messages)
    if messages:
        with pytest.raises(Exception, match=r"take turns|no user message"):
            as_jinja(template, messages)


def test_an_answer_cannot_be_asked_for_after_an_answer() -> None:
    with pytest.raises(UserError, match="right after an answer"):
        bound("alpaca").render([U1, A1], answer_next=True)


def test_tools_need_a_template_that_knows_them() -> None:
    with pytest.raises(UserError, match="no place for a list of tools"):
        bound("chatml").render([U1, A1], tools="[]")


def test_bos_is_spelled_once_or_not_at_all() -> None:
    for name in TEMPLATES:
        for tokenizer in (byte_level(), sentencepiece_like()):
            template = find_template(name, tokenizer)
            assert isinstance(template, NativeTemplate)
            needs = tokenizer.adds_bos or TEMPLATES[name].needs_bos
            ids = tokenizer.encode(template.render([U1, A1]).text)
            assert ids.count(tokenizer.bos_id or -1) == (1 if needs else 0), name


def test_names_are_found_and_near_ones_offered() -> None:
    tokenizer = byte_level()
    assert find_template("vicuna", tokenizer).name == "vicuna_v1.1"
    assert find_template("LLaMA-3", tokenizer).name == "llama3"
    assert find_template("auto", tokenizer).name == "alpaca"
    with pytest.raises(UserError, match=r"data\.template: alpaca_lora"):
        find_template("alpaca_lore", tokenizer)
    with pytest.raises(UserError, match="has no chat template"):
        find_template("tokenizer", tokenizer)


def test_a_family_of_control_tokens_needs_a_tokenizer_that_knows_them(shared: Callable[..., Path]) -> None:
    from tests.text.small_tokenizers import tokenizer_called

    with pytest.raises(UserError, match="which are not tokens"):
        find_template("llama3", tokenizer_called("llama2"))
    assert find_template("llama3", tokenizer_called("llama3")).name == "llama3"


def test_the_spellings_of_alpaca_lora_are_those_of_its_files(shared: Callable[..., Path]) -> None:
    import json

    folder = shared("data", "tloen+alpaca-lora", "templates")
    ours = {"alpaca": "alpaca_lora", "alpaca_legacy": "alpaca_legacy", "alpaca_short": "alpaca_short"}
    for theirs, name in ours.items():
        spec = json.loads((folder / f"{theirs}.json").read_text(encoding="utf-8"))
        for key, message in (
            ("prompt_no_input", Message("user", "do it")),
            ("prompt_input", Message("user", "do it", context="with this")),
        ):
            prompt = bind(TEMPLATES[name], bos="", eos="</s>").render([message], answer_next=True).text
            assert prompt == spec[key].format(instruction="do it", input="with this")
