"""Models to disk as folders that transformers and PEFT load without us. Knows no rows and no loops."""

from __future__ import annotations

from pathlib import Path

from zhibei.model.language_model import LanguageModel

SHARD_SIZE = "4GB"


def write_weights(model: LanguageModel, folder: Path) -> None:
    """Write a complete Hugging Face folder, or a PEFT folder when the model has adapters. Safetensors only.

    `folder` must exist; the caller makes it atomic (store.folders.whole_folder).
    """
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
