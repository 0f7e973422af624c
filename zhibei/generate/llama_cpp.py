"""A GGUF file in this process, through llama.cpp: its words, tokens and logits. Knows no template, no sampling."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from zhibei.config.errors import UserError
from zhibei.generate.llama_library import Library, library, model_parameters

BATCH_TOKENS = 512
CONTROL = 1 << 3
"""LLAMA_TOKEN_ATTR_CONTROL."""


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
        handle = loaded.call("llama_model_load_from_file", os.fsencode(path), model_parameters(loaded, vocab_only))
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
        while self.contexts:
            self.loaded.call("llama_free", self.contexts.pop())
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
        logits_TV = np.empty((len(rows), size), dtype=np.float32)
        for at, row in enumerate(rows):
            found = call("llama_get_logits_ith", self.handle, row)
            ctypes.memmove(logits_TV[at].ctypes.data, found, 4 * size)
        return logits_TV

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        self.model.contexts.remove(self.handle)
        self.model.loaded.call("llama_free", self.handle)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        if count < len(self.tokens):
            memory = self.model.loaded.call("llama_get_memory", self.handle)
            if not self.model.loaded.call("llama_memory_seq_rm", memory, 0, count, -1):
                count = 0  # a model with a state instead of keys and values forgets all or nothing
                self.model.loaded.call("llama_memory_seq_rm", memory, 0, -1, -1)
            del self.tokens[count:]
