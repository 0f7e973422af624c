"""Pits of what is installed: torch builds, binaries of other builds, missing packages, compilers. Knows no run loop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from zhibei.doctor.arithmetic import cards_of, described
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.package_trials import (
    BITSANDBYTES,
    IMPORT_FLASH_ATTN,
    IMPORT_PROTOBUF,
    IMPORT_SENTENCEPIECE,
    IMPORT_TRANSFORMERS,
    LIBCUDA,
    LIBCUDA_1,
    needs_bitsandbytes,
)
from zhibei.doctor.pitfall import Finding, pitfall

# Since 0.43 bitsandbytes no longer looks for libcuda.so itself (its release notes).
BITSANDBYTES_THAT_SEARCHES = (0, 43)
NO_EXTENSIONS = "tests/doctor/test_no_such_option.py::test_nothing_is_compiled_by_a_cuda_compiler_at_run_time"


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"CUDA Setup failed despite (?:CUDA|GPU) being available",
        r"Required library version not found: libbitsandbytes",
        r"libbitsandbytes_\w+\.(?:so|dll).{0,80}(?:cannot open|not found|no such file)",
        r"configured (?:CUDA|ROCm) binary not found",
        r"bitsandbytes was compiled without GPU support",
    ],
    sources=[
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1559",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/487",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1614",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/966",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/651",
    ],
)
def bnb_cuda_binary_not_found(facts: Facts) -> Iterable[Finding]:
    """bitsandbytes cannot compute here, and the run needs it.

    Why: bitsandbytes ships one binary per CUDA version and takes that of torch. When its package is too old for this
    torch, was built from source without CUDA, or BNB_CUDA_VERSION names another one, it falls back to a binary for
    processors or none, and the run dies when the quantised base or the 8-bit optimiser is made.

    Fix: pip install -U "zhibei[bnb]" and unset BNB_CUDA_VERSION. If libcudart is not found, add its folder to
    LD_LIBRARY_PATH.

    运行需要 bitsandbytes，而它在这里无法计算。

    为何：bitsandbytes 为每个 CUDA 版本带一个二进制文件，并按 torch 的版本选用。若它对当前的 torch 太旧、
    是未带 CUDA 的源码编译版，或 BNB_CUDA_VERSION 指定了别的版本，它就会退回处理器版或根本没有可用的文件，
    等到建立量化基座或 8 位优化器时运行便终止。

    办法：pip install -U "zhibei[bnb]"，并取消 BNB_CUDA_VERSION。若找不到 libcudart，把它所在目录加入
    LD_LIBRARY_PATH。
    """
    if facts.resolved is None or not needs_bitsandbytes(facts.run):
        return
    environment = facts.environment
    if fault := environment.trials.get(BITSANDBYTES, ""):
        yield Finding(
            what=f"a trial of bitsandbytes failed: {fault}",
            where=f"package bitsandbytes {environment.packages.get('bitsandbytes', '(not installed)')}",
            to_do='pip install -U "zhibei[bnb]"; if it persists, run  python -m bitsandbytes',
        )
        return
    forced, built = environment.variables.get("BNB_CUDA_VERSION", ""), environment.torch_cuda
    if forced and built and forced.replace(".", "") != built.replace(".", ""):
        yield Finding(
            what=f"BNB_CUDA_VERSION={forced} makes bitsandbytes take a binary for another CUDA than torch's {built}",
            where="environment variable BNB_CUDA_VERSION",
            to_do="unset BNB_CUDA_VERSION",
        )


@pitfall(
    "environment",
    cost="minutes",
    errors=[
        r"libcuda\.so(?:\.1)? not found",
        r"libcuda\.so\.1: cannot open shared object file",
        r"do you have a CUDA driver installed",
    ],
    sources=[
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/332",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/487",
    ],
)
def bnb_libcuda_missing_wsl(facts: Facts) -> Iterable[Finding]:
    """The driver's library libcuda is not on the loader's path.

    Why: Under WSL it lies in /usr/lib/wsl/lib, and many driver packages have only libcuda.so.1 without the link
    libcuda.so. torch may find it and another library not, so that one works and the other says there is no driver.

    Fix: Add the folder to LD_LIBRARY_PATH (WSL: /usr/lib/wsl/lib), or make the link
    libcuda.so -> libcuda.so.1 beside it.

    加载器的路径上找不到驱动的库 libcuda。

    为何：在 WSL 中它位于 /usr/lib/wsl/lib；许多驱动包只有 libcuda.so.1 而没有链接 libcuda.so。
    torch 也许能找到而别的库找不到，于是一个能用，另一个却说没有驱动。

    办法：把所在目录加入 LD_LIBRARY_PATH（WSL：/usr/lib/wsl/lib），或在旁边建立链接 libcuda.so -> libcuda.so.1。
    """
    environment = facts.environment
    folder = "/usr/lib/wsl/lib" if environment.is_wsl else "the folder of libcuda.so.1 (ldconfig -p | grep libcuda)"
    if facts.machine.is_described or not facts.machine.gpus:
        return
    if fault := environment.trials.get(LIBCUDA_1, ""):
        yield Finding(
            what=f"a card is there, and the driver's library cannot be loaded: {fault}",
            where="libcuda.so.1",
            to_do=f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH",
        )
    elif fault := environment.trials.get(LIBCUDA, ""):
        version = version_of(environment.packages.get("bitsandbytes", ""))
        if version and version < BITSANDBYTES_THAT_SEARCHES and facts.resolved and needs_bitsandbytes(facts.run):
            yield Finding(
                what=f"bitsandbytes {environment.packages['bitsandbytes']} looks for libcuda.so: {fault}",
                where="libcuda.so",
                to_do='pip install -U "zhibei[bnb]", or link libcuda.so to libcuda.so.1',
            )


def version_of(text: str) -> tuple[int, ...]:
    """(0, 50, 2) of `0.50.2`; empty for what is no version."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@pitfall(
    "environment",
    cost="launch",
    kind="construction",
    because="Offloading and optimisers are plain torch; no extension is built at run time.",
    proof=[NO_EXTENSIONS],
    errors=[
        r"No module named 'colossalai\._C",
        r"colossalai.{0,40}cpu_adam",
        r"Unable to JIT load the (?:cpu_adam|fused_adam|async_io)",
        r"CPUAdam.{0,60}has no attribute 'ds_opt_adam'",
    ],
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/3002",
        "https://github.com/hpcaitech/ColossalAI/issues/4327",
        "https://github.com/hpcaitech/ColossalAI/issues/4875",
        "https://github.com/hpcaitech/ColossalAI/issues/5409",
    ],
)
def ext_cpu_adam_not_built() -> None:
    """A C++ optimiser for offloading was never built.

    Why: ColossalAI and DeepSpeed compile cpu_adam when it is first used. Without compiler, ninja or a matching gcc
    that fails, after the model was loaded on every rank.

    Fix: For those programs build the extension once in the image (CUDA_EXT=1 pip install, or DS_BUILD_CPU_ADAM=1).
    zhibei has no such extension.

    用于卸载的 C++ 优化器没有编译好。

    为何：ColossalAI 与 DeepSpeed 在首次使用时才编译 cpu_adam。若没有编译器、ninja 或匹配的 gcc 就会失败，
    而此时每个进程都已加载完模型。

    办法：对这些程序，在镜像中预先编译一次（CUDA_EXT=1 pip install，或 DS_BUILD_CPU_ADAM=1）。
    zhibei 没有这类扩展。
    """


