"""What the scan says of the bits is what numpy and torch say of the values; and it remembers only what it read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zhibei.doctor.facts.embedding_rows import norms_of_rows
from zhibei.doctor.facts.weight_scan import LAYOUTS, as_floats, scan_weights
from zhibei.store.headers import read_header
from zhibei.store.shards import DTYPE_NAMES

FLOATS = {name: dtype for dtype, name in DTYPE_NAMES.items() if name in LAYOUTS}


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def values(dtype: torch.dtype, count: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("name", FLOATS)
def test_every_pattern_of_bits_has_the_value_that_torch_gives_it(name: str) -> None:
    view = np.dtype(LAYOUTS[name][0])
    if view.itemsize <= 2:
        bits = np.arange(2 ** (8 * view.itemsize), dtype=np.uint32).astype(view)
    else:
        bits = np.random.default_rng(0).integers(0, 2 ** (8 * view.itemsize) - 1, 5000, dtype=view)
    theirs = torch.from_numpy(bits.view(view.str.replace("u", "i"))).view(FLOATS[name]).to(torch.float64).numpy()
    _, mask, limit = LAYOUTS[name]
    is_finite = (bits & view.type(mask)) < limit
    assert (is_finite == np.isfinite(theirs)).all()
    assert np.array_equal(as_floats(bits, name)[is_finite].astype(np.float64), theirs[is_finite])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(tmp_path: Path, name: str, poison: float) -> None:
    dtype = FLOATS[name]
    if name != "F8_E4M3" or np.isnan(poison):  # that format has no infinity
        for place in (0, 137, 299):
            bad = values(dtype)
            bad[place] = poison
            path = write(tmp_path, {"bad": bad, "good": values(dtype, seed=1)})
            assert scan_weights([path]).non_finite == ("bad",)
    assert scan_weights([write(tmp_path, {"good": values(dtype)})]).non_finite == ()


@pytest.mark.parametrize("name", FLOATS)
def test_the_largest_value_and_zeros(tmp_path: Path, name: str) -> None:
    tensor = values(FLOATS[name])
    scan = scan_weights([write(tmp_path, {"some": tensor, "none": torch.zeros(9, dtype=FLOATS[name])})])
    assert scan.largest["some"] == float(tensor.to(torch.float64).abs().max())
    assert scan.zero == ("none",)
    assert scan.share == 1.0


def test_integers_are_not_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path, {"ids": torch.full((9,), -1, dtype=torch.int32), "w": values(torch.float32)})
    assert set(scan_weights([path]).largest) == {"w"}


def test_beyond_the_budget_blocks_of_every_tensor_are_read_the_first_and_last_included(tmp_path: Path) -> None:
    count = 10 * 64 * 2**10
    big = torch.ones(count, dtype=torch.float16)
    path = write(tmp_path, {"big": big, "other": torch.ones(count, dtype=torch.float16)})
    scan = scan_weights([path], max_bytes=0)
    assert 0.2 < scan.share < 0.4
    assert scan.largest == {"big": 1.0, "other": 1.0}
    for place in (0, count - 1, count // 2):
        bad = big.clone()
        bad[place] = float("nan")
        path = write(tmp_path, {"big": bad})
        assert scan_weights([path], max_bytes=0).non_finite == ("big",)


def test_what_was_read_whole_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": values(torch.float32, 100), "b": values(torch.float32, 2**19)})
    cache = tmp_path / "cache"
    first = scan_weights([path], cache=cache, max_bytes=400)  # a fits into the budget, b is sampled
    assert first.share < 1
    second = scan_weights([path], cache=cache, max_bytes=2**22)
    assert second.share == 1.0
    third = scan_weights([path], cache=cache, max_bytes=0)
    assert (third.share, third.largest) == (1.0, second.largest)
    raw = bytearray(path.read_bytes())
    raw[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    path.write_bytes(raw)
    os.utime(path, ns=(1, 1))
    assert scan_weights([path], cache=cache).non_finite == ("b",)
    assert scan_weights([path], cache=cache, max_bytes=0).non_finite == ("b",)  # a broken tensor is never remembered


def test_a_cut_file_is_left_to_the_check_of_sizes(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": values(torch.float32, 1000)})
    path.write_bytes(path.read_bytes()[:-100])
    assert scan_weights([path]).largest == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_of_rows_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = values(dtype, 700 * 16).view(700, 16)
    matrix[5] = 0
    header = read_header(write(tmp_path, {"e": matrix}))
    norms, median = norms_of_rows(
        tmp_path / "model.safetensors", header.entries["e"], data_start=header.data_start, rows=[0, 5, 699, 700]
    )
    expected = matrix.to(torch.float64).norm(dim=1)
    assert norms == pytest.approx({0: expected[0].item(), 5: 0.0, 699: expected[699].item()}, rel=1e-6)
    assert median is not None
    assert expected.quantile(0.4) < median < expected.quantile(0.6)
