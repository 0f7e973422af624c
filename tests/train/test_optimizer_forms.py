"""States of one form go on in another: the same masters bit for bit, and the same next steps."""

import itertools

import pytest
import torch

from zhibei.config.run import SftSection
from zhibei.train.optimizer import MasterOptimizer, Optimizer
from zhibei.train.optimizer_forms import load_states
from zhibei.train.split_adamw import SplitAdamW, join

SECTION = SftSection(learning_rate=1e-2)
CPU = torch.device("cpu")


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    values = {"matrix": torch.randn(5, 3, generator=random), "norm": torch.randn(7, generator=random)}
    return {name: torch.nn.Parameter(value.bfloat16().to(dtype)) for name, value in values.items()}


FORMS = {
    "split": lambda: SplitAdamW(parameters(torch.bfloat16), SECTION),
    "own masters": lambda: MasterOptimizer(parameters(torch.float32), SECTION),
    "masters beside": lambda: MasterOptimizer(parameters(torch.bfloat16), SECTION),
    "masters on the host": lambda: MasterOptimizer(parameters(torch.bfloat16), SECTION, home=CPU),
}


def learn(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(100 + step)
        gradients = {name: torch.randn(p.shape, generator=random) for name, p in optimizer.parameters.items()}
        optimizer.step(gradients, learning_rate=1e-2, scale=1.0)


def masters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    held = optimizer.tensors()
    found = {}
    for name, parameter in optimizer.parameters.items():
        if f"{name}::low" in held:
            found[name] = join(parameter.data, held[f"{name}::low"])
        else:
            found[name] = held.get(f"{name}::master", parameter.data).float().clone()
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(FORMS, FORMS)))
@pytest.mark.parametrize("steps", [0, 3])
def test_another_form_goes_on_where_the_first_was(before: str, after: str, steps: int) -> None:
    first, second = FORMS[before](), FORMS[after]()
    learn(first, range(steps))
    learn(second, range(20, 22))  # what it held before must be gone
    if steps == 0:
        second = FORMS[after]()
    stored = {name: value.clone() for name, value in first.tensors().items()}
    weights = {name: parameter.data.clone() for name, parameter in first.parameters.items()}
    for name, parameter in second.parameters.items():
        parameter.data.copy_(weights[name])
    load_states(second, stored, weights)
    expected, found = masters(first), masters(second)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name, parameter in second.parameters.items():
        # A tie may be rounded to either neighbour where the rest is kept beside it.
        torch.testing.assert_close(parameter.data.float(), found[name], rtol=2**-8, atol=0)
    learn(first, range(steps, steps + 3))
    learn(second, range(steps, steps + 3))
    expected, found = masters(first), masters(second)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
