"""Masters and moments on the host: the same steps; and what cannot be offloaded is refused."""

import pytest
import torch

from tests.train.small_run import small_run
from zhibei.config.errors import UserError
from zhibei.config.run import SftSection
from zhibei.train.loops import train
from zhibei.train.optimizer import MasterOptimizer, make_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimiser_on_the_host_takes_the_steps_of_one_beside_the_weights(dtype):
    torch.manual_seed(0)
    start = torch.randn(40, 30).to(dtype)
    gradients = [torch.randn(40, 30) for _ in range(5)]
    found = []
    for on_host in (False, True):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer({"w": parameter}, SftSection(weight_decay=0.1), on_host=on_host)
        assert isinstance(optimizer, MasterOptimizer) or not on_host
        for gradient in gradients:
            optimizer.step({"w": gradient}, learning_rate=1e-2, scale=0.5)
        found.append(parameter.detach().float())
    torch.testing.assert_close(*found, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-6)


def test_whole_weights_are_not_put_on_the_host(tmp_path):
    with pytest.raises(UserError, match="offload: all"):
        train(small_run(tmp_path, "distributed.offload=all"))
