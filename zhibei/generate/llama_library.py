"""llama.cpp itself: where its binary is, which functions it has, and that it is built as expected. Knows no file.

The package xllamacpp ships llama.cpp with its C interface exported, which is called here through ctypes. Two facts
about its structures are relied on (n_ctx, n_batch, n_ubatch begin llama_context_params; vocab_only follows seven
pointers and four numbers in llama_model_params). Both are tried when the library is loaded, so that another version is
refused with a message and never misread. Source of names and meanings: llama.h of ggml-org/llama.cpp.
"""

from __future__ import annotations

import ctypes
import tempfile
from functools import lru_cache
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
ERROR_LEVELS = (3, 4)
"""Warnings and errors, of ggml_log_level."""


class Parameters(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_ubyte * PARAMETER_BYTES),)


class Batch(ctypes.Structure):
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
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (_P, (_S, Parameters)),
    "llama_model_free": (None, (_P,)),
    "llama_supports_gpu_offload": (ctypes.c_bool, ()),
    "llama_init_from_model": (_P, (_P, Parameters)),
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
    "llama_batch_init": (Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (_I, (_P, Batch)),
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
        model = loaded.call("llama_model_load_from_file", str(path).encode(), model_parameters(loaded, True))
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


def model_parameters(loaded: Library, vocab_only: bool) -> Parameters:
    parameters = loaded.call("llama_model_default_params")
    parameters.raw[VOCAB_ONLY_AT] = int(vocab_only)
    return parameters
