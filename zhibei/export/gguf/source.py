"""What a GGUF file is made from: sizes, tensors read one at a time, tokenizer and template. Loads no model.

An adapter is merged into its base while its tensors are read, in fp32, so that nothing has to be merged beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zhibei.config.errors import UserError
from zhibei.export.adapters import mixed_changes, read_adapter_folder
from zhibei.export.merge import plan_merge, tie_of
from zhibei.model.locate import Located, locate
from zhibei.model.score_model import holds_scores
from zhibei.model.wording import choose_template, tokenizer_place, trained_system
from zhibei.store.files import read_json
from zhibei.store.manifest import require_base
from zhibei.store.shards import LazyTensor, read_tensors
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer, load_tokenizer

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Read:
    """A tensor that is read when asked for, as fp32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A model on the disk. `template` is None where neither its run nor its tokenizer names one."""

    path: str
    found: Located
    config: Mapping[str, Any]
    tensors: Mapping[str, Read]
    tokenizer: Tokenizer
    template: Template | None
    system: str | None = None
    """The system prompt that training put in front of conversations without one."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people would call the model: the run, the adapter, or the folder; `model` is the name of none."""
        run = self.found.run
        place = (run.path if run else self.found.adapter or Path(self.found.weights)).resolve()
        return place.parent.name if place.name == "model" else place.name

    @property
    def folder(self) -> Path:
        return Path(self.found.weights)


def open_source(path: str, *, base: str | None = None, template: str | None = None) -> Source:
    """The model at a path: a run directory, a Hugging Face folder, or a PEFT adapter on its base.

    Raises UserError when something is missing, when it is a reward model, and when its weights are not here.
    """
    found = locate(path, base=base)
    if holds_scores(found):
        raise UserError(
            f"{path} is a reward model: llama.cpp writes text with a model, and this one gives scores",
            expected="a language model, such as a run of stage sft or dpo",
            fix="export the model that it was made from, or score in Python: zhibei.judge(PATH)",
            where=path,
        )
    folder = Path(found.weights)
    if not folder.is_dir():
        raise UserError(
            f"{found.weights} is not on this disk",
            expected="a folder with config.json and *.safetensors",
            fix=f"download it first: hf download {found.weights} --local-dir FOLDER",
            where=path,
        )
    tokenizer = load_tokenizer(tokenizer_place(found))
    chosen, notes = _template(found, tokenizer, template)
    tensors, config, more = _tensors(found, _text_config(folder))
    return Source(
        path=path,
        found=found,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        template=chosen,
        system=trained_system(found),
        notes=(*notes, *more),
    )


def _template(found: Located, tokenizer: Tokenizer, asked: str | None) -> tuple[Template | None, tuple[str, ...]]:
    """A base model may have none; then it continues text, and the file says nothing of chats."""
    try:
        return choose_template(found, tokenizer, asked=asked)
    except UserError:
        if asked is not None or found.run is not None:
            raise
        return None, ("there is no chat template in it: name the one it was trained with, if it was trained to chat",)


def _text_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(
            "config.json holds no settings",
            expected="a JSON object with model_type and sizes",
            fix="copy the file again from the model's source",
            where=str(folder / "config.json"),
        )
    return config


def _tensors(found: Located, config: dict[str, Any]) -> tuple[dict[str, Read], dict[str, Any], tuple[str, ...]]:
    """Every tensor of the merged model in fp32, the config that fits them, and what a person should know."""
    folder = Path(found.weights)
    stored = read_tensors(folder, stem="model")
    odd = next((name for name in stored if stored.spec(name).dtype not in FLOATS), None)
    if odd is not None:
        raise UserError(
            f"tensor {odd} is stored as {stored.spec(odd).dtype}: these weights are quantised already",
            expected=f"weights as {', '.join(FLOATS)}",
            fix="export from the 16-bit model; quantising twice loses twice",
            where=str(folder),
            pitfall="hand-over-cannot-merge",
        )
    changes = {}
    if found.adapter is not None:
        require_base(found.adapter, folder)
        changes = mixed_changes([read_adapter_folder(found.adapter)])
    plan = plan_merge(stored, config, changes, dtype=torch.float32, is_tied=tie_of(folder, config))
    tensors = {name: Read(tensor.shape, partial(_values, tensor)) for name, tensor in plan.tensors.items()}
    return tensors, plan.config, plan.notes


def _values(tensor: LazyTensor) -> np.ndarray:
    return tensor.read().numpy()
