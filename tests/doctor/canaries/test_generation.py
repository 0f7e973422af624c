"""Canaries of generation."""

from __future__ import annotations

from dataclasses import replace

from tests.doctor.canaries import Canaries
from tests.doctor.canaries.test_template import LLAMA3
from tests.doctor.healthy import broken, healthy
from zhibei.doctor.facts.facts import Facts

FINE = healthy("model.method=lora")
GEMMA = replace(LLAMA3, name="gemma", terminator="<end_of_turn>\n", terminator_ids=(107,))


def stops_at(*overrides: str, template: object = LLAMA3, **files: int | list[int]) -> Facts:
    facts = broken(healthy(*overrides), "template", template)
    facts = broken(facts, "tokenizer.added_tokens", {"<|eot_id|>": 128009, "<end_of_turn>": 107})
    return broken(facts, "tokenizer.declared_ids", {f"{name}.json": {"eos": eos} for name, eos in files.items()})


LORA = "model.method=lora"
CANARIES: Canaries = {
    "llama3-instruct-eos-vs-eot": (
        [
            stops_at(LORA, generation_config=2),
            stops_at(LORA, generation_config=[2, 128008]),
            stops_at(LORA, config=2),
            stops_at("model.method=qlora", template=GEMMA, generation_config=[2]),
        ],
        [
            FINE,
            stops_at(LORA, generation_config=[2, 128009], config=2),
            stops_at(generation_config=2),
            broken(FINE, "template", replace(LLAMA3, terminator="\n###", terminator_ids=(835,))),
        ],
    ),
}
