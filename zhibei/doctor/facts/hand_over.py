"""Whether what `hand_over` asks for can be made of this tokenizer and these adapters: the exporters themselves say.

Runs llama.cpp over probe texts where a GGUF file is asked for and llama.cpp is installed. Knows no run directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.config.hand_over import parts_of
from zhibei.config.run import RunFile
from zhibei.text.tokenizer import Tokenizer

GGUF_PACKAGES = ("gguf", "xllamacpp")


@dataclass(frozen=True, slots=True)
class HandOverFacts:
    """What an exporter refuses; None where it would not, or where it was not asked."""

    tokenizer: UserError | None = None
    """Why llama.cpp cannot read as this tokenizer does, under the name of its pitfall."""
    adapter: UserError | None = None
    """Why an adapter that is continued cannot be merged."""


def read_hand_over(
    run: RunFile, *, tokenizer: Tokenizer | None, num_rows: int | None, adapter: Path | None
) -> HandOverFacts:
    """Ask the exporters; `num_rows`: of the embedding, `adapter`: the one that is trained on."""
    kinds = {parts_of(form)[0] for form in run.hand_over}
    has_packages = all(find_spec(name) is not None for name in GGUF_PACKAGES)
    is_read = tokenizer is not None and num_rows is not None and "gguf" in kinds and has_packages
    return HandOverFacts(
        tokenizer=_refusal_of_words(tokenizer, num_rows) if is_read and tokenizer and num_rows else None,
        adapter=_refusal_of_adapter(adapter) if adapter is not None and run.model.method != "full" else None,
    )


def _refusal_of_words(tokenizer: Tokenizer, num_rows: int) -> UserError | None:
    from zhibei.export.gguf.pretokenizer import prove
    from zhibei.export.gguf.vocabulary import read_vocabulary

    try:
        prove(read_vocabulary(tokenizer, num_rows=num_rows), tokenizer)
    except UserError as refusal:
        return refusal
    return None


def _refusal_of_adapter(folder: Path) -> UserError | None:
    from zhibei.export.adapters import read_adapter_folder

    try:
        read_adapter_folder(folder).changes()
    except UserError as refusal:
        return refusal
    return None
