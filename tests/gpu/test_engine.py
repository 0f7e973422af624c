"""The decode step on a CUDA device: kernels and captured graphs beside transformers' own forward pass."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from zhibei.generate.decoding import FastRoad, SlotRoad, road_of
from zhibei.generate.engine import Engine, Request
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate
from zhibei.model.answering import answering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)], [1], [1, *range(100, 190)], [1, 7, 8, 9]]
FAMILIES = ["llama", "llama-grouped", "mistral-window", "qwen2", "qwen3"]


def model_of(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
        "initializer_range": 0.08,
    }  # fmt: skip
    configs = {
        "llama": lambda: LlamaConfig(**{**shape, "num_key_value_heads": 4}),
        "llama-grouped": lambda: LlamaConfig(**shape),
        "mistral-window": lambda: MistralConfig(**shape, sliding_window=16),
        "qwen2": lambda: Qwen2Config(**shape),
        "qwen3": lambda: Qwen3Config(**shape),
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family](), dtype=dtype).to("cuda").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_adapter(model: Any, targets: Any = "all-linear") -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def followed(road: Any, prompts: list[list[int]], count: int = 5) -> torch.Tensor:
    """Logits [count + 1, B, V] of prompts and of fixed tokens after them."""
    slots = list(range(len(prompts)))
    logits = [road.prefill(prompts, slots).clone()]
    positions_B = torch.tensor([len(prompt) for prompt in prompts], device="cuda")
    for place in range(count):
        tokens_B = (torch.arange(len(prompts), device="cuda") * 7 + place * 13 + 5) % 300
        columns = int(positions_B.max()) + 1
        logits.append(road.step(tokens_B, positions_B, columns=columns).clone())
        positions_B = positions_B + 1
    return torch.stack(logits)


def gap(model: Any, num_rows: int) -> tuple[float, Any]:
    """How far the fast road is from transformers' forward pass, relative to the size of the logits."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(num_rows)]
    with answering(model), torch.no_grad():
        fast = road_of(model, slots=num_rows, columns=128, pad_id=0)
        assert isinstance(fast, FastRoad)
        slots: SlotRoad = fast._slots
        expected, found = followed(slots, prompts), followed(fast, prompts)
    return float((found - expected).norm() / expected.norm()), fast


@pytest.mark.parametrize("num_rows", [1, 6, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_captured_step_gives_the_logits_of_transformers(family: str, num_rows: int) -> None:
    model = model_of(family)
    assert gap(model, num_rows)[0] < 0.02
    assert gap(with_adapter(model), num_rows)[0] < 0.02


@pytest.mark.parametrize("num_rows", [1, 24])
def test_adapters_on_some_layers_only(num_rows: int) -> None:
    assert gap(with_adapter(model_of("llama-grouped"), ["q_proj", "v_proj", "down_proj"]), num_rows)[0] < 0.02


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("num_rows", [1, 6, 40, 80])
def test_packed_bases_with_and_without_adapters(kind: str, num_rows: int) -> None:
    pytest.importorskip("bitsandbytes")
    from benchmarks.decode import packed

    model = packed(model_of("llama-grouped"), kind)
    assert gap(model, num_rows)[0] < 0.02
    assert gap(with_adapter(model), num_rows)[0] < 0.02


def test_fp32_answers_do_not_depend_on_slots_or_neighbours() -> None:
    model = model_of("llama-grouped", torch.float32)
    many = [PROMPTS[index % len(PROMPTS)] for index in range(23)]
    answers = [
        generate(
            model,
            many,
            options=SamplingOptions(max_new_tokens=30, temperature=0.9, seed=3, batch_rows=rows),
            stop_ids=range(40),
        )
        for rows in (1, 4, 23)
    ]
    tokens = [[answer.tokens for answer in one] for one in answers]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({len(one) for one in tokens[0]}) > 3


@pytest.mark.parametrize("adapters", [True, False])
def test_a_captured_step_sees_what_an_optimiser_changed(adapters: bool) -> None:
    model = model_of("llama-grouped")
    model = with_adapter(model) if adapters else model
    before, road = gap(model, 6)
    assert before < 0.02
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    model(input_ids=torch.tensor([PROMPTS[4]], device="cuda")).logits.float().logsumexp(-1).mean().backward()
    places = [parameter.data_ptr() for parameter in learning]
    with answering(model), torch.no_grad():
        old = followed(road, PROMPTS)
    optimizer.step()
    assert places == [parameter.data_ptr() for parameter in learning]
    with answering(model), torch.no_grad():
        new, expected = followed(road, PROMPTS), followed(road._slots, PROMPTS)
    assert float((new - old).norm() / old.norm()) > 0.05
    assert float((new - expected).norm() / expected.norm()) < 0.02


def test_the_engine_answers_in_several_ways_side_by_side() -> None:
    model = model_of("llama-grouped")
    engine = Engine(model, slots=3, cache_tokens=128)
    options = [
        SamplingOptions(max_new_tokens=10 + index, temperature=index % 3 / 2, top_k=5, seed=index) for index in range(7)
    ]
    ids = [engine.submit(Request(PROMPTS[index % 4], one, [], top_logprobs=2)) for index, one in enumerate(options)]
    answers = {}
    while engine.num_active or engine.num_waiting:
        answers.update({id: piece.answer for id, piece in engine.step() if piece.answer is not None})
    assert engine.road == "fast"
    assert [len(answers[id].tokens) for id in ids] == [one.max_new_tokens for one in options]
    assert all(len(answers[id].alternatives) == len(answers[id].tokens) for id in ids)


def test_an_engine_that_is_done_with_gives_its_memory_back_at_once() -> None:
    model = model_of("llama-grouped")
    options = SamplingOptions(max_new_tokens=8, temperature=0, seed=0, batch_rows=4)
    generate(model, PROMPTS[:4], options=options, stop_ids=[])  # what libraries keep for good is there from now on
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for _ in range(2):
            generate(model, PROMPTS[:4], options=options, stop_ids=[])
        assert torch.cuda.memory_allocated() - before < 2**20
    finally:
        gc.enable()
