"""Low-rank adapters through PEFT: add, continue, list. Knows layer names, not rows or loops."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection
from zhibei.model.quantized import quantised_layers
from zhibei.text.hub import no_fetched_kernels

HEADS: dict[str, list[str]] = {"CAUSAL_LM": [], "SEQ_CLS": ["score"]}
"""What PEFT's tasks train in full beside the adapters."""


def import_peft() -> Any:
    """PEFT, which imports bitsandbytes where that is installed."""
    with no_fetched_kernels():
        import peft
    # PEFT 0.21 asks transformers 5.23 by a former name; a user can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    return peft


def add_adapters(hf: Any, section: LoraSection, *, seed: int, task: str = "CAUSAL_LM") -> Any:
    """The model wrapped in PEFT, its base frozen. `section.adapter` continues from a folder, else fresh adapters.

    `task` SEQ_CLS is a reward model: its head `score` is trained in full beside the adapters.

    Raises UserError for a target that matches no layer: PEFT would train the others and record the name as a target.
    """
    peft = import_peft()

    if section.adapter is not None:
        return _continue_from(hf, Path(section.adapter))
    linear = [name for name, module in hf.named_modules() if isinstance(module, torch.nn.Linear)]
    if isinstance(section.targets, list):
        _check_names(section.targets, linear, where="lora.targets")
    _check_names(section.modules_to_save, [name for name, _ in hf.named_modules()], where="lora.modules_to_save")
    _refuse_packed(section.modules_to_save, hf)
    config = peft.LoraConfig(
        task_type=task,
        r=section.rank,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType] (fractions work; the annotation says int)
        lora_dropout=section.dropout,
        target_modules=section.targets,
        use_rslora=section.rslora,
        use_dora=section.dora,
        modules_to_save=[*section.modules_to_save, *HEADS[task]] or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers 5.23 for an attribute under its old name; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        # autocast_adapter_dtype=False: adapters stay in the model's type; their fp32 master copy is the optimiser's.
        return peft.get_peft_model(hf, config, autocast_adapter_dtype=False)


def _refuse_packed(names: list[str], hf: Any) -> None:
    """PEFT would copy a packed matrix and call it trained; there is nothing in it that could learn."""
    for packed in quantised_layers(hf):
        named = [name for name in names if packed == name or packed.endswith("." + name)]
        if named:
            raise UserError(
                f"lora.modules_to_save: {named[0]} is a layer whose weights are held in few bits",
                expected="modules that stay in 16 bits on a quantised base: embed_tokens, lm_head, norms",
                fix=f"remove {named[0]} from lora.modules_to_save (an adapter can still be put on it: lora.targets)",
                where="lora.modules_to_save",
                pitfall="modules-to-save-in-few-bits",
            )


def _continue_from(hf: Any, folder: Path) -> Any:
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds no adapter_config.json",
            expected="a PEFT folder (adapter_config.json and adapter_model.safetensors)",
            fix="point lora.adapter at the folder that an adapter run wrote, e.g. runs/NAME/model",
            where="lora.adapter",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no adapter_model.safetensors",
            expected="adapter weights as safetensors; pickled .bin files are never opened",
            fix="convert the adapter to safetensors where you trust it",
            where="lora.adapter",
        )
    return read_adapter(hf, folder, is_trainable=True)


def read_adapter(hf: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """The model wrapped with the adapter of a PEFT folder, as PEFT reads it."""
    peft = import_peft()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.PeftModel.from_pretrained(hf, str(folder), is_trainable=is_trainable, autocast_adapter_dtype=False)


def read_adapter_beside(model: Any, folder: str, *, name: str) -> None:
    """Put the adapter of a PEFT folder beside those that a wrapped model has, frozen and under another name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model.load_adapter(folder, name, is_trainable=False, autocast_adapter_dtype=False)


def _check_names(names: list[str], modules: list[str], *, where: str) -> None:
    for name in names:
        if any(module == name or module.endswith("." + name) for module in modules):
            continue
        last_parts = sorted({module.rsplit(".", 1)[-1] for module in modules if module} - {"layers"})
        last_parts = [part for part in last_parts if not part.isdigit()]
        near = difflib.get_close_matches(name, last_parts, n=1)
        raise UserError(
            f"'{name}' matches no layer of this model",
            expected=f"names among: {', '.join(last_parts)}",
            fix=f"write '{near[0]}'" if near else "use all-linear, or names from the list",
            where=where,
        )
