"""The border to llama.cpp: a GGUF file in this process, its tokenizer and its logits. Knows no template, no sampling.

The package xllamacpp ships llama.cpp with its C interface exported, which is called here through ctypes. Two facts
about its structures are relied on (n_ctx, n_batch, n_ubatch begin llama_context_params; vocab_only follows seven
pointers and four numbers in llama_model_params). Both are tried when the library is loaded, so that another version is
refused with a message and never misread. Source of names and meanings: llama.h of ggml-org/llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError

INSTALL = "pip install 'zhibei[gguf]'"
TRIED_VERSION = "2026.10.11549"
PARAMETER_BYTES = 512
"""More than either structure of parameters needs; what is beyond is never read."""
VOCAB_ONLY_AT = 72
DEFAULT_SIZES = (512, 2048, 512)
"""n_ctx, n_batch and n_ubatch of llama_context_default_params."""
BATCH_TOKENS = 512
CONTROL = 1 << 3
"""LLAMA_TOKEN_ATTR_CONTROL."""
ERROR_LEVELS = (3, 4)
"""Warnings and errors, of ggml_log_level."""


class _Parameters(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_ubyte * PARAMETER_BYTES),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P, _I, _S = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG, _P)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_P, (_S, _Parameters)),
    "llama_model_free": (None, (_P,)),
    "llama_init_from_model": (_P, (_P, _Parameters)),
    "llama_free": (None, (_P,)),
    "llama_n_ctx": (ctypes.c_uint32, (_P,)),
    "llama_n_batch": (ctypes.c_uint32, (_P,)),
    "llama_set_n_threads": (None, (_P, _I, _I)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_model_n_embd": (_I, (_P,)),
    "llama_model_meta_val_str": (_I, (_P, _S, ctypes.c_void_p, ctypes.c_size_t)),
    "llama_model_chat_template": (_S, (_P, _S)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_vocab_is_eog": (ctypes.c_bool, (_P, _I)),
    "llama_vocab_get_attr": (ctypes.c_int, (_P, _I)),
    "llama_vocab_get_text": (_S, (_P, _I)),
    "llama_vocab_bos": (_I, (_P,)),
    "llama_vocab_eos": (_I, (_P,)),
    "llama_vocab_pad": (_I, (_P,)),
    "llama_vocab_get_add_bos": (ctypes.c_bool, (_P,)),
    "llama_tokenize": (_I, (_P, _S, _I, ctypes.POINTER(_I), _I, ctypes.c_bool, ctypes.c_bool)),
    "llama_token_to_piece": (_I, (_P, _I, ctypes.c_void_p, _I, _I, ctypes.c_bool)),
    "llama_detokenize": (_I, (_P, ctypes.POINTER(_I), _I, ctypes.c_void_p, _I, ctypes.c_bool, ctypes.c_bool)),
    "llama_batch_init": (_Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_I, (_P, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_P, _I)),
    "llama_get_memory": (_P, (_P,)),
    "llama_memory_seq_rm": (ctypes.c_bool, (_P, _I, _I, _I)),
}


class Library:
    """llama.cpp as loaded, with what it last complained about."""

    def __init__(self, file: Path, version: str) -> None:
        self.file, self.version = file, version
        self.complaints: list[str] = []
        loaded = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, list(arguments)
            setattr(self, name, function)
        self.quantize = loaded
        # Kept as an attribute: a collected callback would be called all the same.
        self._listener = _LOG(self._listen)
        self.call("llama_log_set", self._listener, None)
        self.call("llama_backend_init")

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def _listen(self, level: int, text: bytes | None, _data: Any) -> None:
        if level in ERROR_LEVELS and text:
            self.complaints.append(text.decode(errors="replace").strip())
            del self.complaints[:-20]

    def last_complaint(self) -> str:
        return next((line for line in reversed(self.complaints) if "rror" in line), "") or (
            self.complaints[-1] if self.complaints else "llama.cpp gave no reason"
        )


def is_installed() -> bool:
    """Whether a GGUF file can be read here by llama.cpp; imports nothing."""
    from importlib.util import find_spec

    return find_spec("xllamacpp") is not None


@lru_cache(maxsize=1)
def library() -> Library:
    """llama.cpp, loaded once and tried. Raises UserError when it is not installed or is built otherwise."""
    try:
        import xllamacpp

        binary = import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise UserError(
            f"GGUF files are read by llama.cpp, which is not installed here ({error})",
            expected="the package xllamacpp",
            fix=INSTALL,
        ) from None
    version = str(getattr(xllamacpp, "__version__", "unknown"))
    try:
        loaded = Library(Path(str(binary.__file__)), version)
    except (AttributeError, OSError) as problem:
        raise _other_build(version, str(problem)) from None
    _require_known_layout(loaded)
    return loaded


def _other_build(version: str, why: str) -> UserError:
    return UserError(
        f"xllamacpp {version} is built otherwise than expected: {why}",
        expected=f"a version like {TRIED_VERSION}, with llama.cpp's C interface exported",
        fix=f"pip install xllamacpp=={TRIED_VERSION}",
    )


def _require_known_layout(loaded: Library) -> None:
    sizes = np.frombuffer(bytes(loaded.call("llama_context_default_params").raw), dtype=np.uint32)[:3]
    if tuple(int(size) for size in sizes) != DEFAULT_SIZES:
        raise _other_build(loaded.version, f"its context sizes are {sizes.tolist()}, not {list(DEFAULT_SIZES)}")
    empty = loaded.call("llama_batch_init", 4, 0, 1)
    is_as_known = empty.n_tokens == 0 and bool(empty.token) and not empty.embd and bool(empty.logits)
    loaded.call("llama_batch_free", empty)
    if not is_as_known:
        raise _other_build(loaded.version, "its batches have other fields")
    with tempfile.TemporaryDirectory() as folder:
        # A vocabulary without weights loads only when vocab_only is really what was set.
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(_tiny_vocabulary())
        model = loaded.call("llama_model_load_from_file", str(path).encode(), _model_parameters(loaded, True))
        if not model:
            raise _other_build(loaded.version, f"a file of words alone does not load ({loaded.last_complaint()})")
        num_words = loaded.call("llama_vocab_n_tokens", loaded.call("llama_model_get_vocab", model))
        loaded.call("llama_model_free", model)
        if num_words != len(_WORDS):
            raise _other_build(loaded.version, f"it finds {num_words} words where {len(_WORDS)} are")


_WORDS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))


def _tiny_vocabulary() -> bytes:
    """A GGUF file of 259 words and no tensor. Layout: ggml/docs/gguf.md, version 3."""

    def text(value: str) -> bytes:
        return len(value.encode()).to_bytes(8, "little") + value.encode()

    def string(key: str, value: str) -> bytes:
        return text(key) + (8).to_bytes(4, "little") + text(value)

    def array(key: str, kind: int, values: bytes) -> bytes:
        header = (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + len(_WORDS).to_bytes(8, "little")
        return text(key) + header + values

    kinds = np.array([2, 3, 3, *[6] * 256], dtype=np.int32)
    entries = [
        string("general.architecture", "llama"),
        string("tokenizer.ggml.model", "llama"),
        array("tokenizer.ggml.tokens", 8, b"".join(text(word) for word in _WORDS)),
        array("tokenizer.ggml.scores", 6, np.zeros(len(_WORDS), dtype=np.float32).tobytes()),
        array("tokenizer.ggml.token_type", 5, kinds.tobytes()),
    ]
    counts = (0).to_bytes(8, "little") + len(entries).to_bytes(8, "little")
    return b"GGUF" + (3).to_bytes(4, "little") + counts + b"".join(entries)


def _model_parameters(loaded: Library, vocab_only: bool) -> _Parameters:
    parameters = loaded.call("llama_model_default_params")
    parameters.raw[VOCAB_ONLY_AT] = int(vocab_only)
    return parameters


@dataclass
class GgufModel:
    """A loaded GGUF file. Not thread-safe: one thread at a time uses it and what it opened."""

    path: Path
    handle: int
    loaded: Library
    has_weights: bool = True
    contexts: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, *, vocab_only: bool = False) -> GgufModel:
        """Read a file; of a split one the first part. Raises UserError with llama.cpp's own reason."""
        loaded = library()
        loaded.complaints.clear()
        handle = loaded.call("llama_model_load_from_file", os.fsencode(path), _model_parameters(loaded, vocab_only))
        if not handle:
            raise UserError(
                f"llama.cpp cannot read this file: {loaded.last_complaint()}",
                expected="a whole GGUF file of an architecture that llama.cpp knows (of a split file: its first part)",
                fix="copy or export it again; zhibei export writes such files",
                where=str(path),
            )
        return cls(path=path, handle=handle, loaded=loaded, has_weights=not vocab_only)

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        for context in self.contexts:
            self.loaded.call("llama_free", context)
        self.contexts.clear()
        if self.handle:
            self.loaded.call("llama_model_free", self.handle)
            self.handle = 0

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.close()

    @cached_property
    def vocabulary(self) -> int:
        return self.loaded.call("llama_model_get_vocab", self.handle)

    @cached_property
    def num_tokens(self) -> int:
        return self.loaded.call("llama_vocab_n_tokens", self.vocabulary)

    @cached_property
    def context_tokens(self) -> int:
        """Most tokens that the model was trained on at once."""
        return self.loaded.call("llama_model_n_ctx_train", self.handle)

    @cached_property
    def chat_template(self) -> str:
        """The Jinja template in the metadata, or ""."""
        found = self.loaded.call("llama_model_chat_template", self.handle, None)
        return found.decode() if found else ""

    @cached_property
    def adds_bos(self) -> bool:
        return self.loaded.call("llama_vocab_get_add_bos", self.vocabulary)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that llama.cpp takes for the end of an answer."""
        count = range(self.num_tokens)
        return tuple(one for one in count if self.loaded.call("llama_vocab_is_eog", self.vocabulary, one))

    def special(self, name: str) -> int | None:
        """The id of `bos`, `eos` or `pad`; None when the file names none."""
        found = self.loaded.call(f"llama_vocab_{name}", self.vocabulary)
        return found if found >= 0 else None

    def text_of(self, token: int) -> str:
        return self.loaded.call("llama_vocab_get_text", self.vocabulary, token).decode(errors="replace")

    def is_control(self, token: int) -> bool:
        return bool(self.loaded.call("llama_vocab_get_attr", self.vocabulary, token) & CONTROL)

    def value_of(self, key: str) -> str | None:
        """A value of the metadata as text."""
        room = ctypes.create_string_buffer(4096)
        size = self.loaded.call("llama_model_meta_val_str", self.handle, key.encode(), room, len(room))
        return None if size < 0 else room.value.decode(errors="replace")

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text in which control tokens are spelled out; nothing is added unless `add_special`."""
        raw = text.encode()
        room = len(raw) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.loaded.call("llama_tokenize", self.vocabulary, raw, len(raw), ids, room, add_special, True)
        if count < 0:
            raise UserError(
                "llama.cpp cannot split this text into tokens", expected="a text of valid characters", fix="shorten it"
            )
        return list(ids[:count])

    def decode(self, tokens: Sequence[int], *, keep_control: bool = False) -> str:
        """The words of some tokens; control tokens only when asked for."""
        return b"".join(self.piece(token, keep_control=keep_control) for token in tokens).decode(errors="replace")

    def piece(self, token: int, *, keep_control: bool = False) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        room = ctypes.create_string_buffer(512)
        size = self.loaded.call("llama_token_to_piece", self.vocabulary, token, room, len(room), 0, keep_control)
        if size < 0:
            room = ctypes.create_string_buffer(-size)
            size = self.loaded.call("llama_token_to_piece", self.vocabulary, token, room, -size, 0, keep_control)
        return room.raw[:size]

    def open(self, *, context_tokens: int, num_threads: int | None = None) -> GgufContext:
        """Room for one conversation of `context_tokens`."""
        parameters = self.loaded.call("llama_context_default_params")
        sizes = np.array([context_tokens, min(BATCH_TOKENS, context_tokens), min(BATCH_TOKENS, context_tokens)])
        ctypes.memmove(parameters.raw, sizes.astype(np.uint32).tobytes(), 12)
        context = self.loaded.call("llama_init_from_model", self.handle, parameters)
        if not context:
            raise UserError(
                f"llama.cpp opens no context of {context_tokens} tokens: {self.loaded.last_complaint()}",
                expected="memory for the keys and values of that many tokens",
                fix="ask for fewer tokens, or close other programs",
                where=str(self.path),
            )
        self.contexts.append(context)
        threads = num_threads or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
        self.loaded.call("llama_set_n_threads", context, threads, threads)
        return GgufContext(self, context, self.loaded.call("llama_n_ctx", context))


