"""What is saved while training goes on is what was on the GPU when the save began."""

import pytest
import torch

from zhibei.model.ranks import ALONE
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.parts import Part
from zhibei.train.saving import Saver
from zhibei.train.snapshot import STAGING_BYTES, Snapshot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_tensors_larger_than_the_pinned_buffer_arrive_whole() -> None:
    rows = STAGING_BYTES // (4 * 1000) + 7
    large = torch.randn(rows, 1000, device="cuda")
    groups = {"model": {"large": Part(large, 5, rows + 9), "half": large[:3].bfloat16().T, "step": torch.tensor(3.0)}}
    copy = Snapshot().take(groups)["model"]
    part = copy["large"]
    assert isinstance(part, Part)
    assert isinstance(part.tensor, torch.Tensor)
    assert (part.start, part.num_rows) == (5, rows + 9)
    assert torch.equal(part.tensor, large.cpu())
    assert isinstance(copy["half"], torch.Tensor)
    assert torch.equal(copy["half"], groups["model"]["half"].cpu())


def test_steps_after_the_save_do_not_reach_it(tmp_path) -> None:
    weight = torch.arange(10.0, device="cuda")
    with Saver(tmp_path, ALONE, background=True) as saver:
        saver.begin(1, {"model": {"weight": weight}}, {"run_id": "r"})
        weight.mul_(-1)
        saved = saver.settle()
    assert saved is not None
    assert torch.equal(load_checkpoint(saved.path)[0]["model"]["weight"], torch.arange(10.0))
