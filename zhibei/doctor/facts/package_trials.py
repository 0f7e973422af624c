"""Optional packages, tried in processes of their own before a run relies on them. Knows names, no check.

The names of the trials below are what checks look for in `EnvironmentFacts.trials`; "" there means that it worked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from zhibei.config.run import RunFile
from zhibei.doctor.facts.outside import probe, remembered_probe
from zhibei.doctor.facts.torch_build import TorchBuild, known_by

IMPORT_FLASH_ATTN = "import flash_attn"
IMPORT_TRANSFORMERS = "import transformers"
IMPORT_TORCH = "import torch"
IMPORT_SENTENCEPIECE = "import sentencepiece"
IMPORT_PROTOBUF = "import google.protobuf"
BITSANDBYTES = "quantise with bitsandbytes"
WANDB_CREDENTIALS = "find credentials for wandb"
LIBCUDA = "load libcuda.so"
LIBCUDA_1 = "load libcuda.so.1"
IMPORT_SECONDS = 120.0

# transformers imports these by itself when they are installed, so that a broken one breaks models that do not use it.
RISKY = ("flash_attn", "flash_attn_interface", "torchvision", "torchaudio", "xformers", "apex")
IMPORT_MODELS = "from transformers import PreTrainedModel; import transformers.models.llama.modeling_llama"
# Without `kernels`, for the reason given at zhibei.text.hub.no_fetched_kernels.
QUANTISE = """
import sys
sys.modules["kernels"] = None
import torch, bitsandbytes
from bitsandbytes.functional import dequantize_4bit, quantize_4bit, quantize_blockwise
places = ["cuda"] if torch.cuda.is_available() else ["cpu"]
for place in places:
    plain = torch.randn(64, 64, device=place)
    packed, state = quantize_4bit(plain, blocksize=64, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - plain).abs().max().item()
    assert error < 1.5, f"4-bit values come back wrong on {place}"
    quantize_blockwise(plain)
"""
LOAD = "import ctypes; ctypes.CDLL({0!r})"


def package_trials(
    run: RunFile | None, build: TorchBuild, *, is_here: bool, has_gpu: bool, home: Path | None = None
) -> dict[str, str]:
    """What was tried for this run and what went wrong. `is_here`: this machine is the one meant; `has_gpu`: NVIDIA's
    driver is loaded."""
    found: dict[str, str] = {}
    if is_here:
        found |= import_trials(build)
        if has_gpu:
            found |= {
                LIBCUDA_1: probe(LOAD.format("libcuda.so.1")).fault,
                LIBCUDA: probe(LOAD.format("libcuda.so")).fault,
            }
    if run is None:
        return found
    for needs, tried in NEEDED:
        if needs(run):
            found |= tried(run, build, is_here, home or Path.home())
    return found


def import_trials(build: TorchBuild) -> dict[str, str]:
    """Import transformers' models where an installed package could break that, and flash_attn itself."""
    installed = [name for name in RISKY if find_spec(name) is not None]
    found: dict[str, str] = {}
    if fault := str(build.probed.get("fault", "")):
        found[IMPORT_TORCH] = fault
    if not installed:
        return found
    known = {**known_by(build), **{name: _stamp(name) for name in (*installed, "transformers")}}
    found[IMPORT_TRANSFORMERS] = remembered_probe(IMPORT_MODELS, known_by=known, seconds=IMPORT_SECONDS).fault
    if "flash_attn" in installed:
        code = "import flash_attn, flash_attn_2_cuda"
        found[IMPORT_FLASH_ATTN] = remembered_probe(code, known_by=known, seconds=IMPORT_SECONDS).fault
    return found


def _stamp(name: str) -> str:
    """When a package was last changed: a rebuilt wheel of the same version is another wheel."""
    spec = find_spec(name)
    with suppress(OSError, AttributeError):
        place = Path(str(spec.origin))  # type: ignore[union-attr]
        return f"{place} {place.stat().st_mtime_ns} {place.parent.stat().st_mtime_ns}"
    return ""


def needs_bitsandbytes(run: RunFile) -> bool:
    """8-bit optimiser states, or a base held in 8 or 4 bits."""
    return run.training.optimizer == "adamw_8bit" or run.model.quantize != "none" or run.model.method == "qlora"


def _try_bitsandbytes(run: RunFile, build: TorchBuild, is_here: bool, home: Path) -> dict[str, str]:
    if not is_here and find_spec("bitsandbytes") is not None:
        return {}  # whether its binary fits that machine cannot be tried here
    known = {**known_by(build), "bitsandbytes": _stamp("bitsandbytes"), "BNB": os.environ.get("BNB_CUDA_VERSION", "")}
    return {BITSANDBYTES: remembered_probe(QUANTISE, known_by=known, seconds=IMPORT_SECONDS).fault}


def tokenizer_folder(run: RunFile) -> Path:
    return Path(run.model.tokenizer or run.model.path)


def needs_sentencepiece(run: RunFile) -> bool:
    """The tokenizer is there as tokenizer.model only and has to be converted."""
    folder = tokenizer_folder(run)
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _try_sentencepiece(run: RunFile, build: TorchBuild, is_here: bool, home: Path) -> dict[str, str]:
    return {
        IMPORT_SENTENCEPIECE: probe("import sentencepiece").fault,
        IMPORT_PROTOBUF: probe("import google.protobuf.message").fault,
    }


def _try_credentials(run: RunFile, build: TorchBuild, is_here: bool, home: Path) -> dict[str, str]:
    return {WANDB_CREDENTIALS: missing_credentials(os.environ, home)}


def missing_credentials(variables: Mapping[str, str], home: Path) -> str:
    """Why wandb would ask for a key; "" when it has one or is told to stay offline."""
    if variables.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return ""
    if variables.get("WANDB_API_KEY") or variables.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    host = re.sub(r"^https?://|/.*$", "", variables.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    place = Path(variables.get("NETRC") or home / ".netrc")
    with suppress(OSError):
        if re.search(rf"\bmachine\s+{re.escape(host)}\b", place.read_text(encoding="utf-8", errors="replace")):
            return ""
    return f"WANDB_API_KEY is not set and {place} names no machine {host}"


Trial = Callable[[RunFile, TorchBuild, bool, Path], dict[str, str]]
NEEDED: tuple[tuple[Callable[[RunFile], bool], Trial], ...] = (
    (needs_bitsandbytes, _try_bitsandbytes),
    (needs_sentencepiece, _try_sentencepiece),
    (lambda run: run.log.wandb is not None, _try_credentials),
)
