"""Layers that share a storage are the layers they were: for the forward pass, optimisers, checkpoints and adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from zhibei.generate.fast import places, read_model
from zhibei.model.joined import join, joined_product

TOKENS = torch.tensor([[1, 40, 41, 90, 7, 8]])


def adapted(model: Any, targets: Any = "all-linear") -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def trained(model: Any, *, steps: int, joins_after: int | None) -> list[dict[str, torch.Tensor]]:
    """Weights after each of so many steps of AdamW, the layers joined after one of them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    states = []
    for step in range(steps):
        if step == joins_after:
            assert read_model(model, joins=True) is not None
        optimizer.zero_grad()
        model(TOKENS).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return states


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
def test_training_goes_on_as_if_nothing_had_been_joined(family: str, targets: Any) -> None:
    def model() -> Any:
        return tiny_model(family) if targets is None else adapted(tiny_model(family), targets)

    apart, together = trained(model(), steps=4, joins_after=None), trained(model(), steps=4, joins_after=2)
    for one, other in zip(apart, together, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name


def test_parameters_stay_the_same_objects_and_become_views() -> None:
    model = tiny_model("llama")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    read = read_model(model, joins=True)
    assert read is not None
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    layer, attention = read.layers[0].query_key_value, model.model.layers[0].self_attn
    assert layer.matrix is not None
    attention.k_proj.weight.data.fill_(3)
    assert layer.matrix[32:48].eq(3).all()
    assert layer.is_current()
    again = read_model(model, joins=True)
    assert again is not None
    assert places(again) == places(read), "what is joined already is left where it is"
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
    assert not layer.is_current()
    moved = read_model(model, joins=True)
    assert moved is not None
    assert places(moved) != places(read)


def test_a_joined_model_is_saved_and_read_as_any_other(tmp_path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read_model(model, joins=True)
    model.save_pretrained(tmp_path / "folder")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").state_dict()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(load_file(tmp_path / "plain.safetensors")[name], tensor)
    assert (tmp_path / "plain.safetensors").stat().st_size < 1.1 * sum(4 * one.numel() for one in expected.values())
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
    assert not model(TOKENS).logits.any()


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
def test_one_product_is_that_of_the_layers_one_by_one(targets: Any) -> None:
    model = tiny_model("qwen2")
    inner = model
    if targets is not None:
        model = adapted(model, targets)
        inner = model.get_base_model()
    attention = inner.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    values_BI = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([layer(values_BI) for layer in layers], dim=-1)
        joined = join(layers)
        assert joined is not None
        torch.testing.assert_close(joined_product(values_BI, joined), expected)
        torch.testing.assert_close(torch.cat([layer(values_BI) for layer in layers], dim=-1), expected)


def test_layers_that_are_more_than_linear_are_not_joined() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], use_dora=True))
    attention = model.get_base_model().model.layers[0].self_attn
    assert join([attention.q_proj, attention.k_proj]) is None
    assert read_model(model, joins=True) is None
    model = adapted(tiny_model("llama"))
    model.merge_adapter()
    assert read_model(model, joins=True) is None
