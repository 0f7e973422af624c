"""Streamed safetensors files equal what the library itself reads, and need no second copy of the state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zhibei.config.errors import UserError
from zhibei.store.files import sha256_of
from zhibei.store.shards import (
    DTYPE_NAMES,
    LazyTensor,
    plan_shards,
    read_header,
    read_tensors,
    save_tensors,
    write_shards,
)


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Values of every bit pattern the dtype has room for."""
    num_bytes = torch.empty(shape, dtype=torch.bool).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    if dtype is torch.bool:
        raw = raw % 2
    return raw.view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality that also holds for NaN."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_equals_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"matrix": sample(dtype, 3, 5), "scalar": sample(dtype).reshape(()), "empty": sample(dtype, 0, 4)}
    (file,) = save_tensors(tmp_path, tensors, stem="model")
    path = tmp_path / file.name
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    with safe_open(path, framework="pt") as opened:
        for name, tensor in tensors.items():
            assert same_bits(loaded[name], tensor)
            assert same_bits(opened.get_tensor(name), tensor)
            assert same_bits(read_tensors(tmp_path)[name], tensor)
    assert file.sha256 == sha256_of(path)
    assert file.num_bytes == path.stat().st_size == read_header(path).file_bytes


def test_mixed_dtypes_stay_aligned_and_equal_the_librarys_own_file(tmp_path: Path) -> None:
    tensors = {f"t{number}": sample(dtype, 3) for number, dtype in enumerate(sorted(DTYPE_NAMES, key=str))}
    save_tensors(tmp_path, tensors, stem="ours")
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert all(same_bits(ours[name], theirs[name]) for name in tensors)
    header = read_header(tmp_path / "ours.safetensors")
    assert header.data_start % 8 == 0
    for name, entry in header.entries.items():
        assert entry.start % tensors[name].dtype.itemsize == 0
    theirs_header = read_header(tmp_path / "theirs.safetensors")
    assert header.file_bytes - header.data_start == theirs_header.file_bytes - theirs_header.data_start
    assert {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in theirs_header.entries.items()
    }


def test_views_that_are_not_contiguous_are_written_in_row_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": whole.t(), "strided": whole[:, ::2], "spread": torch.ones(1).expand(5), "part": whole[1:3]}
    save_tensors(tmp_path, tensors, stem="model")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tied_tensors_are_written_once_and_read_twice(tmp_path: Path) -> None:
    embedding = torch.nn.Parameter(torch.randn(6, 4))
    tensors = {"embed.weight": embedding, "other": torch.randn(6, 4), "head.weight": embedding}
    save_tensors(tmp_path, tensors, stem="model")
    assert set(load_file(tmp_path / "model.safetensors")) == {"embed.weight", "other"}
    folder = read_tensors(tmp_path)
    assert set(folder) == set(tensors)
    assert folder.tied == {"head.weight": "embed.weight"}
    assert torch.equal(folder["head.weight"], embedding)
    equal_but_not_tied = {"a": torch.ones(2), "b": torch.ones(2)}
    save_tensors(tmp_path, equal_but_not_tied, stem="untied")
    assert set(load_file(tmp_path / "untied.safetensors")) == {"a", "b"}


def test_shards_hold_every_tensor_once_below_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((100,), float(number)) for number in range(10)} | {"big": torch.ones(1000)}
    written = save_tensors(tmp_path, tensors, stem="model", max_shard_bytes=1000)
    sizes = {file.name: [tensors[name].nbytes for name in file.tensors] for file in written}
    assert list(sizes) == [f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
    assert sorted(name for file in written for name in file.tensors) == sorted(tensors)
    assert all(sum(parts) <= 1000 or len(parts) == 1 for parts in sizes.values())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file_name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file_name)[name], tensors[name])
    folder = read_tensors(tmp_path, stem="model")
    assert all(torch.equal(folder[name], tensor) for name, tensor in tensors.items())


def test_stems_that_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.ones(1)}, stem="model")
    save_tensors(tmp_path, {"b": torch.ones(1)}, stem="model_extra")
    assert list(read_tensors(tmp_path, stem="model")) == ["a"]


