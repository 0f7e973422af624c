"""Canaries of area reward_model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import healthy
from zhibei.doctor.facts.model import AdapterFacts

ADAPTER = AdapterFacts(Path("/runs/sft/model"), config={"base_model_name_or_path": "/models/llama-7b"})

OF_A_LANGUAGE_MODEL = replace(ADAPTER, config={**ADAPTER.config, "task_type": "CAUSAL_LM"})
OF_A_REWARD_MODEL = replace(ADAPTER, config={**ADAPTER.config, "task_type": "SEQ_CLS"})
CONTINUED = ("stage=reward", "model.method=lora", "lora.adapter=/runs/sft/model")

CANARIES: Canaries = {
    "rm-base-is-adapter-path": (
        [
            healthy("stage=reward", "model.method=lora", rows=None, adapter=ADAPTER),
            healthy("stage=ppo", "model.method=qlora", rows=None, adapter=ADAPTER),
            healthy("model.method=lora", adapter=AdapterFacts(Path("/runs/sft/model"))),
            healthy(*CONTINUED, rows=None, adapter=OF_A_LANGUAGE_MODEL),
        ],
        [
            healthy("stage=reward", "model.method=lora", rows=None),
            healthy(*CONTINUED, rows=None, adapter=OF_A_REWARD_MODEL),
            healthy("model.method=lora", "lora.adapter=/runs/sft/model", adapter=OF_A_LANGUAGE_MODEL),
            healthy("stage=reward", rows=None, adapter=ADAPTER),  # full training merges it into the base
        ],
    ),
}
