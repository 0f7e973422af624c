"""Values to the bytes of one GGUF type, with ggml's own code where llama.cpp is installed. Knows no files and no names.

ggml quantises through `ggml_quantize_chunk`, which the binary of xllamacpp exports; the package gguf has the same in
numpy for a few types. Before its first use ggml's code is tried on fixed values: on Q8_0 and Q4_0 it must give the very
bytes of gguf, and Q4_K and Q6_K read back by gguf must be near what went in.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.export.gguf.kinds import PLAIN, row_bytes
from zhibei.generate.llama_library import INSTALL, is_installed, library

IN_NUMPY = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Block types that the package gguf quantises itself."""
WORST_ERROR = {"Q4_K": 0.10, "Q6_K": 0.03}
"""Of the error relative to the values, root of mean squares; normal values give about 0.075 and 0.018."""
ROWS_AT_ONCE = 64

Quantize = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


def import_gguf() -> Any:
    """The package gguf. Raises UserError when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"GGUF files are written with the package gguf, which is not installed here ({error})",
            expected="the package gguf",
            fix=INSTALL,
        ) from None
    return gguf


def quantizer(type_name: str) -> Quantize:
    """What turns fp32 values [rows, width] into bytes [rows, bytes of a row].

    The second argument weighs the columns ([width], or None). Raises UserError when the type needs llama.cpp and it is
    not installed, or is another build.
    """
    gguf = import_gguf()
    number = gguf.GGMLQuantizationType[type_name]
    if type_name in PLAIN or (type_name in IN_NUMPY and not is_installed()):
        return lambda values, importance: gguf.quants.quantize(values, number).view(np.uint8)
    if not is_installed():
        raise UserError(
            f"{type_name} is quantised by llama.cpp's own code, which is not installed here",
            expected=f"the package xllamacpp, or one of {', '.join((*PLAIN, 'Q8_0', 'Q4_0'))}",
            fix=INSTALL,
        )
    tried_ggml()
    return lambda values, importance: with_ggml(type_name, values, importance)


def with_ggml(type_name: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml's bytes of fp32 values [rows, width], in several threads over the rows."""
    chunk = library().quantize.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    number = ctypes.c_int(int(import_gguf().GGMLQuantizationType[type_name]))
    values = np.ascontiguousarray(values, dtype=np.float32)
    num_rows, width = values.shape
    found = np.empty((num_rows, row_bytes(type_name, width)), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = None if weights is None else ctypes.c_void_p(weights.ctypes.data)

    def some(start: int) -> None:
        count = min(ROWS_AT_ONCE, num_rows - start)
        written = chunk(
            number,
            ctypes.c_void_p(values.ctypes.data),
            ctypes.c_void_p(found.ctypes.data),
            ctypes.c_int64(start * width),
            ctypes.c_int64(count),
            ctypes.c_int64(width),
            pointer,
        )
        if written != count * found.shape[1]:
            raise RuntimeError(f"ggml wrote {written} bytes of {type_name} where {count * found.shape[1]} belong")

    library().quantize.ggml_quantize_init(number)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as workers:
        list(workers.map(some, range(0, num_rows, ROWS_AT_ONCE)))
    return found


@lru_cache(maxsize=1)
def tried_ggml() -> str:
    """The version of xllamacpp whose quantising was tried here. Raises UserError when it does other than expected."""
    gguf = import_gguf()
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    wrong = ""
    for name in ("Q8_0", "Q4_0"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
        if not np.array_equal(with_ggml(name, values), expected):
            wrong = f"{name} gives other bytes than the package gguf"
    for name, worst in WORST_ERROR.items():
        back = gguf.quants.dequantize(with_ggml(name, values), gguf.GGMLQuantizationType[name])
        error = float(np.sqrt(np.mean((back - values) ** 2) / np.mean(values**2)))
        if not error < worst:
            wrong = f"{name} comes back with an error of {error:.3f}, above {worst}"
    if wrong:
        raise UserError(
            f"xllamacpp {library().version} quantises otherwise than expected: {wrong}",
            expected="the block formats that gguf reads",
            fix=INSTALL + " (which takes versions that were tried)",
        )
    return library().version
