"""Saving tensors of a GPU takes no GPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zhibei.store.checkpoint import load_checkpoint, save_checkpoint


@pytest.mark.gpu
def test_saving_from_a_gpu_allocates_nothing_there(tmp_path: Path) -> None:
    weight = torch.randn(4096, 4096, device="cuda")
    tensors = {"whole": weight, "turned": weight.t(), "half": weight.to(torch.bfloat16)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    path = save_checkpoint(tmp_path, 1, groups={"model": tensors}, state={})
    assert torch.cuda.max_memory_allocated() == before
    loaded = load_checkpoint(path)[0]["model"]
    assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in tensors.items())
