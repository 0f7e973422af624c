"""Canaries of area lora."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import ModelFacts
from zhibei.doctor.facts.text import TemplateFacts, TokenizerFacts
from zhibei.doctor.pitfall import CATALOGUE, Finding
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()
LORA = "model.method=lora"


def targets(*names: str, saved: str = "") -> Facts:
    more = (f"lora.modules_to_save=[{saved}]",) if saved else ()
    return healthy(LORA, f"lora.targets=[{', '.join(names)}]", *more)


def family(model_type: str, linear: tuple[str, ...], *overrides: str) -> Facts:
    """A model whose layers have other names than LLaMA's."""
    names = tuple(f"transformer.h.{number}.{name}" for number in range(4) for name in linear)
    model = healthy().model
    assert model is not None
    changed = replace(
        model,
        config={**CONFIG, "model_type": model_type},
        linear_names=names,
        module_names=(*names, "transformer.word_embeddings", "lm_head"),
    )
    return healthy(LORA, *overrides, model=changed)


def shaped(rank: int, *overrides: str, size: tuple[int, int] = (64, 64)) -> Facts:
    facts = healthy(LORA, f"lora.rank={rank}", *overrides)
    assert facts.model is not None
    tensors = {f"{name}.weight": ("F32", size) for name in facts.model.linear_names}
    return broken(facts, "model.tensors", tensors)


def with_end(norm: float, *overrides: str, median: float = 1.0) -> Facts:
    """A template that ends turns with token 31999, whose embedding row has this norm."""
    template = TemplateFacts(
        name="chatml", terminator="<|im_end|>", terminator_ids=(31999,), special_pieces={"<|im_end|>": (31999,)}
    )
    model = healthy().model
    assert model is not None
    return healthy(*overrides, template=template, model=replace(model, row_norms={31999: norm}, median_row_norm=median))


def extended(own: int | None, *overrides: str, highest: int = 33_000) -> Facts:
    """Another tokenizer of 52,000 ids for a model whose own had `own`."""
    facts = healthy("model.tokenizer=chinese", *overrides)
    tokenizer = replace(facts.tokenizer or TokenizerFacts("x"), num_ids=52_000, highest_id=51_999, models_own_ids=own)
    return broken(replace(facts, tokenizer=tokenizer), "rows.highest_id", highest)


def without_linears(**changes: Any) -> ModelFacts:
    model = healthy().model
    assert model is not None
    return replace(model, linear_names=(), **changes)


CANARIES: Canaries = {
    "lora-target-regex-in-list": (
        [
            targets("'.*q_proj'"),
            targets("q_proj", "'layers\\.[0-9]+\\.v_proj'"),
            targets("all-linear"),
            targets("'(q|k)_proj'"),
        ],
        [targets("q_proj", "v_proj"), healthy(LORA), targets("self_attn.q_proj")],
    ),
    "lora-targets-not-in-model": (
        [
            targets("W_pack"),
            targets("query_key_value", "dense"),
            family("bloom", ("self_attention.query_key_value", "mlp.dense_h_to_4h"), "lora.targets=[q_proj, v_proj]"),
            family("qwen", ("attn.c_attn",), "lora.targets=[q_proj]"),
        ],
        [
            targets("q_proj", "v_proj"),
            family("bloom", ("self_attention.query_key_value",), "lora.targets=[query_key_value]"),
            healthy(LORA),
            healthy(LORA, "lora.targets=[W_pack]", model=None),
        ],
    ),
    "lora-target-typo-ignored": (
        [
            targets("q_proj", "FAKE_TARGET_MODULE"),
            targets("q_proj", "v_porj"),
            targets("q_proj", "mlp"),
            targets("q_proj", saved="embed_token"),
        ],
        [targets("q_proj", "o_proj", saved="embed_tokens, lm_head"), healthy(LORA), targets("q_proj")],
    ),
    "lora-targets-empty-after-quant-detect": (
        [
            healthy(LORA, model=without_linears()),
            healthy(LORA, model=without_linears(quant_method="gptq")),
            healthy(LORA, "lora.targets=[]"),
        ],
        [healthy(LORA), healthy(), healthy(LORA, model=without_linears(tensors={}))],
    ),
    "lora-rank-exceeds-layer": (
        [shaped(64), shaped(128), shaped(8, size=(8, 64))],
        [shaped(16), shaped(32), healthy(LORA, "lora.rank=256")],
    ),
    "lora-scale-out-of-range": (
        [
            healthy(LORA, "lora.alpha=4096"),
            healthy(LORA, "lora.rank=1024", "lora.alpha=16"),
            healthy(LORA, "lora.rank=64", "lora.alpha=256", "lora.rslora=true"),
        ],
        [
            healthy(LORA),
            healthy(LORA, "lora.rank=64", "lora.alpha=16"),
            healthy(LORA, "lora.rank=4"),
            healthy(LORA, "lora.rank=64", "lora.alpha=16", "lora.rslora=true"),
        ],
    ),
    "lora-cannot-learn-new-eot-on-base": (
        [
            with_end(0.0, LORA),
            with_end(0.2, LORA),
            with_end(0.001, "model.method=qlora"),
            with_end(0.1, LORA, "lora.modules_to_save=[lm_head]"),
        ],
        [
            with_end(0.9, LORA),
            with_end(0.0),
            with_end(0.0, LORA, "lora.modules_to_save=[embed_tokens, lm_head]"),
            with_end(0.0, LORA, "lora.modules_to_save=[wte]"),
            healthy(LORA),
        ],
    ),
    "added-tokens-not-trained-qlora": (
        [extended(32_000, LORA), extended(32_000, "model.method=qlora")],
        [
            extended(32_000),
            extended(32_000, LORA, highest=31_000),
            extended(None, LORA),
            extended(32_000, LORA, "lora.modules_to_save=[embed_tokens, lm_head]"),
        ],
    ),
}