@pitfall(
    "environment",
    cost="launch",
    kind="construction",
    because="No extension is built at run time, so no CUDA toolkit is needed.",
    proof=[NO_EXTENSIONS],
    errors=[
        r"detected CUDA version \(.{1,10}\) mismatches the version that was used to compile",
        r"Installed CUDA version .{1,40} does not match the version torch was compiled with",
        r"CUDAMismatchException",
        r"CUDA_HOME (?:environment variable is not set|does not exist)",
        r"nvcc(?:: not found| was not found|.{0,30}No such file)",
    ],
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/3002",
        "https://github.com/hpcaitech/ColossalAI/issues/2896",
        "https://github.com/hpcaitech/ColossalAI/issues/2973",
        "https://github.com/hpcaitech/ColossalAI/issues/5463",
    ],
)
def ext_cuda_toolkit_vs_torch_cuda() -> None:
    """The CUDA compiler is of another version than torch was built with.

    Why: Extensions (ColossalAI's kernels, DeepSpeed's cpu_adam, apex, flash-attn) are compiled with the nvcc that
    CUDA_HOME or /usr/local/cuda leads to, often only when the optimiser is made.

    Fix: For those programs install the toolkit of torch's CUDA version and point CUDA_HOME to it. zhibei compiles
    nothing with nvcc; `zhibei doctor` shows both versions.

    CUDA 编译器的版本与编译 torch 所用的不同。

    为何：扩展（ColossalAI 的内核、DeepSpeed 的 cpu_adam、apex、flash-attn）由 CUDA_HOME 或 /usr/local/cuda
    指向的 nvcc 编译，往往到建立优化器时才进行。

    办法：对这些程序，安装与 torch 相同 CUDA 版本的工具包并让 CUDA_HOME 指向它。
    zhibei 不用 nvcc 编译任何东西；`zhibei doctor` 会显示两者的版本。
    """


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"flash_attn\w*\.so:? ?.{0,80}undefined symbol",
        r"flash_attn_2_cuda.{0,200}(?:undefined symbol|DLL load failed|cannot open shared object)",
    ],
    sources=[
        "https://github.com/Dao-AILab/flash-attention/issues/1644",
        "https://github.com/Dao-AILab/flash-attention/issues/853",
        "https://github.com/Dao-AILab/flash-attention/issues/1832",
        "https://github.com/Dao-AILab/flash-attention/issues/919",
        "https://github.com/huggingface/open-r1/issues/684",
    ],
)
def flash_attn_abi_mismatch(facts: Facts) -> Iterable[Finding]:
    """flash-attn is installed, and its binary does not fit the installed torch.

    Why: Its wheels are built for one version of torch, CUDA and the C++ ABI. A later upgrade of torch, often pulled
    in by another package, leaves a binary whose symbols are gone.

    Fix: pip uninstall flash-attn (zhibei uses torch's own kernels), or install the wheel for this torch.

    已安装 flash-attn，但其二进制与当前的 torch 不匹配。

    为何：它的 wheel 只对应某一个 torch、CUDA 与 C++ ABI 版本。之后升级 torch（常由别的软件包带来），
    留下的二进制就找不到所需的符号。

    办法：pip uninstall flash-attn（zhibei 用 torch 自带的内核），或安装与当前 torch 匹配的 wheel。
    """
    environment = facts.environment
    fault = environment.trials.get(IMPORT_FLASH_ATTN, "")
    if fault and not environment.trials.get(IMPORT_TRANSFORMERS, ""):
        yield Finding(
            what=f"flash-attn {environment.packages.get('flash-attn', '')} cannot be imported: {fault}",
            where="package flash-attn",
            to_do="pip uninstall flash-attn, or install the wheel built for torch "
            f"{environment.packages.get('torch', 'that is installed')}",
            level="warning",
        )


