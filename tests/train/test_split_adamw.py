"""Split masters hold fp32 exactly, and the update on them is torch's AdamW on fp32 weights."""

import pytest
import torch

from zhibei.config.errors import UserError
from zhibei.config.run import TrainingSection
from zhibei.train.split_adamw import SplitAdamW, join, split


def test_every_kind_of_fp32_number_comes_back_bit_for_bit():
    random_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    masters = random_bits.to(torch.int32).view(torch.float32)
    masters = masters[masters.isfinite() & (masters.abs() < 3.3e38)]
    ties = ((torch.arange(-300, 300, dtype=torch.int32) << 16) + 0x8000 + (0x3F80 << 16)).view(torch.float32)
    for values in (masters, ties, -ties, torch.tensor([0.0, -0.0, 1e-45, -1e-45])):
        weight, low = split(values)
        assert torch.equal(join(weight, low).view(torch.int32), values.view(torch.int32))
        nearest = values.to(torch.bfloat16).float()
        assert ((weight.float() - values).abs() <= (nearest - values).abs()).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_updates_equal_torch_on_fp32_weights(weight_decay):
    torch.manual_seed(0)
    start = {"matrix": torch.randn(40, 30).bfloat16(), "bias": torch.randn(30).bfloat16()}
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: torch.nn.Parameter(value.float()) for name, value in start.items()}
    optimizer = SplitAdamW(ours, TrainingSection(weight_decay=weight_decay, beta2=0.95))
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": weight_decay},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for step in range(50):
        rate = 1e-3 * (step + 1) / 50
        gradients = {name: torch.randn(value.shape) for name, value in start.items()}
        optimizer.step({name: 2 * value for name, value in gradients.items()}, learning_rate=rate, scale=0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        for name, parameter in theirs.items():
            parameter.grad = gradients[name]
        reference.step()
    for name in start:
        torch.testing.assert_close(optimizer.master(name), theirs[name].data, atol=5e-7, rtol=2e-6)


def test_state_put_back_continues_bit_for_bit_and_foreign_state_is_refused():
    torch.manual_seed(1)
    value = torch.randn(20, 10).bfloat16()
    gradients = [torch.randn(20, 10) for _ in range(6)]

    def updated(first: int, last: int, before: SplitAdamW | None = None) -> SplitAdamW:
        parameter = torch.nn.Parameter((before.parameters["w"] if before else value).detach().clone())
        optimizer = SplitAdamW({"w": parameter}, TrainingSection())
        if before is not None:
            optimizer.load({name: tensor.clone() for name, tensor in before.tensors().items()})
        for gradient in gradients[first:last]:
            optimizer.step({"w": gradient}, learning_rate=1e-3, scale=1.0)
        return optimizer

    straight, resumed = updated(0, 6), updated(3, 6, updated(0, 3))
    assert torch.equal(straight.master("w").view(torch.int32), resumed.master("w").view(torch.int32))
    with pytest.raises(UserError, match="other parameters"):
        straight.load({"v::exp_avg": value})
