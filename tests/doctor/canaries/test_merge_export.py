"""Canaries of area merge_export: adapters on another base, tied embeddings, bases that cannot be merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy
from zhibei.config.errors import UserError
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.hand_over import HandOverFacts
from zhibei.doctor.facts.model import AdapterFacts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()
LAYER = "model.layers.0.self_attn.q_proj"
SAME = {"base": {"fingerprint": "f" * 64, "path": "/models/llama-7b"}, "method": "lora"}


def adapted(
    *overrides: str,
    shapes: dict[str, tuple[int, ...]] | None = None,
    hand_over: HandOverFacts | None = None,
    **facts: Any,
) -> Facts:
    """A run that continues an adapter, on a model whose first layer's sizes are known."""
    tensors = {f"base_model.model.{name}": ("F32", shape) for name, shape in (shapes or {}).items()}
    values = {"config": {"base_model_name_or_path": "/models/llama-7b"}, "tensors": tensors, **facts}
    adapter = AdapterFacts(Path("/runs/other/model"), **values)
    sound = healthy(
        "model.method=lora", "lora.adapter=/runs/other/model", *overrides, adapter=adapter, hand_over=hand_over
    )
    assert sound.model is not None
    return broken(sound, "model.tensors", {**sound.model.tensors, f"{LAYER}.weight": ("F16", (4096, 4096))})


def tied(*overrides: str, **parts: Any) -> Facts:
    facts = healthy("model.method=lora", *overrides, **parts)
    assert facts.model is not None
    tensors = {name: value for name, value in facts.model.tensors.items() if name != "lm_head.weight"}
    return broken(broken(facts, "model.is_tied", True), "model.tensors", tensors)


def named(name: str, **facts: Any) -> Facts:
    return adapted(config={"base_model_name_or_path": name}, **facts)


def full_from_adapter(method: str, *, quantize: str = "none") -> Facts:
    manifest = {**SAME, "method": method, "settings": {"model": {"quantize": quantize}}}
    return healthy(adapter=AdapterFacts(Path("/runs/other/model"), manifest=manifest))


CONTINUED = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
GPT2 = {"transformer.wte.weight": ("F32", (50257, 768))}


def handed(*forms: str, overrides: tuple[str, ...] = (), **config: Any) -> Facts:
    """LLaMA-7B that is to be handed over in these forms."""
    facts = healthy(f"hand_over=[{','.join(forms)}]", *overrides)
    return broken(facts, "model.config", {**CONFIG, **config})


def packed(*overrides: str, method: str = "bitsandbytes") -> Facts:
    return broken(healthy("model.method=lora", *overrides), "model.quant_method", method)


NO_SUM = UserError("this adapter began as pissa", expected="LoRA", fix="PEFT", where="/runs/other/model")
NO_SUM_FACTS = HandOverFacts(adapter=NO_SUM)