@pitfall(
    "environment",
    cost="minutes",
    errors=[
        r"Failed to import transformers\.[\w.]+ because of.{0,300}(?:flash_attn|undefined symbol)",
        r"operator torchvision::nms does not exist",
        r"Could not import module '\w+'\. Are this object's requirements defined correctly",
    ],
    sources=["https://github.com/Dao-AILab/flash-attention/issues/867"],
)
def flash_attn_breaks_transformers_import(facts: Facts) -> Iterable[Finding]:
    """A broken optional package keeps transformers from importing a model.

    Why: transformers imports flash-attn, torchvision and others as soon as they are installed. One that was built for
    another torch breaks models that do not use it, and the last line of the error names something else.

    Fix: Uninstall the broken package, or install its build for this torch.

    某个损坏的可选软件包使 transformers 无法导入模型。

    为何：只要装了 flash-attn、torchvision 等，transformers 就会导入它们。为别的 torch 编译的包会连累
    并不使用它的模型，而报错的最后一行说的是别的东西。

    办法：卸载损坏的软件包，或安装与当前 torch 匹配的版本。
    """
    environment = facts.environment
    if fault := environment.trials.get(IMPORT_TRANSFORMERS, ""):
        optional = ("flash-attn", "flash-attn-3", "torchvision", "torchaudio", "xformers", "apex")
        there = [f"{name} {environment.packages[name]}" for name in optional if name in environment.packages]
        yield Finding(
            what=f"transformers cannot import a model: {fault}",
            where=f"installed beside it: {', '.join(there) or 'no package known to do that'}",
            to_do=f"uninstall what the message names, else one by one: pip uninstall {' '.join(optional[:4])}",
        )


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"no kernel image is available for execution on the device",
        r"CUDA capability sm_\d+ is not compatible with the current PyTorch",
        r"(?:the provided PTX was compiled with an unsupported toolchain|cudaErrorNoKernelImageForDevice)",
    ],
    sources=[
        "https://github.com/pytorch/pytorch/issues/150733",
        "https://github.com/pytorch/pytorch/issues/167244",
        "https://github.com/xorbitsai/inference/issues/3603",
        "https://github.com/DreamTechAI/Direct3D-S2/issues/32",
    ],
)
def gpu_arch_not_in_torch_build(facts: Facts) -> Iterable[Finding]:
    """The installed torch has no machine code for a card.

    Why: A build of torch holds kernels for some architectures. A newer card (sm_120 with a build for CUDA 12.4) or an
    older one (V100 with a build for CUDA 13) starts, is listed, and fails at the first kernel.

    Fix: Install the build for that architecture: CUDA 12.8 or newer for RTX 50 and B200, CUDA 12.6 for V100 and older.

    当前的 torch 没有某张显卡的机器码。

    为何：每个 torch 版本只包含部分架构的内核。更新的卡（sm_120 配 CUDA 12.4 版）或更旧的卡
    （V100 配 CUDA 13 版）能启动、能列出，却在第一个内核上失败。

    办法：安装包含该架构的版本：RTX 50 与 B200 需 CUDA 12.8 以上，V100 及更旧的卡用 CUDA 12.6。
    """
    architectures = facts.environment.torch_architectures
    if facts.machine.is_described or not architectures or facts.environment.torch_hip:
        return
    for number, gpu in cards_of(facts):
        if gpu.vendor == "nvidia" and gpu.capability > (0, 0) and not runs_on(architectures, gpu.capability):
            index = "cu126" if gpu.capability < (7, 5) else "cu128"
            yield Finding(
                what=f"torch {facts.environment.packages.get('torch', '')} has no kernels for {gpu.architecture}: "
                f"it was built for {', '.join(architectures)}",
                where=described(number, gpu),
                to_do=f"pip install torch --index-url https://download.pytorch.org/whl/{index}"
                + (" (if it no longer lists the card, take an older torch)" if index == "cu126" else ""),
            )
            return


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on the same major and an equal or higher minor capability; PTX on anything as new or newer.
    Code of an `a` or `f` variant (sm_90a) is for that family alone. Source: CUDA's guide, binary compatibility."""
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        if found[4] == "a":
            fits = built == capability
        elif found[1] == "compute" and not found[4]:
            fits = built <= capability
        else:
            fits = built[0] == capability[0] and built[1] <= capability[1]
        if fits:
            return True
    return False