def findings(facts: Facts, name: str) -> list[Finding]:
    find = CATALOGUE[name].find
    assert find is not None
    return list(find(facts))


@pytest.mark.parametrize(
    ("facts", "name", "changed"),
    [
        (targets("q_proj", "v_porj"), "lora-target-typo-ignored", ["q_proj", "v_proj"]),
        (targets("q_proj", "FAKE_TARGET_MODULE"), "lora-target-typo-ignored", ["q_proj"]),
        (targets("'.*q_proj'", "'.*v_proj'"), "lora-target-regex-in-list", ["q_proj"]),
        (targets("all-linear"), "lora-target-regex-in-list", "all-linear"),
        (targets("W_pack"), "lora-targets-not-in-model", "all-linear"),
    ],
)
def test_a_finding_proposes_names_of_this_model(facts: Facts, name: str, changed: object) -> None:
    finding = findings(facts, name)[0]
    assert finding.changes["lora.targets"] == changed
    assert finding.where == "command line"
    assert not finding.is_safe


def test_one_wrong_list_is_one_finding() -> None:
    names = ("lora-target-regex-in-list", "lora-targets-not-in-model", "lora-target-typo-ignored")
    assert [len(findings(targets("W_pack", "c_attn"), name)) for name in names] == [0, 1, 0]
    assert [len(findings(targets("'.*q_proj'"), name)) for name in names] == [1, 0, 0]
    assert [len(findings(targets("q_proj", "x_proj"), name)) for name in names] == [0, 0, 1]


@pytest.mark.parametrize("name", ["lora-cannot-learn-new-eot-on-base", "added-tokens-not-trained-qlora"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_what_is_advised_is_not_refused_by_another_check(name: str, is_tied: bool) -> None:
    make = {"lora-cannot-learn-new-eot-on-base": functools.partial(with_end, 0.0),
            "added-tokens-not-trained-qlora": functools.partial(extended, 32_000)}[name]  # fmt: skip
    (found,) = findings(broken(make(LORA), "model.is_tied", is_tied), name)
    ((key, value),) = found.changes.items()
    assert key == ("model.method" if is_tied else "lora.modules_to_save")
    assert "modules_to_save: [" not in found.to_do or not is_tied
    setting = f"{key}=[{','.join(value)}]" if isinstance(value, list) else f"{key}={value}"
    followed = broken(make(LORA, setting), "model.is_tied", is_tied)
    assert findings(followed, name) == []
    assert findings(followed, "tied-embedding-modules-to-save-diverge") == []
