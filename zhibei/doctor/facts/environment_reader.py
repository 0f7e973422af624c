"""Reads the software around a run: packages, torch build, driver, compilers, variables, limits. Knows no check.

Where `--machine` describes another machine, what depends on the cards of this one (driver, CUDA build, architectures,
faulty cards, trials on a GPU) is left out: it says nothing about that machine, and only the pits of that machine shall
trip. Packages, compilers, variables and limits stay: the run starts from here or from a copy of this environment.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from zhibei.config.run import RunFile
from zhibei.doctor.facts.environment import EnvironmentFacts
from zhibei.doctor.facts.launch import read_launch
from zhibei.doctor.facts.outside import ask, read_quietly
from zhibei.doctor.facts.package_trials import package_trials
from zhibei.doctor.facts.torch_build import driver_version, read_torch_build
from zhibei.plan.machines import Machine

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy", "huggingface-hub",
    "sentencepiece", "protobuf", "bitsandbytes", "flash-attn", "flash-attn-3", "xformers", "apex", "deepspeed",
    "torchvision", "torchaudio", "triton", "wandb", "tensorboard", "vllm", "liger-kernel", "unsloth", "pyarrow",
    "pydantic", "PyYAML", "rich", "cyclopts", "jinja2", "gguf", "xllamacpp",
)  # fmt: skip
VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|HF|HUGGINGFACE|WANDB|OMP|MKL|TOKENIZERS|TRANSFORMERS|PYTORCH|TORCH|TORCHELASTIC|ACCELERATE|BNB|HIP|"
    r"ROCR|HSA|ZHIBEI|SLURM|OMPI|PMI|MASTER|GROUP|LOCAL|CROSS|NODE|DS|DEEPSPEED|FSDP|TRITON)_\w+"
    r"|LD_LIBRARY_PATH|WORLD_SIZE|RANK|NNODES|CC|CXX|TMPDIR|https?_proxy|HTTPS?_PROXY"
)
SECRET = re.compile(r"(^|_)(TOKEN|API_KEY|KEY|SECRET|PASSWORD)$")
# Xids that mean hardware (NVIDIA's Xid catalogue): double-bit ECC, NVLink, fallen off the bus, uncontained errors.
HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
FAULT_FIELDS = (
    ("ecc.errors.uncorrected.volatile.total", "uncorrectable ECC errors since the last reset"),
    ("retired_pages.pending", "memory pages that wait to be retired"),
    ("remapped_rows.failure", "memory rows that could not be remapped"),
)


def read_environment(
    run: RunFile | None = None, *, machine: Machine | None = None, root: Path = Path("/")
) -> EnvironmentFacts:
    """What is installed and set here. Optional packages are tried (in processes of their own) only when `run` needs
    them. `machine`: the one that is meant; see the top of this file for what a described one leaves out."""
    is_here = machine is None or not machine.is_described
    variables = read_variables(os.environ)
    build = read_torch_build()
    driver = driver_version() if is_here else ""
    return EnvironmentFacts(
        python=platform.python_version(),
        packages=read_packages(),
        torch_cuda=build.cuda if is_here else None,
        torch_hip=build.hip if is_here else None,
        torch_architectures=tuple(build.probed.get("architectures", ())) if is_here else (),
        driver=driver or None,
        driver_cuda=driver_cuda() if driver else None,
        nvcc=read_nvcc(variables),
        gcc=_version_in(ask(["gcc", "-dumpfullversion", "-dumpversion"]).output, r"(\d+(?:\.\d+)*)"),
        has_c_compiler=any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")),
        variables=variables,
        stdin_is_terminal=_stdin_is_terminal(),
        open_files=_open_files(),
        is_wsl="microsoft" in read_quietly(root / "proc" / "version").lower(),
        is_container=_is_container(root),
        interfaces=read_interfaces(root),
        gpu_faults=read_gpu_faults() if driver else (),
        physical_gpus=count_physical_gpus() if driver else None,
        model_types=read_model_types(),
        unmet=unmet_packages(),
        trials=package_trials(run, build, is_here=is_here, has_gpu=bool(driver)),
        launch=read_launch(os.environ, root=root),
    )


def read_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that change a run. Of a secret only that it is set."""
    return {
        name: "(set)" if SECRET.search(name) else value
        for name, value in sorted(environment.items())
        if VARIABLES.fullmatch(name)
    }