def test_a_transformers_model_loads_from_the_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    save_tensors(tmp_path, model.state_dict(), stem="model", max_shard_bytes=20_000)
    again, loading = cast(Any, LlamaForCausalLM).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_changed_value_in_memory_does_not_change_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.zeros(4)}, stem="model")
    before = sha256_of(tmp_path / "model.safetensors")
    read_tensors(tmp_path)["a"].add_(1)
    assert sha256_of(tmp_path / "model.safetensors") == before


def test_lazy_tensors_are_asked_for_once_one_after_another(tmp_path: Path) -> None:
    asked: list[str] = []

    def lazy(name: str) -> LazyTensor:
        return LazyTensor(torch.float32, (2,), lambda: asked.append(name) or torch.full((2,), float(len(name))))

    tensors = {name: lazy(name) for name in ("a", "bb", "ccc")}
    plans = plan_shards(tensors, stem="model")
    assert asked == []
    write_shards(tmp_path, tensors, plans=plans)
    assert asked == ["a", "bb", "ccc"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["bb"], torch.full((2,), 2.0))


def test_a_lazy_tensor_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    tensors = {"a": LazyTensor(torch.float32, (2,), lambda: torch.zeros(3))}
    with pytest.raises(RuntimeError, match=r"announced as torch\.float32"):
        save_tensors(tmp_path, tensors, stem="model")


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor a has dtype torch.complex128"):
        save_tensors(tmp_path, {"a": torch.zeros(1, dtype=torch.complex128)}, stem="model")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(st.sampled_from(sorted(DTYPE_NAMES, key=str)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 200),
)
def test_any_names_shapes_and_dtypes_come_back(tmp_path_factory, specs, max_shard_bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = {name: sample(dtype, *shape) for name, (dtype, shape) in specs.items()}
    for file in save_tensors(folder, tensors, stem="model", max_shard_bytes=max_shard_bytes):
        assert all(same_bits(value, tensors[name]) for name, value in load_file(folder / file.name).items())
    loaded = read_tensors(folder)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


BROKEN_HEADERS = {
    "shorter than its length field": b"\x01\x02",
    "a pickle": b"\x80\x02}q\x00." * 20,
    "no JSON": (8).to_bytes(8, "little") + b"notjson!",
    "an array": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "a hole in the data": (80).to_bytes(8, "little")
    + json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}}).encode().ljust(80),
    "an entry without offsets": (40).to_bytes(8, "little") + b'{"a":{"dtype":"U8","shape":[1]}}'.ljust(40),
}


@pytest.mark.parametrize("content", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_a_broken_head_is_a_user_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.where == str(path)


def test_truncation_mixed_shards_and_nothing_to_read_are_named(tmp_path: Path) -> None:
    save_tensors(tmp_path, {"a": torch.zeros(100)}, stem="model")
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 7)
    with pytest.raises(UserError, match=f"truncated: {size - 7} of {size} bytes"):
        read_tensors(tmp_path)
    save_tensors(tmp_path / "two", {"a": torch.zeros(1)}, stem="one")
    save_tensors(tmp_path / "two", {"a": torch.zeros(1)}, stem="other")
    with pytest.raises(UserError, match=r"tensor a is also in one\.safetensors"):
        read_tensors(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no safetensors file here"):
        read_tensors(tmp_path / "none")


MEMORY_PROBE = """
import resource, sys, pathlib, torch
from zhibei.store.checkpoint import save_checkpoint
from zhibei.store.shards import LazyTensor
torch.set_num_threads(1)
def peak_kib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
one = 2**21
groups = lambda count: {"model": {f"t{i}": LazyTensor(torch.float32, (one,), lambda i=i: torch.full((one,), float(i)))
                                 for i in range(count)}}
folder = pathlib.Path(sys.argv[1])
save_checkpoint(folder, 1, groups=groups(2), state={})
before = peak_kib()
save_checkpoint(folder, 2, groups=groups(40), state={})
print((peak_kib() - before) / 1024)
"""


def test_saving_320_mib_takes_no_more_memory_than_a_few_tensors_of_8_mib(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    grown_mib = float(done.stdout)
    assert grown_mib < 32
