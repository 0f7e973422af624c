"""The three roads to logits give the same answers, family by family; the cache holds what is planned."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from zhibei.generate import decoding, fast
from zhibei.generate.captured import CapturedStep, size_for
from zhibei.generate.decoding import AloneRoad, FastRoad, SlotRoad, road_of
from zhibei.generate.families import MASK_BY_LAYER, ONE_MASK, mask_kinds
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate
from zhibei.model.answering import answering
from zhibei.plan.rollout_cache import cache_bytes
from zhibei.plan.shapes import read_shape

PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)], [1], [1, *range(100, 111)], [1, 7, 8, 9]]


def small_model(family: str) -> Any:
    """Two layers of a family as transformers makes it from its config class, window and all."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 160, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.2, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1,
        "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
        "num_local_experts": 4, "ffn_hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    known = CONFIG_MAPPING[family]()
    fitting = {name: value for name, value in sizes.items() if hasattr(known, name)}
    if getattr(known, "sliding_window", None) is None and not hasattr(known, "layer_types"):
        fitting.pop("sliding_window", None)
    config = CONFIG_MAPPING[family](**fitting)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def followed(road: Any, count: int = 14) -> torch.Tensor:
    """Logits [count + 1, B, V] of prompts and of fixed tokens after them, longer than the window."""
    logits = [road.prefill(PROMPTS, list(range(len(PROMPTS)))).clone()]
    positions_B = torch.tensor([len(prompt) for prompt in PROMPTS])
    for place in range(count):
        tokens_B = (torch.arange(len(PROMPTS)) * 7 + place * 13 + 5) % 150
        logits.append(road.step(tokens_B, positions_B, columns=int(positions_B.max()) + 1).clone())
        positions_B = positions_B + 1
    return torch.stack(logits)


@pytest.mark.parametrize("family", [*ONE_MASK, *MASK_BY_LAYER])
def test_every_family_of_the_tables_gives_the_logits_of_transformers_own_cache(family: str) -> None:
    model = small_model(family)
    with answering(model), torch.no_grad():
        assert mask_kinds(model.config) is not None
        road = road_of(model, slots=6, columns=64, pad_id=0)
        assert road.name == ("fast" if family in fast.FAMILIES else "slots")
        expected = followed(AloneRoad(model, 6))
        torch.testing.assert_close(followed(road), expected, rtol=0, atol=2e-4)
        if isinstance(road, FastRoad):
            torch.testing.assert_close(followed(road._slots), expected, rtol=0, atol=2e-4)


def test_an_unknown_family_takes_the_road_that_is_right_for_all() -> None:
    model = tiny_model("gemma2")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert isinstance(road_of(model, slots=2, columns=8, pad_id=0), AloneRoad)
    model = tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    assert isinstance(road_of(model, slots=2, columns=8, pad_id=0), AloneRoad)


@pytest.mark.parametrize("road", ["slots", "alone"])
def test_slower_roads_give_the_same_answers(road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    options = SamplingOptions(max_new_tokens=20, temperature=0.9, seed=2, batch_rows=2)
    quick = generate(model, PROMPTS, options=options, stop_ids=[2, 9, 30])
    monkeypatch.setattr(decoding.fast, "read_model", lambda *_, **__: None)
    if road == "alone":
        monkeypatch.setattr(decoding, "mask_kinds", lambda _: None)
    slow = generate(model, PROMPTS, options=options, stop_ids=[2, 9, 30])
    assert [answer.tokens for answer in slow] == [answer.tokens for answer in quick]
    for one, other in zip(slow, quick, strict=True):
        assert np.allclose(one.logps, other.logps, atol=1e-4)


def test_the_cache_holds_what_the_plan_counts() -> None:
    model = tiny_model("llama")
    for road in (
        road_of(model, slots=6, columns=48, pad_id=0),
        road_of(tiny_model("phi3"), slots=6, columns=48, pad_id=0),
    ):
        assert isinstance(road, (FastRoad, SlotRoad))
        with torch.no_grad():
            followed(road)
            road.step(torch.ones(6, dtype=torch.int64), torch.full((6,), 47), columns=48)
        shape = read_shape(model.config.to_dict())
        assert road._cache.num_bytes() == cache_bytes(shape, slots=6, tokens=48, item_bytes=4)


def test_a_cache_grows_no_further_than_it_may() -> None:
    cache = decoding.SlotCache(2, 100, at_first=16)
    pair = torch.ones(1, 1, 10, 4), torch.ones(1, 1, 10, 4)
    cache.reserve(10)
    cache.write_prompts([1], [pair])
    sizes = []
    for columns in (10, 17, 40, 70, 100):
        cache.reserve(columns)
        sizes.append(cache.columns)
    assert sizes == [16, 32, 64, 100, 100]
    assert cache.keys[0][1, 0, :10].eq(1).all()
    assert cache.keys[0].sum() == 40


def test_a_step_that_cannot_be_captured_is_computed_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedStep, "_capture", refuse)
    step = CapturedStep(slots=5, device=torch.device("cpu"))
    how: dict[str, Any] = {"compute": lambda a, b: a + b, "prove": lambda *_: None}
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        assert step(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), **how).tolist() == [5, 7, 9]
    assert step(torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1]), **how).tolist() == [2, 3, 4]


@pytest.mark.filterwarnings("ignore:the decode step cannot be captured")
def test_an_engine_that_is_done_with_lets_go_of_its_cache_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the road of a GPU, too: its cache beside the activations of training was a seventh of a run's memory."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no GPU here")

    monkeypatch.setattr(CapturedStep, "_capture", refuse)
    model = tiny_model("llama")
    plain = road_of(model, slots=6, columns=64, pad_id=0)
    assert isinstance(plain, FastRoad)
    road = FastRoad(plain._slots, plain._cache, plain._model, plain._pieces, torch.device("cpu"))
    road._captured = CapturedStep(slots=6, device=torch.device("cpu"))
    with answering(model), torch.no_grad():
        followed(road)
    cache = weakref.ref(road._cache)
    gc.disable()
    try:
        del plain, road
        assert cache() is None
    finally:
        gc.enable()


def test_a_graph_serves_the_rows_it_was_made_for_with_little_to_spare() -> None:
    sizes = [size_for(num_rows) for num_rows in range(1, 257)]
    assert all(num_rows <= size for num_rows, size in enumerate(sizes, start=1))
    assert all(size <= 2 * num_rows for num_rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 13


def broken(*_: Any) -> torch.Tensor:
    raise RuntimeError("no compiler for kernels")


def doubled(values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return 2 * fast.norm(values, weight, epsilon)


@pytest.mark.parametrize(("piece", "function"), [("enter", broken), ("norm", doubled)])
def test_kernels_that_fail_or_compute_something_else_are_not_used(piece: str, function: Any) -> None:
    model = tiny_model("llama")
    with answering(model), torch.no_grad():
        road = road_of(model, slots=6, columns=64, pad_id=0)
        assert isinstance(road, FastRoad)
        expected = followed(road, count=2)
        wrong = fast.Pieces(**{**vars(fast.PLAIN), piece: function})
        places = torch.tensor([len(prompt) for prompt in PROMPTS])
        tokens = torch.ones(6, dtype=torch.int64)
        road._pieces = wrong
        with pytest.warns(RuntimeWarning, match="kernels are not used"):
            road._prove(tokens, places)
        assert road._pieces is fast.PLAIN
        torch.testing.assert_close(followed(road, count=2), expected)
        right = fast.Pieces(**vars(fast.PLAIN))
        road._pieces = right
        road._prove(tokens, places)
        assert road._pieces is right