CANARIES: Canaries = {
    "meta-form-impossible": (
        [
            handed("meta:2", vocab_size=32001),
            handed("meta", model_type="qwen2"),
            handed("hf", "meta:4", attention_bias=True),
            handed("meta", overrides=("model.rope_scaling_factor=2",)),
        ],
        [
            handed("meta", vocab_size=32001),
            handed("meta:8"),
            handed("hf", model_type="qwen2"),
            handed("meta", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
            healthy(),
        ],
    ),
    "hand-over-cannot-merge": (
        [
            packed("hand_over=[merged]"),
            packed("hand_over=[gguf:Q8_0]", method="gptq"),
            adapted("hand_over=[hf]", hand_over=NO_SUM_FACTS),
        ],
        [
            packed(),
            healthy("model.method=qlora", "hand_over=[merged,gguf:Q8_0]"),
            adapted("hand_over=[hf]", hand_over=HandOverFacts()),
            healthy("hand_over=[hf]"),
        ],
    ),
    "adapter-on-wrong-base": (
        [
            adapted(base_fingerprint="e" * 64, manifest=SAME),
            adapted(shapes={f"{LAYER}.lora_A.weight": (8, 5120)}),
            adapted(shapes={f"{LAYER}.lora_B.weight": (5120, 8)}),
            adapted(shapes={"model.layers.99.self_attn.q_proj.lora_A.weight": (8, 4096)}),
            adapted(shapes={"transformer.h.0.attn.c_attn.lora_A.weight": (8, 768)}),
            named("ziqingyang/chinese-alpaca-lora-7b"),
            named("/somewhere/vicuna-7b-v1.5"),
        ],
        [
            adapted(base_fingerprint="f" * 64, manifest=SAME),
            adapted(shapes={f"{LAYER}.lora_A.weight": (8, 4096), f"{LAYER}.lora_B.weight": (4096, 8)}),
            named("huggyllama/LLaMA-7B"),
            named("/somewhere/else/llama-7b/"),
            named("another-name", base_fingerprint="f" * 64, manifest=SAME),
            named(""),
            adapted(shapes={"lm_head.weight": (32000, 4096)}),
            healthy("model.method=lora"),
        ],
    ),
    "tied-embedding-modules-to-save-diverge": (
        [
            tied("lora.modules_to_save=[embed_tokens,lm_head]"),
            tied("lora.modules_to_save=[lm_head]"),
            tied("lora.modules_to_save=[model.embed_tokens]"),
            broken(tied("lora.modules_to_save=[wte]"), "model.tensors", GPT2),
            tied("lora.adapter=/a", adapter=AdapterFacts(Path("/a"), config=CONTINUED)),
        ],
        [
            healthy("model.method=lora", "lora.modules_to_save=[embed_tokens,lm_head]"),
            tied(),
            tied("lora.modules_to_save=[norm]"),
            broken(healthy(), "model.is_tied", True),
        ],
    ),
    "tied-lm-head-lora-merged-into-embedding": (
        [
            tied("lora.targets=[q_proj,lm_head]"),
            tied("lora.targets=[lm_head]"),
            tied("lora.targets=[q_proj,embed_tokens]"),
            tied("lora.adapter=/a", adapter=AdapterFacts(Path("/a"), config=CONTINUED)),
        ],
        [
            tied("lora.targets=[q_proj,v_proj]"),
            tied(),
            healthy("model.method=lora", "lora.targets=[q_proj,lm_head]"),
            tied("lora.adapter=/a", adapter=AdapterFacts(Path("/a"), config={"target_modules": ["q_proj"]})),
        ],
    ),
    "qlora-on-gptq-awq-cannot-merge": (
        [
            broken(healthy("model.method=lora"), "model.quant_method", "gptq"),
            broken(healthy("model.method=lora"), "model.quant_method", "awq"),
            broken(healthy(), "model.quant_method", "fp8"),
            broken(healthy("model.method=lora"), "model.quant_method", "compressed-tensors"),
        ],
        [healthy("model.method=lora"), broken(healthy("model.method=lora"), "model.quant_method", "bitsandbytes")],
    ),
    "merge-wrong-precision-base-qlora": (
        [full_from_adapter("qlora"), full_from_adapter("lora", quantize="int8")],
        [full_from_adapter("lora"), adapted(manifest={**SAME, "method": "qlora"}), healthy()],
    ),
}


def test_the_change_leaves_what_may_stay() -> None:
    find = CATALOGUE["tied-lm-head-lora-merged-into-embedding"].find
    assert find is not None
    (finding,) = find(tied("lora.targets=[q_proj,lm_head]"))
    assert finding.changes == {"lora.targets": ["q_proj"]}
    assert not finding.is_safe
    (finding,) = find(tied("lora.targets=[lm_head]"))
    assert finding.changes == {}


def test_both_bases_are_named() -> None:
    find = CATALOGUE["adapter-on-wrong-base"].find
    assert find is not None
    (finding,) = find(adapted(base_fingerprint="e" * 64, manifest=SAME))
    assert "eeeeeeeeeeee" in finding.what
    assert "ffffffffffff" in finding.what
    assert finding.level == "stop"
