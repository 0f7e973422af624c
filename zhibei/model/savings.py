"""Trades of time for memory, and of compile time for speed, on loaded models. Knows layers, not loops."""

from __future__ import annotations

import shutil

from zhibei.config.errors import UserError
from zhibei.model.language_model import LanguageModel


def checkpoint_activations(model: LanguageModel, how: str) -> None:
    """Recompute activations in the backward pass: of no layer, of every other one (selective), of every one (full)."""
    if how == "none":
        return
    model.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "selective":
        for layer in model.layers()[1::2]:
            layer.gradient_checkpointing = False  # pyright: ignore[reportAttributeAccessIssue]


def compile_layers(model: LanguageModel, wanted: bool | str) -> bool:
    """torch.compile each decoder layer (one compilation serves all). Returns whether it was done.

    `auto` compiles on CUDA when a C compiler is there. Raises UserError when asked for without a compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if wanted == "auto":
        wanted = model.device.type == "cuda" and compiler is not None
    if not wanted:
        return False
    if compiler is None:
        raise UserError(
            "model.compile: true, but no C compiler was found",
            expected="cc, gcc or clang on the PATH (torch.compile builds kernels with it)",
            fix="install one (apt-get install gcc g++), or set model.compile: false",
            where="model.compile",
        )
    for layer in model.layers():
        layer.compile()
    return True
