"""Canaries of area config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy, healthy_audit
from zhibei.config.resolve import ResolvedRun
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.output import OutputFacts
from zhibei.doctor.facts.rows import RowFacts
from zhibei.doctor.pitfall import CATALOGUE, Finding
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()
LORA = "model.method=lora"


def of_width(width: int, *overrides: str) -> Facts:
    return broken(healthy(*overrides), "model.config", {**CONFIG, "hidden_size": width})


def rows(num_rows: int = 50_960, **changes: Any) -> RowFacts:
    audit = {**healthy_audit(), "rows_train": num_rows, "rows_read": num_rows, "rows_heldout": 0}
    return RowFacts(audit=audit, **{"num_steps": 1170, "longest": 512, "records_in_files": num_rows, **changes})


def with_rows(num_rows: int, *overrides: str, **changes: Any) -> Facts:
    return replace(healthy(*overrides), rows=rows(num_rows, **changes))


def steps(num_steps: int, *overrides: str) -> Facts:
    return broken(healthy(*overrides), "rows.num_steps", num_steps)


def from_recipe(facts: Facts, *keys: str, recipe: str = "alpaca-7b") -> Facts:
    """The same facts with these values set by a shipped recipe."""
    resolved = facts.resolved
    assert resolved is not None
    origins = {**resolved.origins, **dict.fromkeys(keys, f"recipe {recipe}")}
    return replace(facts, resolved=ResolvedRun(resolved.run, origins, resolved.text))


def rope(settings: dict[str, Any], *, key: str = "rope_scaling", version: str = "5.23.0") -> Facts:
    facts = broken(healthy(), "model.config", {**CONFIG, key: settings})
    return broken(facts, "environment.packages.transformers", version)


def output(holds: str = "", **changes: Any) -> Facts:
    path = Path("runs/healthy")
    return healthy(output=OutputFacts(path, path, exists=True, holds=holds, examples=("model",), **changes))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA = broken(
    healthy("sft.learning_rate=1e-2"), "model.config", {"model_type": "gemma3", "text_config": {"hidden_size": 2304}}
)
CAPPED = ("data.sources=[{path: rows.json, limit: 512}]",)

CANARIES: Canaries = {
    "learning-rate-too-high": (
        [
            healthy("sft.learning_rate=1e-3"),
            healthy("sft.learning_rate=0.5"),
            healthy(LORA, "sft.learning_rate=0.02"),
            of_width(64, "sft.learning_rate=0.3"),
            of_width(8192, "sft.learning_rate=2e-4"),
            healthy("stage=dpo", "dpo.learning_rate=1e-4"),
            healthy("sft.learning_rate=0.05", "sft.optimizer=adafactor"),
            healthy("sft.learning_rate=0.2", model=None),
            GEMMA,
        ],
        [
            healthy("sft.learning_rate=5e-5"),
            healthy(LORA, "sft.learning_rate=3e-4"),
            of_width(64, "sft.learning_rate=1e-2"),
            of_width(128, LORA, "sft.learning_rate=5e-3"),
            healthy("sft.learning_rate=1e-3", "sft.optimizer=adafactor"),
            healthy("sft.learning_rate=1e-3", model=None),
            from_recipe(healthy("sft.learning_rate=1e-3"), "sft.learning_rate"),
        ],
    ),
    "learning-rate-too-low": (
        [
            healthy("sft.learning_rate=1e-12"),
            healthy("sft.learning_rate=1e-7"),
            healthy(LORA, "sft.learning_rate=5e-6"),
            healthy("sft.learning_rate=2e-6", "sft.optimizer=adafactor"),
            healthy("stage=dpo", "dpo.learning_rate=1e-9"),
            healthy("stage=reward", "reward.learning_rate=1e-8"),
        ],
        [
            healthy("sft.learning_rate=1e-6"),
            healthy(LORA, "sft.learning_rate=2e-5"),
            healthy("stage=dpo", "dpo.learning_rate=5e-7"),
            healthy("stage=dpo", LORA),
            healthy("stage=ppo"),
            healthy("stage=reward"),
            healthy("sft.optimizer=adafactor"),
        ],
    ),
    "lora-rank-with-fixed-lr-diverges": (
        [
            healthy(LORA, "lora.rank=256", "lora.alpha=512", "sft.learning_rate=2e-4"),
            healthy("model.method=qlora", "lora.rank=256", "sft.learning_rate=2e-4"),
            healthy(LORA, "lora.rank=128", "lora.alpha=256", "sft.learning_rate=2e-4"),
            healthy(LORA, "lora.rank=16", "lora.rslora=true", "lora.alpha=32", "sft.learning_rate=2e-4"),
        ],
        [
            healthy(LORA),
            healthy(LORA, "lora.rank=64", "lora.alpha=16", "sft.learning_rate=2e-4"),
            healthy(LORA, "lora.rank=256", "lora.alpha=256", "sft.learning_rate=5e-5"),
            healthy(LORA, "lora.rank=256", "lora.rslora=true", "lora.alpha=16", "sft.learning_rate=1e-4"),
            of_width(128, LORA, "sft.learning_rate=5e-3"),
        ],
    ),
    "overtrained-30-epochs": (
        [
            healthy("sft.epochs=30"),
            with_rows(5000, "sft.epochs=8"),
            with_rows(5000, "sft.max_steps=2000", "sft.global_batch=128"),
            with_rows(5000, "sft.epochs=3", "data.sources=[{path: a.json, weight: 4}]"),
        ],
        [
            healthy("sft.epochs=3"),
            with_rows(5000, "sft.epochs=5"),
            with_rows(60, "sft.epochs=30"),
            healthy("sft.epochs=10"),
            from_recipe(with_rows(50_000, "sft.epochs=10"), "sft.epochs"),
        ],
    ),
    "example-row-cap-left-on": (
        [
            replace(healthy(*CAPPED), rows=rows(512, records_in_files=52_000)),
            healthy("sft.max_steps=5"),
        ],
        [
            replace(healthy(*CAPPED), rows=rows(512, records_in_files=520)),
            with_rows(60, "sft.max_steps=5"),
            healthy("sft.max_steps=500"),
        ],
    ),
    "less-than-one-step": (
        [healthy("sft.epochs=0.001"), with_rows(2000, "sft.epochs=0.05")],
        [with_rows(60, "sft.global_batch=60"), healthy("sft.epochs=0.1"), healthy("sft.max_steps=1")],
    ),
    "warmup-never-ends": (
        [
            steps(80, "sft.warmup_steps=100"),
            steps(80, "sft.warmup_steps=60"),
            steps(100, "sft.schedule=wsd", "sft.decay_ratio=0.9", "sft.warmup_ratio=0.2"),
            steps(100, "stage=reward", "reward.warmup_steps=100"),
        ],
        [
            steps(1170, "sft.warmup_steps=100"),
            steps(1, "sft.warmup_ratio=0.03"),
            from_recipe(steps(190, "sft.warmup_steps=100"), "sft.warmup_steps"),
        ],
    ),
    "setting-far-from-published": (
        [
            healthy("sft.beta2=0.5"),
            healthy("sft.beta1=0.999", "sft.beta2=0.95"),
            healthy("sft.weight_decay=10"),
            healthy("sft.epsilon=0.1"),
            healthy("sft.warmup_ratio=0.9"),
            healthy("sft.neftune_alpha=500"),
            healthy("sft.label_smoothing=0.9"),
            healthy("sft.max_grad_norm=1e-6"),
            healthy(LORA, "lora.dropout=0.9"),
        ],
        [
            healthy("sft.beta2=0.98"),
            healthy("sft.weight_decay=0.1"),
            healthy("sft.max_grad_norm=0", "sft.neftune_alpha=5", "sft.z_loss=1e-4"),
            from_recipe(healthy("sft.weight_decay=1"), "sft.weight_decay"),
        ],
    ),
    "interval-longer-than-run": (
        [
            steps(300, "sft.save_every=2000"),
            steps(300, "log.every=1000"),
            steps(300, "sft.evaluate_every=100", "sft.early_stop_patience=5"),
        ],
        [
            steps(12, "sft.save_every=2000"),
            steps(300, "sft.save_every=0", "sft.evaluate_every=0"),
            steps(300, "sft.evaluate_every=20", "sft.early_stop_patience=3"),
            from_recipe(steps(1218, "sft.save_every=2000"), "sft.save_every"),
        ],
    ),
    "effective-batch-changes-with-oom-fix": (
        [
            from_recipe(healthy("sft.global_batch=4"), "sft.learning_rate"),
            from_recipe(healthy("sft.global_batch=1024"), "sft.learning_rate"),
        ],
        [
            from_recipe(healthy("sft.global_batch=4", "sft.learning_rate=1e-5"), "model.path"),
            from_recipe(with_rows(60, "sft.global_batch=4"), "sft.learning_rate"),
            from_recipe(healthy("sft.global_batch=128"), "sft.learning_rate"),
        ],
    ),
    "context-extension-needs-config-change": (
        [
            healthy("data.max_tokens=32768"),
            healthy("data.max_tokens=16384", "model.rope_scaling_factor=2"),
            healthy("model.rope_scaling_factor=4"),
            broken(healthy(), "model.config", {"text_config": {"max_position_embeddings": 512}}),
        ],
        [
            healthy("data.max_tokens=4096"),
            broken(healthy("data.max_tokens=8192", "model.rope_scaling_factor=2"), "rows.longest", 7000),
            broken(healthy(), "model.config", {}),
        ],
    ),
    "rope-scaling-llama31-old-transformers": (
        [
            rope(LLAMA3, version="4.42.4"),
            rope({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, version="4.36.0"),
            rope({"rope_type": "linear", "factor": 8.0, "low_freq_factor": 1.0}),
            rope({"rope_type": "llama3", "factor": 8.0}),
            rope({"rope_type": "banana", "factor": 2.0}),
            rope({"rope_type": "yarn", "rope_theta": 1e6}, key="rope_parameters"),
            rope({"factor": 8.0}),
        ],
        [
            rope(LLAMA3),
            rope({"type": "linear", "factor": 2.0}),
            rope({"rope_type": "default", "rope_theta": 10000.0}, key="rope_parameters"),
            rope({"rope_theta": 10000.0}, key="rope_parameters"),
            rope(
                {"full_attention": {"rope_type": "default"}, "sliding": {"rope_type": "default"}}, key="rope_parameters"
            ),
        ],
    ),
    "accelerate-default-config-surprise": (
        [
            broken(healthy(), "environment.variables", {"ACCELERATE_MIXED_PRECISION": "fp16"}),
            broken(healthy(), "environment.variables", {"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}),
            broken(healthy(), "environment.variables", {"ACCELERATE_USE_DEEPSPEED": "true"}),
        ],
        [
            broken(healthy(), "environment.variables", {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}),
        ],
    ),
    "output-directory-in-use": (
        [output("a run of zhibei"), output("a checkpoint of transformers' Trainer"), output("other files")],
        [output(), replace(output("a run of zhibei"), is_resumed=True)],
    ),
    "output-directory-not-writable": ([output(is_writable=False)], [output()]),
    "torch-compile-recompiles": (
        [healthy("model.compile=true", "data.packing=false")],
        [
            healthy("model.compile=true"),
            healthy("data.packing=false"),
            healthy("model.compile=false", "data.packing=false"),
        ],
    ),
}


def only(facts: Facts, name: str) -> Finding:
    find = CATALOGUE[name].find
    assert find is not None
    (finding,) = find(facts)
    return finding


@pytest.mark.parametrize(("rate", "level"), [("4e-4", "warning"), ("1e-2", "stop"), ("0.5", "stop")])
def test_a_rate_is_graver_the_further_it_is(rate: str, level: str) -> None:
    finding = only(healthy(f"sft.learning_rate={rate}"), "learning-rate-too-high")
    assert finding.level == level
    assert finding.where == "command line"
    assert dict(finding.changes) == {"sft.learning_rate": 2e-5}
    assert not finding.is_safe


def test_what_nothing_is_learned_with_stops_the_run() -> None:
    assert only(healthy("sft.learning_rate=1e-12"), "learning-rate-too-low").level == "stop"
    assert only(healthy("sft.learning_rate=1e-7"), "learning-rate-too-low").level == "warning"


def test_a_cap_names_source_share_and_field() -> None:
    finding = only(CANARIES["example-row-cap-left-on"][0][0], "example-row-cap-left-on")
    assert "512 of 52,000" in finding.what
    assert dict(finding.changes) == {"data.sources[0].limit": None}


def test_a_shorter_limit_is_safe_only_where_no_row_is_longer() -> None:
    name = "context-extension-needs-config-change"
    assert only(broken(healthy("data.max_tokens=32768"), "rows.longest", 500), name).is_safe
    assert not only(broken(healthy("data.max_tokens=32768"), "rows.longest", 9000), name).is_safe
    assert not only(replace(healthy("data.max_tokens=32768"), rows=None), name).is_safe