def read_packages() -> dict[str, str]:
    """Version by normalised name (`flash-attn`) of what is installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[re.sub(r"[-_.]+", "-", name).lower()] = metadata.version(name)
    return found


def unmet_packages() -> tuple[str, ...]:
    """Requirements of zhibei that the installed packages do not meet; extras are not asked for."""
    try:
        required = metadata.requires("zhibei") or []
    except metadata.PackageNotFoundError:
        return ()
    found = []
    for requirement in required:
        text, _, marker = requirement.partition(";")
        parts = re.match(r"\s*([\w.-]+)\s*(.*)", text)
        if parts is None or "extra" in marker:
            continue
        name, bounds = parts[1], parts[2].strip("() ")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed, needed {bounds or 'in any version'}")
            continue
        if not is_within(version, bounds):
            found.append(f"{name} {version}, needed {bounds}")
    return tuple(found)


def is_within(version: str, bounds: str) -> bool:
    """Whether `2.13.0+cpu` meets `>=2.10,<3`. Bounds of other kinds than >=, >, <=, <, == and != count as met."""
    mine = _numbers(version)
    compare = {
        ">=": lambda a, b: a >= b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b,
        "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
    }  # fmt: skip
    for sign, bound in re.findall(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", bounds):
        theirs = _numbers(bound)
        width = max(len(mine), len(theirs))
        if not compare[sign](mine + (0,) * (width - len(mine)), theirs + (0,) * (width - len(theirs))):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def read_model_types() -> frozenset[str]:
    """Model types that transformers' tables name, from their source text, since importing them takes seconds."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    folder = Path(spec.origin).parent / "models" / "auto"
    text = "".join(read_quietly(folder / name) for name in ("auto_mappings.py", "configuration_auto.py"))
    return frozenset(re.findall(r"""\(?["']([\w.-]+)["'](?:,|:)\s*["']\w+Config["']""", text))


def driver_cuda() -> str | None:
    """Newest CUDA that the driver serves, from the head of nvidia-smi."""
    return _version_in(ask(["nvidia-smi"]).output, r"CUDA Version:\s*(\d+\.\d+)")


def read_nvcc(variables: Mapping[str, str]) -> str | None:
    """CUDA version of the compiler that CUDA_HOME, else PATH, else /usr/local/cuda leads to."""
    places = [f"{variables['CUDA_HOME']}/bin/nvcc"] if variables.get("CUDA_HOME") else []
    for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := _version_in(ask([place, "--version"]).output, r"release (\d+\.\d+)"):
            return found
    return None


def _version_in(text: str, pattern: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _stdin_is_terminal() -> bool:
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


def _open_files() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _is_container(root: Path) -> bool:
    if (root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists():
        return True
    return bool(re.search(r"docker|containerd|kubepods|lxc|podman", read_quietly(root / "proc" / "1" / "cgroup")))


def read_interfaces(root: Path = Path("/")) -> tuple[str, ...]:
    """Network interfaces that are up, or whose state nobody tells."""
    folder = root / "sys" / "class" / "net"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return ()
    return tuple(name for name in names if read_quietly(folder / name / "operstate").strip() != "down")


def count_physical_gpus() -> int | None:
    """Cards that nvidia-smi lists, whatever CUDA_VISIBLE_DEVICES hides."""
    answer = ask(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"])
    return None if answer.fault else len(answer.output.split())


def read_gpu_faults() -> tuple[str, ...]:
    """Cards that report errors, by their counters and by the kernel's log as far as this user may read it."""
    found: list[str] = []
    for field, words in FAULT_FIELDS:
        answer = ask(["nvidia-smi", f"--query-gpu=index,{field}", "--format=csv,noheader,nounits"])
        found += faults_in(answer.output, words) if not answer.fault else []
    return (*found, *xids_in(ask(["dmesg"]).output))


def faults_in(listing: str, words: str) -> list[str]:
    """`0, 12` -> `GPU 0: 12 uncorrectable ECC errors since the last reset`; zero, No and [N/A] are fine."""
    rows = re.findall(r"^\s*(\d+)\s*,\s*(\d+|Yes)\s*$", listing, re.MULTILINE | re.IGNORECASE)
    amounts = {index: "" if count.lower() == "yes" else f"{count} " for index, count in rows if count != "0"}
    return [f"GPU {index}: {amount}{words}" for index, amount in amounts.items()]


def xids_in(log: str) -> list[str]:
    """`NVRM: Xid (PCI:0000:3b:00): 79, ...` of the kinds that mean hardware, once for each card and kind."""
    rows = re.findall(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", log)
    return [
        f"GPU at PCI {place}: Xid {number} in the kernel's log"
        for place, number in dict.fromkeys(rows)
        if int(number) in HARDWARE_XIDS
    ]
