"""Sides of a comparison that transformers loads: whole folders, runs, adapters on their base. Writes no file."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zhibei.config.errors import UserError
from zhibei.data.encode import with_system
from zhibei.export.parity import Side
from zhibei.export.sources import weighted_path
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate
from zhibei.model.device import choose_device
from zhibei.model.load import load_for_inference
from zhibei.model.locate import Located, locate
from zhibei.model.lora import read_adapter_beside
from zhibei.model.wording import choose_template, tokenizer_place, trained_system
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer, load_hugging_face_tokenizer, load_tokenizer

MEMORY_SHARE = 0.7
OWN_ROW_TOKENS = 48


@dataclass
class FolderSide:
    """A run, a Hugging Face folder, or adapters on a base (`others`: further adapters, each with its weight).

    What a run trained on is asked of zhibei's own template, as training, chat and server do; a folder without a run is
    asked through transformers' chat template, as every other program does.
    """

    path: str
    base: str | None = None
    others: tuple[tuple[str, float], ...] = ()
    weight: float = 1.0
    device: str = "auto"
    precision: str = "auto"
    quantize: Any = "none"
    label: str = ""
    speak: Callable[[Sequence[Message]], str] | None = None
    """What writes prompts in place of the model's own template, where another was asked for."""
    _model: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.label or self.path

    @cached_property
    def found(self) -> Located:
        return locate(self.path, base=self.base)

    @property
    def bytes_on_disk(self) -> int:
        """The weights, adapters with their base."""
        folders = [Path(self.found.weights), self.found.adapter, *(Path(path) for path, _ in self.others)]
        return sum(
            file.stat().st_size
            for folder in folders
            if folder is not None and folder.is_dir()
            for file in folder.glob("*.safetensors")
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(tokenizer_place(self.found))

    @cached_property
    def template(self) -> Template | None:
        try:
            return choose_template(self.found, self.tokenizer, asked=None)[0]
        except UserError:
            return None

    @cached_property
    def _system(self) -> str | None:
        """What training put in front of conversations without a system prompt, and chat and server do."""
        return trained_system(self.found)

    @cached_property
    def _theirs(self) -> Any:
        return load_hugging_face_tokenizer(tokenizer_place(self.found))

    def encode(self, text: str) -> list[int]:
        if self.found.run is not None:
            return self.tokenizer.encode(text)
        return self._theirs.encode(text, add_special_tokens=False)

    def render(self, messages: Sequence[Message]) -> list[int]:
        if self.speak is not None:
            return self.tokenizer.encode(self.speak(messages))
        if self.found.run is not None:
            if self.template is None:
                raise _no_template(self.name)
            begun = with_system(messages, self._system)
            return self.tokenizer.encode(self.template.render(begun, answer_next=True).text)
        if not self._theirs.chat_template:
            raise _no_template(self.name)
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise UserError(
                f"the chat template refuses: {error}",
                expected="messages it knows",
                fix="change the conversation",
                where=self.name,
            ) from error
        return self._theirs.encode(text, add_special_tokens=False)

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        model = self._loaded()
        found = []
        with model.sampling() as hf, torch.no_grad():
            for row in rows:
                tokens_BT = torch.tensor([list(row)], device=model.device)
                found.append(hf(input_ids=tokens_BT, use_cache=False).logits[0].float().cpu().numpy())
        return found

    def rows_of_its_own(self, conversations: Sequence[Sequence[Message]], *, seed: int = 0) -> list[list[int]]:
        """What the model itself writes after each conversation, its prompt included."""
        prompts = []
        for messages in conversations:
            try:
                prompts.append(self.render(messages))
            except UserError:
                prompts.append(self.encode(messages[-1].content))
        prompts = [prompt for prompt in prompts if prompt]
        options = SamplingOptions(max_new_tokens=OWN_ROW_TOKENS, temperature=1.0, seed=seed, overflow="fewer_tokens")
        model = self._loaded()
        with model.sampling() as hf:
            answers = generate(
                hf, prompts, options=options, stop_ids=[self.tokenizer.eos_id], pad_id=self.tokenizer.pad_id
            )
        return [[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)]

    def _loaded(self) -> Any:
        if self._model is None:
            self._require_memory()
            model = load_for_inference(
                self.path, base=self.base, device=self.device, precision=self.precision, quantize=self.quantize
            )
            if self.others or self.weight != 1:
                put_beside(model.hf, self.others, first_weight=self.weight)
            self._model = model
        return self._model

    def _require_memory(self) -> None:
        """Raises UserError when the weights would not fit into the host's memory; a device says so by itself."""
        free = available_bytes()
        if choose_device(self.device).type != "cpu" or free is None:
            return
        factor = {"fp32": 2.0, "auto": 2.0}.get(self.precision, 1.0)  # most files hold 16 bits
        if self.bytes_on_disk * factor > MEMORY_SHARE * free:
            raise UserError(
                f"comparing needs about {self.bytes_on_disk * factor / 2**30:.1f} GiB of memory for {self.name}; "
                f"{free / 2**30:.1f} GiB are free",
                expected="room for one model at a time",
                fix="compare with --precision bf16, on a GPU (--device cuda), or leave it out here (--no-parity) and "
                "compare elsewhere: zhibei parity A B",
                where=self.name,
            )

    def close(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def put_beside(hf: Any, others: Sequence[tuple[str, float]], *, first_weight: float) -> None:
    """Let several adapters act at once, each with its weight: PEFT adds what active adapters give."""
    weights = {"default": first_weight}
    for number, (folder, weight) in enumerate(others, start=2):
        weights[f"adapter{number}"] = weight
        read_adapter_beside(hf, folder, name=f"adapter{number}")
    hf.base_model.set_adapter(list(weights))
    for module in hf.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            for name in set(scaling) & set(weights):
                scaling[name] *= weights[name]
    hf.requires_grad_(False)


def available_bytes() -> int | None:
    """Host memory that programs may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _no_template(name: str) -> UserError:
    return UserError("no chat template", expected="a template", fix="train or save the model with one", where=name)


def open_side(
    path: str, *, base: str | None = None, device: str = "auto", precision: str = "auto", quantize: str = "none"
) -> Side:
    """The side at a path: a GGUF file, a run, a Hugging Face folder, a hub id, or an adapter (`PATH:0.7` for a share).

    Raises UserError when nothing is there.
    """
    if path.lower().endswith(".gguf"):
        from zhibei.export.gguf_side import GgufSide

        return GgufSide(Path(path))
    plain, weight = weighted_path(path)
    side = FolderSide(plain, base, weight=weight, device=device, precision=precision, quantize=quantize)
    _ = side.found
    return side
