"""Facts of a sound run on a sound machine, to be broken one at a time. Knows no check.

broken(healthy(), "model.non_finite", ("model.embed_tokens.weight",))
healthy("model.precision=bf16", machine=V100)
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from zhibei.config.layers import command_line_layer
from zhibei.config.resolve import ResolvedRun, plan_values, with_planned
from zhibei.config.run import RunFile
from zhibei.doctor.facts.environment import EnvironmentFacts
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import ModelFacts
from zhibei.doctor.facts.output import OutputFacts
from zhibei.doctor.facts.planned import with_plan
from zhibei.doctor.facts.rows import RowFacts
from zhibei.doctor.facts.text import TemplateFacts, TokenizerFacts
from zhibei.plan.machines import Gpu, Machine
from zhibei.plan.shapes import read_shape

A100 = Gpu("A100-40G", 39.4, (8, 0), bandwidth_gb_per_s=1555, half_tflops=312)
V100_CARD = Gpu("V100-32G", 31.7, (7, 0), bandwidth_gb_per_s=900, half_tflops=125)
ONE_A100 = Machine("a100-40g", (A100,), cpu_cores=16, host_gib=128, host_free_gib=120, shared_memory_gib=64)
V100 = Machine("v100-32g", (V100_CARD,), cpu_cores=16, host_gib=128, host_free_gib=120, shared_memory_gib=64)
CPU = Machine("cpu", (), cpu_cores=8, host_gib=32, host_free_gib=28, shared_memory_gib=8)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_of(*overrides: str) -> ResolvedRun:
    """A run file as if read from `run.yaml`, with settings laid over it."""
    values: dict[str, Any] = {
        "name": "healthy",
        "model": {"path": "/models/llama-7b"},
        "data": {"sources": ["/data/rows.json"], "template": "alpaca"},
    }
    origins = {"name": "run.yaml:1", "model.path": "run.yaml:2", "data.sources": "run.yaml:3"}
    _lay(values, command_line_layer(overrides, rank=1).tree.value)
    origins |= {override.partition("=")[0]: "command line" for override in overrides}
    run = RunFile.model_validate(values)
    return with_planned(ResolvedRun(run, origins, ""), plan_values(run))


def _lay(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _lay(below[key], value)
        else:
            below[key] = value


def healthy(*overrides: str, machine: Machine = ONE_A100, **parts: Any) -> Facts:
    """Sound facts; `parts` replaces whole parts (`rows=...`, `adapter=...`)."""
    tensors = {
        "model.embed_tokens.weight": ("F16", (32000, 4096)),
        "lm_head.weight": ("F16", (32000, 4096)),
    }
    layers = [f"model.layers.{number}" for number in range(32)]
    linear_names = tuple(
        f"{layer}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}" for layer in layers for name in LINEARS
    )
    facts = Facts(
        machine=machine,
        environment=EnvironmentFacts(
            python="3.11.7",
            packages={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "tokenizers": "0.23.0"},
            torch_cuda="13.0" if machine.gpus else None,
            torch_architectures=("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
            driver="580.65" if machine.gpus else None,
            driver_cuda="13.0" if machine.gpus else None,
            open_files=65536,
        ),
        resolved=run_of(*overrides),
        model=ModelFacts(
            path="/models/llama-7b",
            folder=Path("/models/llama-7b"),
            config=CONFIG,
            tensors=tensors,
            module_names=(*layers, *linear_names, "model.embed_tokens", "lm_head"),
            linear_names=linear_names,
            scanned_share=1.0,
            embedding_rows=32000,
            head_rows=32000,
            dtype="float16",
            fingerprint="f" * 64,
        ),
        tokenizer=TokenizerFacts(
            source="/models/llama-7b",
            kind="LlamaTokenizerFast",
            num_ids=32000,
            highest_id=31999,
            bos="<s>",
            eos="</s>",
            pad="<unk>",
            unk="<unk>",
            ids={"bos": 1, "eos": 2, "pad": 0, "unk": 0},
            declared_ids={"config.json": {"bos": 1, "eos": 2}},
            sentencepiece_ids={"bos": 1, "eos": 2, "unk": 0},
            files=("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
            adds_bos=True,
        ),
        template=TemplateFacts(name="alpaca", terminator="</s>", terminator_ids=(2,), special_pieces={"</s>": (2,)}),
        rows=RowFacts(audit=healthy_audit(), num_steps=1170, highest_id=31990, longest=512, records_in_files=52000),
        output=OutputFacts(
            path=Path("runs/healthy"), place=Path("."), free_bytes=2 * 10**12, free_inodes=10**7, file_system="ext4"
        ),
    )
    return replace(facts, **parts)


def healthy_audit() -> dict[str, Any]:
    """As `zhibei.data.audit.audit_rows` counts 52,000 sound rows."""
    return {
        "template": "alpaca", "terminator": "</s>", "rows_read": 52000, "rows_kept": 52000, "rows_train": 50960,
        "rows_heldout": 1040, "dropped": {}, "changed": {}, "rows_cut": 0, "rows_without_supervision": 0,
        "tokens": 9_000_000, "tokens_supervised": 3_200_000, "supervised_share": 0.3556, "answers": 52000,
        "terminators": 52000, "terminators_supervised": 52000, "terminators_supervised_share": 1.0,
        "bos_per_row": {"min": 1, "max": 1}, "unknown_tokens": 0, "rows_with_border_merges": 0, "border_merges": 0,
        "prompts_compared": {"equal": 200, "different": 0}, "rows_with_special_tokens_in_text": 0,
        "lengths": {"mean": 173.0, "percentiles": {"0": 40, "50": 160, "95": 350, "99": 430, "100": 512}},
        "longest_rows": [{"row": "/data/rows.json#17", "tokens": 512}],
        "sources": [{"source": "/data/rows.json", "rows": 52000, "rows_heldout": 1040}],
        "duplicates": {"rows_said_before": 0, "across_train_and_heldout": 0}, "notices": [],
    }  # fmt: skip


def planned(facts: Facts, config: dict[str, Any] = CONFIG) -> Facts:
    """The same facts with the plan that `zhibei check` makes of a model with this config.json."""
    assert facts.model is not None
    return with_plan(replace(facts, model=replace(facts.model, config=config, shape=read_shape(config))), None)


def broken(facts: Facts, place: str, value: Any) -> Facts:
    """The same facts with one value replaced: `broken(facts, "rows.audit.rows_train", 3)`."""
    return _with(facts, place.split("."), value)


def _with(whole: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    if isinstance(whole, dict):
        return {**whole, head: _with(whole[head], rest, value) if rest else value}
    assert head in {one.name for one in fields(whole)}, f"{type(whole).__name__} has no {head}"
    return replace(whole, **{head: _with(getattr(whole, head), rest, value) if rest else value})