@pitfall(
    "environment",
    cost="launch",
    errors=[
        r"requires the SentencePiece library",
        r"requires the protobuf library|requires protobuf 3|Descriptors cannot (?:not )?be created directly",
        r"(?:tiktoken|SentencePiece).{0,40}(?:extractor|is required to|needs? to be installed)",
    ],
    sources=[
        "https://github.com/openlm-research/open_llama/issues/69",
        "https://github.com/hiyouga/LlamaFactory/issues/718",
        "https://github.com/foundation-model-stack/fms-hf-tuning/pull/317",
        "https://github.com/qwopqwop200/GPTQ-for-LLaMa/issues/18",
    ],
)
def sentencepiece_protobuf_missing(facts: Facts) -> Iterable[Finding]:
    """The tokenizer has to be converted, and what converts it is missing or broken.

    Why: A folder with tokenizer.model and no tokenizer.json needs sentencepiece and protobuf. Without them the error
    speaks of a tokenizer class that does not exist.

    Fix: pip install sentencepiece protobuf, or put a tokenizer.json beside the model.

    分词器需要转换，而所需的软件包缺失或损坏。

    为何：只有 tokenizer.model 而没有 tokenizer.json 的目录需要 sentencepiece 与 protobuf。
    缺少它们时，报错却说某个分词器类不存在。

    办法：pip install sentencepiece protobuf，或在模型旁放一个 tokenizer.json。
    """
    for trial, package in ((IMPORT_SENTENCEPIECE, "sentencepiece"), (IMPORT_PROTOBUF, "protobuf")):
        if fault := facts.environment.trials.get(trial, ""):
            asked = facts.resolved is not None and facts.run.model.tokenizer is not None
            place = facts.origin("model.tokenizer" if asked else "model.path")
            yield Finding(
                what=f"the tokenizer is there as tokenizer.model only, and {package} cannot be imported: {fault}",
                where=place,
                to_do=f"pip install -U {package}, or use a folder with tokenizer.json",
            )
