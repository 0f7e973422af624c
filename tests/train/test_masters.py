"""What master weights guarantee for every dtype a model computes in."""

from __future__ import annotations

import pytest
import torch

from zhibei.config.run import SftSection
from zhibei.train.optimizer import make_optimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIMIZERS = ("adamw", "adafactor")


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(8, 8, generator=generator).to(dtype)),
        "norm": torch.nn.Parameter(torch.ones(8, dtype=dtype)),
    }


def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"matrix": torch.randn(8, 8, generator=generator).to(dtype), "norm": torch.ones(8, dtype=dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_at_rate_zero_changes_no_weight(dtype: torch.dtype, name: str) -> None:
    weights = parameters(dtype)
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    optimizer = make_optimizer(weights, SftSection(optimizer=name))  # type: ignore[arg-type]
    for _ in range(2):
        optimizer.step(gradients(dtype), learning_rate=0.0, scale=1.0)
    for key, weight in weights.items():
        assert torch.equal(weight.detach(), before[key])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_weights_learn_through_fp32_masters(name: str) -> None:
    """Scaled fp16 gradients, as the loss scale makes them, give the update of the same gradients in fp32."""
    half, full = parameters(torch.float16), parameters(torch.float16)
    full = {key: torch.nn.Parameter(weight.detach().float()) for key, weight in full.items()}
    optimizers = [make_optimizer(weights, SftSection(optimizer=name)) for weights in (half, full)]  # type: ignore[arg-type]
    for _ in range(5):
        plain = {key: gradient.float() * 2**-20 for key, gradient in gradients(torch.float16).items()}
        optimizers[1].step(plain, learning_rate=1e-2, scale=1.0)
        optimizers[0].step(gradients(torch.float16), learning_rate=1e-2, scale=2**-20)
    for key in half:
        assert torch.equal(half[key].detach(), full[key].detach().half())
        assert bool(torch.isfinite(half[key]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_below_the_resolution_of_halves_are_not_lost(dtype: torch.dtype) -> None:
    """A hundred updates of 1e-4 on a weight of 1: alone each is rounded away in halves, together they are not."""
    weight = {"norm": torch.nn.Parameter(torch.ones(4, dtype=dtype))}
    optimizer = make_optimizer(weight, SftSection())
    for _ in range(100):
        optimizer.step({"norm": torch.ones(4, dtype=dtype)}, learning_rate=1e-4, scale=1.0)
    assert weight["norm"].detach().float() == pytest.approx(0.99, abs=4e-3)
