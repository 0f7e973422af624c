"""Models to disk as folders that transformers and PEFT load without us. Knows no rows and no loops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from zhibei.model.across import as_whole
from zhibei.model.language_model import LanguageModel
from zhibei.store.shards import LazyTensor, Writable, save_tensors

SHARD_SIZE = "4GB"
SHARD_BYTES = 4 * 10**9


def whole_tensors(model: LanguageModel) -> dict[str, Writable]:
    """What `write_weights` needs of a model that is divided among ranks, each tensor put together in its turn; empty
    for one that is not. Masters are written in what the model computes in."""
    if model.place is None:
        return {}
    parameters = dict(model.hf.named_parameters())
    has_adapters = model.hf is not model.inner
    wanted = model.trainable() if has_adapters else parameters
    return as_whole({name: p.data for name, p in wanted.items()}, parameters, dtype=model.dtype)


def write_weights(model: LanguageModel, folder: Path, whole: Mapping[str, Writable] | None = None) -> None:
    """Write a complete Hugging Face folder, or a PEFT folder when the model has adapters. Safetensors only.

    `folder` must exist; the caller makes it atomic (store.folders.whole_folder). `whole`: the tensors of a model that
    is divided among ranks; only rank 0 writes.
    """
    if whole:
        write_whole(model, folder, whole)
        return
    if model.hf is not model.inner:
        # The base's embeddings belong to the base; "auto" would look the base up on the hub.
        # Only the adapter that learns: a critic or a frozen reference may lie on the same base.
        model.hf.save_pretrained(
            str(folder),
            safe_serialization=True,
            save_embedding_layers=False,
            selected_adapters=[model.hf.active_adapter],
        )
        return
    before = model.inner.config._attn_implementation
    model.inner.config._attn_implementation = None
    try:
        model.inner.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    finally:
        model.inner.config._attn_implementation = before


def write_whole(model: LanguageModel, folder: Path, whole: Mapping[str, Writable]) -> None:
    """The same folder of tensors that come from elsewhere (other ranks, a checkpoint), one at a time; of the model only
    names and settings are read."""
    if model.hf is not model.inner:
        adapters = {name: value.read() if isinstance(value, LazyTensor) else value for name, value in whole.items()}
        model.hf.save_pretrained(
            str(folder),
            state_dict=adapters,
            safe_serialization=True,
            save_embedding_layers=False,
            selected_adapters=[model.hf.active_adapter],
        )
        return
    before, dtype = model.inner.config._attn_implementation, model.inner.config.dtype
    model.inner.config._attn_implementation, model.inner.config.dtype = None, model.dtype
    model.inner.config.architectures = [type(model.inner).__name__.removeprefix("FSDP")]
    try:
        model.inner.config.save_pretrained(str(folder))
        if getattr(model.inner, "generation_config", None) is not None:
            model.inner.generation_config.save_pretrained(str(folder))
    finally:
        model.inner.config._attn_implementation, model.inner.config.dtype = before, dtype
    save_tensors(folder, whole, stem="model", max_shard_bytes=SHARD_BYTES)
