"""A tokenizer as llama.cpp stores it: words, scores, kinds, merges and special ids. Knows no tensors, no files.

llama.cpp has two engines that matter here. `llama` is sentencepiece's BPE: pieces are joined by their score, unknown
characters become bytes. `gpt2` is BPE over bytes: a named pre-tokenizer cuts the text, merges join the parts.
Everything is read from the tokenizer as it is used in training, so that added tokens cannot be forgotten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zhibei.config.errors import UserError
from zhibei.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of words."""
BYTE_WORD = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")
ADDED_SCORE = -1000.0
UNNAMED_SCORE = -10000.0
SPACE = "\u2581"
NO_VOCABULARY = "gguf-tokenizer-without-engine"


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds. `engine` is "llama" or "gpt2"; `pre` names the pre-tokenizer of the latter."""

    engine: str
    words: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = "default"
    adds_space: bool | None = None
    adds_bos: bool = False
    special_ids: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_metadata(self) -> dict[str, Any]:
        """Keys and values of `tokenizer.ggml`."""
        values: dict[str, Any] = {
            "model": self.engine,
            "pre": self.pre,
            "tokens": list(self.words),
            "token_type": list(self.kinds),
            "scores": list(self.scores),
            "merges": list(self.merges),
            "add_bos_token": self.adds_bos,
            "add_eos_token": False,
            "add_space_prefix": self.adds_space,
            **{f"{name}_token_id": number for name, number in self.special_ids.items()},
        }
        return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None and value != []}


def read_vocabulary(tokenizer: Tokenizer, *, num_rows: int, terminator: str = "") -> Vocabulary:
    """The vocabulary of a tokenizer for a model whose embedding has `num_rows`; `pre` is found elsewhere.

    Rows without a word get names that no text contains. Raises UserError when the tokenizer has words beyond the
    rows, or is of a kind that llama.cpp has no engine for.
    """
    spec = json.loads(tokenizer.spec)
    engine = _engine(spec, tokenizer.source)
    names = {number: word for word, number in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    if max(names) >= num_rows:
        beyond = sorted(number for number in names if number >= num_rows)
        raise UserError(
            f"the tokenizer has {max(names) + 1:,} words and the model {num_rows:,} rows: "
            f"{names[beyond[0]]!r} is number {beyond[0]:,}",
            expected="a row of the embedding for every word",
            fix="remove the words that were added without rows (added_tokens.json, tokenizer_config.json, "
            "tokenizer.json), or give the tokenizer that was saved with these weights",
            where=tokenizer.source,
            pitfall="gguf-vocab-model-32000-tok-32001",
        )
    added = {one["id"]: one for one in spec.get("added_tokens") or ()}
    ranks = _ranks(spec["model"]) if engine == "llama" else {}
    words, kinds, scores = [], [], []
    for number in range(num_rows):
        word, kind, score = _word(number, names, added, engine)
        if kind == UNKNOWN or (number == tokenizer.unk_id and engine == "llama"):
            kind = UNKNOWN
        words.append(word)
        kinds.append(kind)
        scores.append(float(-ranks.get(word, 0)) if score is None else score)
    unnamed = num_rows - len(names)
    return Vocabulary(
        engine=engine,
        words=tuple(words),
        kinds=tuple(kinds),
        scores=tuple(scores) if engine == "llama" else (),
        merges=tuple(_merges(spec["model"])) if engine == "gpt2" else (),
        adds_space=_adds_space(spec) if engine == "llama" else None,
        adds_bos=tokenizer.adds_bos,
        special_ids=_special_ids(tokenizer, terminator),
        notes=(f"{unnamed:,} rows of the embedding have no word and cannot be drawn as text",) if unnamed else (),
    )


def with_pre(vocabulary: Vocabulary, pre: str) -> Vocabulary:
    return replace(vocabulary, pre=pre)


def _engine(spec: Mapping[str, Any], source: str) -> str:
    model = spec["model"]
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model.get("type") == "BPE" and _is_of_bytes(spec.get("pre_tokenizer")):
        return "gpt2"
    raise UserError(
        f"llama.cpp has no engine that is known to read this tokenizer: {model.get('type')}"
        + (" without byte fallback and not over bytes" if model.get("type") == "BPE" else ""),
        expected="sentencepiece's BPE with byte fallback (LLaMA, Mistral, Gemma, Phi-3), or BPE over bytes (GPT-2, "
        "LLaMA 3, Qwen)",
        fix="serve the Hugging Face folder itself: zhibei serve",
        where=source,
        pitfall=NO_VOCABULARY,
    )


def _is_of_bytes(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return any(step.get("type") == "ByteLevel" for step in steps_of(pre_tokenizer))


def steps_of(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normaliser, sequences taken apart."""
    if not part:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders")
    return [step for one in inner for step in steps_of(one)] if inner else [part]


def _word(
    number: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], engine: str
) -> tuple[str, int, float | None]:
    """Text, kind and score of one id; a score of None is that of its merge."""
    if number not in names:
        return f"[PAD{number}]", UNUSED, UNNAMED_SCORE
    word = names[number]
    if number in added:
        if added[number].get("special"):
            return word, CONTROL, ADDED_SCORE
        # In a text llama.cpp looks for these before it turns spaces into their sign.
        return word.replace(SPACE, " ") if engine == "llama" else word, USER_DEFINED, ADDED_SCORE
    if engine == "llama" and BYTE_WORD.match(word):
        return word, BYTE, 0.0
    return word, NORMAL, None


def _ranks(model: Mapping[str, Any]) -> dict[str, int]:
    """The place of the first merge that makes each piece: sentencepiece joins what has the best score first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_pairs(model)):
        ranks.setdefault("".join(pair), rank + 1)
    return ranks


def _pairs(model: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Merges as pairs; older files join them with a space."""
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Merges as llama.cpp reads them: two words and a space; a space inside of a word is its byte's letter."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(model)]


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that nobody wrote."""
    for step in steps_of(spec.get("normalizer")):
        if step.get("type") == "Prepend":
            return True
    for step in steps_of(spec.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _special_ids(tokenizer: Tokenizer, terminator: str) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.id_of(tokenizer.pad),
    }
    ends = [one for one in tokenizer.stop_ids(terminator) if one != tokenizer.eos_id]
    found["eot"] = ends[0] if ends else None
    return {name: number for name, number in found.items() if number is not None}