@dataclass
class GgufContext:
    """The keys and values of one conversation, and how many tokens of it are read."""

    model: GgufModel
    handle: int
    room: int
    tokens: list[int] = field(default_factory=list)

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> np.ndarray:
        """Read more tokens; the logits [T, V] after each of them, or [1, V] after the last.

        Raises UserError when the context has no room for them.
        """
        if not tokens or len(self.tokens) + len(tokens) > self.room:
            raise UserError(
                f"{len(self.tokens)} and {len(tokens)} tokens do not fit into a context of {self.room}",
                expected="at least one token and no more than the context holds",
                fix="shorten the prompt",
            )
        found = [self._feed_some(tokens[at : at + BATCH_TOKENS], every) for at in range(0, len(tokens), BATCH_TOKENS)]
        return np.concatenate(found) if every else found[-1]

    def _feed_some(self, tokens: Sequence[int], every: bool) -> np.ndarray:
        call = self.model.loaded.call
        batch = call("llama_batch_init", len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for row, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = len(self.tokens) + row
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = every or row == len(tokens) - 1
            code = call("llama_decode", self.handle, batch)
        finally:
            call("llama_batch_free", batch)
        if code:
            raise UserError(
                f"llama.cpp failed on {len(tokens)} tokens (code {code}): {self.model.loaded.last_complaint()}",
                expected="a file that its own engine can run",
                fix="export the file again, or try it with llama.cpp's own program",
                where=str(self.model.path),
            )
        self.tokens += tokens
        rows = range(len(tokens)) if every else (len(tokens) - 1,)
        size = self.model.num_tokens
        return np.stack(
            [np.ctypeslib.as_array(call("llama_get_logits_ith", self.handle, row), (size,)).copy() for row in rows]
        )

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        if count < len(self.tokens):
            memory = self.model.loaded.call("llama_get_memory", self.handle)
            if not self.model.loaded.call("llama_memory_seq_rm", memory, 0, count, -1):
                count = 0  # a model with a state instead of keys and values forgets all or nothing
                self.model.loaded.call("llama_memory_seq_rm", memory, 0, -1, -1)
            del self.tokens[count:]
