"""A GGUF file as one side of a comparison: logits, tokens and prompts as llama.cpp gives them. Writes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zhibei.generate.gguf_words import prompt_tokens, wording_of
from zhibei.generate.llama_cpp import GgufModel
from zhibei.text.messages import Message

FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


@dataclass
class GgufSide:
    """One GGUF file, or the first part of a split one. Weights are read when logits are asked for."""

    path: Path
    template: str | None = None
    _words: GgufModel | None = field(default=None, repr=False)
    _model: GgufModel | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def bytes_on_disk(self) -> int:
        return sum(part.stat().st_size for part in parts_of(self.path))

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """fp32 [T, V] of each row. Raises UserError when llama.cpp cannot read or run the file."""
        if self._model is None:
            self._model = GgufModel.load(self.path)
        found = []
        for row in rows:
            context = self._model.open(context_tokens=len(row))
            found.append(context.feed(list(row), every=True))
            context.close()
        return found

    def encode(self, text: str) -> list[int]:
        return self._vocabulary().encode(text)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Raises UserError where the file has no template, and where it refuses the messages."""
        model = self._vocabulary()
        return prompt_tokens(model, wording_of(model, asked=self.template), messages)

    def close(self) -> None:
        for model in (self._words, self._model):
            if model is not None:
                model.close()
        self._words = self._model = None

    def _vocabulary(self) -> GgufModel:
        if self._words is None:
            self._words = GgufModel.load(self.path, vocab_only=True)
        return self._words


def parts_of(path: Path) -> list[Path]:
    """The file itself, or all parts of which it is the first."""
    found = FIRST_PART.search(path.name)
    if not found:
        return [path]
    stem, count = path.name[: found.start()], found.group(1)
    return sorted(path.parent.glob(f"{stem}-?????-of-{count}.gguf"))
