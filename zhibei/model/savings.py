"""Trades of time for memory, and of compile time for speed, on loaded models. Knows layers, not loops."""

from __future__ import annotations

import functools
import shutil
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from zhibei.config.errors import UserError
from zhibei.model.language_model import LanguageModel

# Share of a layer's activations that compiled layers keep in selective mode. Norms, rotations and gates are about 30 %
# of them and cost almost nothing to compute again; matrix products and attention stay (docs/measurements.md).
SELECTIVE_BUDGET = 0.7


def checkpoint_activations(model: LanguageModel, how: str, *, compiled: bool = False) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    none: keep all. selective: keep the results of matrix products and attention, recompute what is cheap (norms,
    rotations, gates). full: keep only each layer's input, recompute the layer (about a third more work).
    """
    if compiled:
        # The compiler's own partitioner decides what to keep; a checkpoint around compiled code could not look inside.
        # The setting is the process's: a later run must not inherit it.
        import torch._functorch.config

        torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if how == "selective" else 1.0
    if how == "none" or (how == "selective" and compiled):
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    layers: list[Any] = [*model.layers()]
    for layer in layers:
        # What transformers' own switch sets; setting it here works for every version without its deprecation notices.
        layer._gradient_checkpointing_func = functools.partial(checkpoint, **options)
        layer.gradient_checkpointing = True


def _keep_expensive(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = str(operation)
    expensive = ("aten.mm", "aten.addmm", "aten.bmm", "quantised_linear", "attention", "varlen_attn")
    return CheckpointPolicy.MUST_SAVE if any(part in name for part in expensive) else CheckpointPolicy.PREFER_RECOMPUTE


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
