"""Canaries of templates."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.text import TemplateFacts

FINE = healthy()
HEADERS = {"<|start_header_id|>": (128006,), "<|end_header_id|>": (128007,), "<|eot_id|>": (128009,)}
LLAMA3 = TemplateFacts(
    name="llama3", terminator="<|eot_id|>", terminator_ids=(128009,), special_pieces=HEADERS, sha256="c" * 64
)
PIECES = {"<|im_start|>": (529, 29989, 326), "<|im_end|>": (529, 29989, 355)}
CHATML_IN_PIECES = TemplateFacts(
    name="chatml",
    terminator="<|im_end|>",
    terminator_ids=(529, 29989, 355),
    special_pieces=PIECES,
    split_marks=tuple(PIECES),
)
ZEPHYR = TemplateFacts(
    name="tokenizer",
    terminator="</s>",
    terminator_ids=(2,),
    special_pieces={"<|user|>": (523, 28766), "</s>": (2,)},
    split_marks=("<|user|>",),
    is_the_tokenizers_own=True,
)


def llama3_base(*overrides: str, norm: float | None = 0.001, median: float | None = 0.7) -> Facts:
    facts = broken(healthy(*overrides), "template", LLAMA3)
    facts = broken(facts, "tokenizer.added_tokens", {mark: ids[0] for mark, ids in HEADERS.items()})
    norms = {} if norm is None else {ids[0]: norm for ids in HEADERS.values()}
    return broken(broken(facts, "model.row_norms", norms), "model.median_row_norm", median)


def with_template(**changes: object) -> Facts:
    assert FINE.template is not None
    return broken(FINE, "template", replace(FINE.template, **changes))  # pyright: ignore[reportArgumentType]


def refused(count: int) -> Facts:
    entries = ({"reason": "template", "where": "rows.json, record 3", "detail": "message 1 is from user"},)
    return broken(broken(FINE, "rows.audit.dropped", {"template": count}), "rows.ledger", entries)


def trained_with(facts: Facts, sha256: str) -> Facts:
    return broken(facts, "model.parent_manifest", {"template": {"name": "vicuna_v1.1", "sha256": sha256}})


KNOWN = with_template(sha256="a" * 64)
THINKING = with_template(name="tokenizer", is_the_tokenizers_own=True, knows_thinking=True)
MODES = ("default", "enable_thinking=false")
CHAT_MODEL = broken(FINE, "tokenizer.chat_template", "{{ messages }}")

CANARIES: Canaries = {
    "double-bos-template-plus-tokenizer": (
        [with_template(bos_at_start=2, bos_in_prompt=2), with_template(bos_in_prompt=2), with_template(bos_at_start=0)],
        [FINE, with_template(bos_at_start=0, bos_in_prompt=0)],
    ),
    "infer-prompt-misses-system-block": (
        [healthy("data.system='Answer as a pirate.'")],
        [FINE, healthy("data.system=")],
    ),
    "infer-template-differs-from-train": (
        [trained_with(KNOWN, "b" * 64)],
        [FINE, KNOWN, trained_with(KNOWN, "a" * 64), trained_with(FINE, "b" * 64)],
    ),
    "instruct-template-on-base": (
        [
            llama3_base("model.method=lora", norm=0.7),
            llama3_base("model.method=qlora", norm=None, median=None),
            llama3_base("model.method=lora", norm=None, median=None),
            llama3_base("model.method=lora", "lora.modules_to_save=[lm_head]", norm=None, median=None),
        ],
        [
            FINE,
            healthy("model.method=lora"),
            llama3_base(),
            broken(llama3_base("model.method=lora"), "model.row_norms", {128006: 0.61, 128007: 0.64, 128009: 0.7}),
            llama3_base("model.method=lora", "lora.modules_to_save=[embed_tokens, lm_head]"),
            broken(llama3_base("model.method=lora", norm=None, median=None), "tokenizer.chat_template", "{{ m }}"),
        ],
    ),
    "prompt-marker-tokenises-by-context": (
        [
            broken(FINE, "rows.audit.rows_with_border_merges", 22000),
            with_template(prompt_differs="before user/assistant the text differs: training has 'a', chatting 'b'"),
        ],
        [FINE, broken(FINE, "rows.audit.rows_with_border_merges", 1770)],
    ),
    "roles-must-alternate": (
        [
            refused(12),
            refused(40000),
            broken(healthy("data.system=Hi"), "template.refusals", {"system/user/assistant": "no system role"}),
        ],
        [FINE, broken(FINE, "template.refusals", {"user/user/assistant": "must take turns"})],
    ),
    "template-inserts-eos-between-turns": (
        [with_template(terminator="<end_of_turn>", doubled_end="<end_of_turn>\n<eos>")],
        [FINE],
    ),
    "thinking-template-mismatch": (
        [THINKING, broken(THINKING, "template.thinking_modes", ("enable_thinking=false",))],
        [FINE, broken(THINKING, "template.thinking_modes", MODES)],
    ),
    "wrong-family-template": (
        [
            broken(FINE, "template", CHATML_IN_PIECES),
            broken(FINE, "template", replace(CHATML_IN_PIECES, name="tokenizer", is_the_tokenizers_own=True)),
            broken(CHAT_MODEL, "template.foreign_marks", ("[INST]", "[/INST]")),
        ],
        [
            FINE,
            CHAT_MODEL,
            broken(FINE, "template", ZEPHYR),
            broken(CHAT_MODEL, "template.foreign_marks", ("<s>", "</s>")),
            broken(CHAT_MODEL, "template", LLAMA3),
        ],
    ),
}
