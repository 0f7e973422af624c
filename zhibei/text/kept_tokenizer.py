"""Checked tokenizers kept on disk under the content of their files, so that loading one again needs no transformers."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers

from zhibei.text.tokenizer import Tokenizer

# Raise when check_tokenizer makes something else of the same files.
KEPT_VERSION = 1
# Everything that transformers may read to make a tokenizer; config.json names the family.
PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*")
IS_WEIGHTS = ("model.safetensors.index.json", "adapter_config.json", "manifest.json")
FIELDS = ("spec", "source", "eos", "bos", "pad", "unk", "adds_bos", "chat_template", "named_specials", "notes")
MOST_BYTES = 64 * 2**20


def kept_or_loaded(folder: Path, root: Path, *, source: str, load: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer of `folder`: read back if its files are those of an earlier time, else loaded and kept.

    `source` is what the user called it. A cache that cannot be read or written costs time and nothing else.
    """
    key = _key(folder)
    if key is None:
        return load()
    place = root / "tokenizers" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["sha256"] == _sha256_of(kept["tokenizer"]):
            return _from_fields({**kept["tokenizer"], "source": source})
    tokenizer = load()
    with suppress(OSError):
        _write(place, tokenizer)
    return tokenizer


def _key(folder: Path) -> str | None:
    """Hash of names, contents and versions; None where a file is too large to be one of a tokenizer."""
    sha256 = hashlib.sha256(f"{KEPT_VERSION} {tokenizers.__version__} {metadata.version('transformers')}".encode())
    paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.name not in IS_WEIGHTS})
    for path in paths:
        if path.is_file():
            if path.stat().st_size > MOST_BYTES:
                return None
            content = path.read_bytes()
            sha256.update(f"{path.relative_to(folder)} {len(content)} ".encode())
            sha256.update(content)
    return sha256.hexdigest()[:32]


def _fields(tokenizer: Tokenizer) -> dict[str, Any]:
    whole = {name: getattr(tokenizer, name) for name in FIELDS}
    return {**whole, "source": "", "notes": list(tokenizer.notes), "named_specials": dict(tokenizer.named_specials)}


def _from_fields(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer(**{**fields, "notes": tuple(fields["notes"])})


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _write(place: Path, tokenizer: Tokenizer) -> None:
    fields = _fields(tokenizer)
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".new-", dir=place.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"sha256": _sha256_of(fields), "tokenizer": fields}, file)
    os.replace(name, place)
