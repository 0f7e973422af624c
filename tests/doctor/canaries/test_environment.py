"""Canaries of area environment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, CPU, ONE_A100, V100, broken, healthy
from zhibei.doctor.facts.environment import Launch
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.package_trials import (
    BITSANDBYTES,
    IMPORT_FLASH_ATTN,
    IMPORT_PROTOBUF,
    IMPORT_SENTENCEPIECE,
    IMPORT_TORCH,
    IMPORT_TRANSFORMERS,
    LIBCUDA,
    LIBCUDA_1,
    WANDB_CREDENTIALS,
)
from zhibei.doctor.pitfalls.environment import gpu_arch_not_in_torch_build, runs_on
from zhibei.plan.cards import card_of
from zhibei.plan.machines import Gpu, Machine, gpu_of, parse_machine


def here(name: str, *, count: int = 1) -> Machine:
    """A real machine with cards of this kind."""
    return replace(ONE_A100, name="this machine", gpus=(gpu_of(card_of(name)),) * count)


def tried(facts: Facts, **trials: str) -> Facts:
    return broken(facts, "environment.trials", {NAMES[name]: fault for name, fault in trials.items()})


NAMES = {
    "bitsandbytes": BITSANDBYTES, "flash": IMPORT_FLASH_ATTN, "transformers": IMPORT_TRANSFORMERS,
    "torch": IMPORT_TORCH, "sentencepiece": IMPORT_SENTENCEPIECE, "protobuf": IMPORT_PROTOBUF,
    "wandb": WANDB_CREDENTIALS, "libcuda": LIBCUDA, "libcuda1": LIBCUDA_1,
}  # fmt: skip
SYMBOL = "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE"
CRASH = "crashed inside native code (SIGSEGV): the builds of torch, CUDA and driver do not fit each other"
FAILED = "OSError: libcuda.so: cannot open shared object file"


def built_for(facts: Facts, *architectures: str) -> Facts:
    return broken(facts, "environment.torch_architectures", architectures)


def packages(facts: Facts, **versions: str) -> Facts:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return broken(facts, "environment.packages", {**facts.environment.packages, **named})


def launched(facts: Facts, **figures: object) -> Facts:
    return broken(facts, "environment.launch", Launch(**figures))  # type: ignore[arg-type]


def shared_memory(gib: float, machine: Machine, **figures: object) -> Facts:
    return launched(healthy(machine=replace(machine, shared_memory_gib=gib)), **figures)


def forced(cuda: str, *overrides: str) -> Facts:
    facts = broken(healthy(*overrides), "environment.variables", {"BNB_CUDA_VERSION": cuda})
    return broken(facts, "environment.torch_cuda", "12.8")


def family(name: object, *overrides: str, **config: object) -> Facts:
    facts = broken(healthy(*overrides), "model.config", {**CONFIG, "model_type": name, **config})
    return broken(facts, "environment.model_types", frozenset({"llama", "mistral", "qwen3"}))


EIGHT_BIT = "sft.optimizer=adamw_8bit"
CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CANARIES: Canaries = {
    "bnb-cuda-binary-not-found": (
        [
            tried(healthy(EIGHT_BIT), bitsandbytes="RuntimeError: CUDA Setup failed despite GPU being available"),
            tried(healthy("model.method=qlora"), bitsandbytes="ModuleNotFoundError: No module named 'bitsandbytes'"),
            tried(healthy("model.method=lora", "model.quantize=int8"), bitsandbytes=CRASH),
            tried(healthy("stage=dpo", "dpo.optimizer=adamw_8bit"), bitsandbytes="AttributeError"),
            forced("118", EIGHT_BIT),
            forced("12.6", "model.method=qlora"),
        ],
        [
            tried(healthy(EIGHT_BIT), bitsandbytes=""),
            tried(healthy(), bitsandbytes="RuntimeError: CUDA Setup failed"),
            forced("128", EIGHT_BIT),
            forced("118"),
            healthy("model.method=qlora"),
        ],
    ),
    "bnb-libcuda-missing-wsl": (
        [
            tried(healthy(), libcuda1="OSError: libcuda.so.1: cannot open shared object file"),
            tried(packages(healthy(EIGHT_BIT), bitsandbytes="0.38.0"), libcuda1="", libcuda=FAILED),
            broken(tried(healthy(), libcuda1="OSError: libcuda.so.1"), "environment.is_wsl", True),
        ],
        [
            tried(healthy(), libcuda1="", libcuda=""),
            tried(packages(healthy(EIGHT_BIT), bitsandbytes="0.50.2"), libcuda1="", libcuda=FAILED),
            tried(packages(healthy(), bitsandbytes="0.38.0"), libcuda1="", libcuda=FAILED),
            tried(healthy(machine=CPU), libcuda1=FAILED),
        ],
    ),
    "flash-attn-abi-mismatch": (
        [
            tried(packages(healthy(), flash_attn="2.8.0"), flash=SYMBOL),
            tried(packages(healthy(machine=V100), flash_attn="2.5.0"), flash=SYMBOL, transformers=""),
        ],
        [healthy(), tried(healthy(), flash="", transformers=""), tried(healthy(), flash=SYMBOL, transformers=SYMBOL)],
    ),
    "flash-attn-breaks-transformers-import": (
        [
            tried(packages(healthy(), flash_attn="2.8.0"), flash=SYMBOL, transformers=SYMBOL),
            tried(packages(healthy(), torchvision="0.22"), transformers="operator torchvision::nms does not exist"),
            tried(healthy(machine=CPU), transformers="Could not import module 'PreTrainedModel'."),
        ],
        [healthy(), tried(healthy(), transformers=""), tried(healthy(), flash=SYMBOL)],
    ),
    "gpu-arch-not-in-torch-build": (
        [
            built_for(healthy(machine=here("rtx5090")), *CUDA_12),
            built_for(healthy(machine=here("v100-32g", count=4)), *CUDA_13),
            built_for(healthy(machine=here("1080ti")), "sm_70", "sm_80"),
            built_for(healthy(machine=here("b200")), *CUDA_12),
            built_for(healthy(machine=replace(ONE_A100, gpus=(*ONE_A100.gpus, *V100.gpus))), *CUDA_13),
            built_for(healthy(machine=here("h100")), "sm_80", "sm_90a_x", "sm_100a"),
        ],
        [
            built_for(healthy(machine=here("rtx5090")), *CUDA_13),
            built_for(healthy(machine=here("rtx4090")), *CUDA_12),  # 8.9 runs code of 8.6
            built_for(healthy(machine=here("b200")), "sm_80", "compute_90"),  # by PTX
            built_for(healthy(machine=here("v100-32g")), *CUDA_12),
            built_for(healthy(machine=parse_machine("v100-32g")), *CUDA_13),  # described: not this torch
            built_for(healthy("device=cpu", machine=here("v100-32g")), *CUDA_13),
            built_for(healthy(machine=here("mi300x")), "gfx942"),
            built_for(healthy(machine=CPU)),
            built_for(healthy(machine=here("rtx5090"))),  # a build that told nothing
        ],
    ),
    "segv-exit-11-at-init": (
        [
            tried(healthy(), torch=CRASH),
            tried(healthy(machine=CPU), transformers=CRASH),
            tried(healthy(), flash="aborted inside native code (SIGABRT)"),
            broken(healthy(), "environment.trials", {"multiply in bf16 on GPU 0": CRASH}),
        ],
        [healthy(), tried(healthy(), torch=""), tried(healthy(), torch="ImportError: no such module")],
    ),
    "sentencepiece-protobuf-missing": (
        [
            tried(healthy(), sentencepiece="ModuleNotFoundError: No module named 'sentencepiece'", protobuf=""),
            tried(healthy("model.tokenizer=/models/other"), sentencepiece="", protobuf="TypeError: Descriptors"),
        ],
        [healthy(), tried(healthy(), sentencepiece="", protobuf="")],
    ),
    "shm-too-small-exit-7": (
        [
            shared_memory(0.0625, ONE_A100, world_size=4, local_world_size=4, launcher="torchrun"),
            shared_memory(0.0625, parse_machine("v100-32g:4")),
            shared_memory(0.0, CPU, world_size=2, local_world_size=2),
            shared_memory(0.0625, here("v100-32g", count=4)),
            shared_memory(1.5, ONE_A100, world_size=8, local_world_size=8),
        ],
        [
            shared_memory(0.0625, ONE_A100),
            shared_memory(0.0625, CPU),
            shared_memory(16.0, ONE_A100, world_size=8, local_world_size=8),
            shared_memory(2.0, parse_machine("a100-40g:8")),
            healthy(machine=replace(parse_machine("a100-40g:8"), shared_memory_gib=None)),
            healthy(machine=parse_machine("h100:8x2")),
        ],
    ),
    "tracker-login-prompt": (
        [
            tried(packages(healthy("log.wandb=project"), wandb="0.31"), wandb="WANDB_API_KEY is not set"),
            broken(
                tried(packages(healthy("log.wandb=project"), wandb="0.31"), wandb="WANDB_API_KEY is not set"),
                "environment.stdin_is_terminal",
                False,
            ),
            healthy("log.wandb=project"),  # not installed
        ],
        [
            healthy(),
            tried(healthy(), wandb="WANDB_API_KEY is not set"),
            tried(packages(healthy("log.wandb=project"), wandb="0.31"), wandb=""),
            broken(packages(healthy(), wandb="0.31"), "environment.stdin_is_terminal", False),
        ],
    ),
    "transformers-too-old-for-llama": (
        [family("qwen9"), family("llama_next", transformers_version="9.0.0"), family("chatglm", auto_map={})],
        [
            family("llama"),
            family("mistral", transformers_version="9.0.0"),
            family("chatglm", "model.trust_remote_code=true", auto_map={"AutoModel": "modeling_chatglm.X"}),
            family(None),
            healthy(),
        ],
    ),
    "packages-outside-their-range": (
        [
            broken(healthy(), "environment.unmet", ("transformers 4.27.0, needed >=5.17,<6",)),
            broken(healthy(), "environment.unmet", ("peft is not installed, needed >=0.21,<0.22",)),
        ],
        [healthy()],
    ),
    "torch-cannot-use-the-card": (
        [
            broken(healthy(), "environment.torch_cuda", None),
            broken(broken(healthy(), "environment.driver_cuda", "12.4"), "environment.driver", "550.54"),
        ],
        [
            healthy(),
            healthy(machine=CPU),
            broken(healthy("device=cpu"), "environment.torch_cuda", None),
            broken(healthy(machine=parse_machine("v100-32g:4")), "environment.torch_cuda", None),
            broken(broken(healthy(), "environment.torch_cuda", None), "environment.torch_hip", "6.4"),
            broken(healthy(), "environment.driver_cuda", "13.1"),
            broken(broken(healthy(), "environment.driver_cuda", "12.4"), "environment.torch_cuda", "12.8"),
        ],
    ),
    "compile-without-c-compiler": (
        [broken(healthy("model.compile=true"), "environment.has_c_compiler", False)],
        [
            healthy("model.compile=true"),
            broken(healthy(), "environment.has_c_compiler", False),
            broken(healthy("model.compile=false"), "environment.has_c_compiler", False),
        ],
    ),
}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_120"], (12, 1), True),
        (["gfx942"], (9, 4), False),
    ],
)
def test_which_machine_code_runs_where(architectures, capability, runs):
    assert runs_on(architectures, capability) is runs


def test_a_card_nobody_knows_is_not_judged():
    strange = replace(ONE_A100, gpus=(Gpu("X", 8.0, (0, 0)),))
    assert list(gpu_arch_not_in_torch_build(built_for(healthy(machine=strange), *CUDA_13))) == []
