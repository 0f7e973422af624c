"""Pits of processes and their surroundings: crashes, shared memory, logins, versions, limits. Knows no torch build."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.arithmetic import cards_of, described
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.outside import SIGNALS
from zhibei.doctor.facts.package_trials import WANDB_CREDENTIALS
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.environment import NO_EXTENSIONS

# NCCL's rings and buffers between ranks of one node; with less than this they die of a bus error.
LEAST_SHARED_GIB, SHARED_GIB_PER_RANK = 1.0, 0.25


@pitfall(
    "environment",
    cost="hours",
    kind="construction",
    because="Nothing is compiled by nvcc at run time.",
    proof=[NO_EXTENSIONS],
    errors=[
        r"unsupported GNU version! gcc versions later than",
        r"error: #error .{0,40}unsupported.{0,30}(?:GNU|clang|host compiler)",
    ],
    sources=[
        "https://github.com/Eyeline-Labs/FlashDepth/issues/2",
        "https://github.com/deepspeedai/DeepSpeed/issues/1127",
        "https://github.com/OptimalScale/LMFlow/issues/24",
    ],
)
def nvcc_unsupported_host_gcc() -> None:
    """The CUDA compiler refuses the installed gcc.

    Why: Each release of nvcc takes host compilers up to some version. Programs that compile extensions when the
    optimiser is made meet this after everything was loaded.

    Fix: For those programs install the older gcc and set CC, CXX and NVCC_PREPEND_FLAGS="-ccbin g++-12", or use an
    image with prebuilt extensions. zhibei compiles nothing with nvcc.

    CUDA 编译器不接受已安装的 gcc。

    为何：每个 nvcc 版本只支持到某一版本的主机编译器。在建立优化器时才编译扩展的程序，
    要等一切都加载之后才会遇到这个问题。

    办法：对这些程序，安装较旧的 gcc 并设置 CC、CXX 与 NVCC_PREPEND_FLAGS="-ccbin g++-12"，
    或使用预先编译好扩展的镜像。zhibei 不用 nvcc 编译任何东西。
    """


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"return code = -11\b",
        r"exit ?code:? ?-11\b",
        r"(?:exitcode|traceback|init).{0,60}Signal 11\b|Signal 11\b.{0,20}SIGSEGV",
    ],
    sources=[
        "https://github.com/OptimalScale/LMFlow/issues/240",
        "https://github.com/tatsu-lab/stanford_alpaca/issues/215",
        "https://github.com/OptimalScale/LMFlow/issues/160",
    ],
)
def segv_exit_11_at_init(facts: Facts) -> Iterable[Finding]:
    """A library crashes inside native code.

    Why: Exit code -11 (a segmentation fault) at the start, with any model, means that builds of torch, CUDA, driver
    or an extension do not fit one another. It is not a lack of memory, and no Python traceback tells where.

    Fix: `zhibei doctor` tries the parts one by one, each in a process of its own, and names the one that crashes.
    Reinstall it, or make a fresh environment: python -m venv, then pip install zhibei.

    某个库在本机代码中崩溃。

    为何：用任何模型都在启动时以 -11（段错误）退出，说明 torch、CUDA、驱动或某个扩展的版本互不匹配。
    这不是内存不足，Python 也不会给出出错位置。

    办法：`zhibei doctor` 在各自独立的进程里逐项尝试，并指出崩溃的那一项。重新安装它，或新建一个环境：
    python -m venv，再 pip install zhibei。
    """
    crashes = tuple(words for signal_number, words in SIGNALS.items() if signal_number.name != "SIGKILL")
    for trial, fault in facts.environment.trials.items():
        if fault.startswith(crashes):
            yield Finding(
                what=f"trial: {trial}: {fault}",
                where="this Python environment",
                to_do="reinstall the package that the trial names, or make a fresh environment for training",
            )


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"return code = -7\b|exit ?code:? ?-7\b|Signal 7\b|\bSIGBUS\b|Bus error",
        r"(?:unable to|could not) (?:open|allocate|resize) shared memory",
        r"insufficient shared memory|No space left on device.{0,80}/dev/shm|/dev/shm.{0,120}No space left on device",
    ],
    sources=[
        "https://github.com/OptimalScale/LMFlow/issues/260",
        "https://github.com/OptimalScale/LMFlow/issues/430",
    ],
)
def shm_too_small_exit_7(facts: Facts) -> Iterable[Finding]:
    """Shared memory (/dev/shm) is too small for several ranks.

    Why: Containers get 64 MB of it by default. NCCL exchanges data between the ranks of a node there, and the process
    dies with a bus error (exit code -7) and no other message.

    Fix: Start the container with --shm-size=16g or --ipc=host; in Kubernetes mount an emptyDir of medium Memory at
    /dev/shm.

    共享内存（/dev/shm）对多个进程来说太小。

    为何：容器默认只有 64 MB。NCCL 通过它在同一节点的进程间交换数据，不够时进程会因总线错误（退出码 -7）
    终止，没有其他提示。

    办法：启动容器时加 --shm-size=16g 或 --ipc=host；在 Kubernetes 中把 medium 为 Memory 的 emptyDir 挂到 /dev/shm。
    """
    room, launch = facts.machine.shared_memory_gib, facts.environment.launch
    launched = 0 if facts.machine.is_described else launch.local_world_size
    ranks = max(launched, len(cards_of(facts)))
    needed = max(LEAST_SHARED_GIB, SHARED_GIB_PER_RANK * ranks)
    if room is None or ranks < 2 or room >= needed:
        return
    is_certain = launched > 1 or facts.machine.is_described
    yield Finding(
        what=f"/dev/shm has {room:.2f} GiB, and {ranks} ranks on one node need {needed:g} GiB",
        where=f"/dev/shm of {facts.machine.name}",
        to_do="start the container with --shm-size=16g or --ipc=host",
        level="stop" if is_certain else "warning",
    )


@pitfall(
    "environment",
    cost="hours",
    errors=[
        r"wandb: (?:\(\d\)|Enter your choice)",
        r"wandb.{0,80}(?:api_key not configured|No API key configured|UsageError)",
        r"(?:wandb|swanlab|comet|neptune).{0,60}(?:login|api.?key).{0,60}(?:required|not (?:configured|found|set))",
    ],
    sources=[
        "https://github.com/wandb/wandb/issues/592",
        "https://github.com/unslothai/unsloth/issues/1914",
        "https://github.com/kohya-ss/sd-scripts/pull/435",
        "https://github.com/McGill-NLP/llm2vec/issues/99",
    ],
)
def tracker_login_prompt(facts: Facts) -> Iterable[Finding]:
    """The run reports to Weights & Biases, and nobody has logged in.

    Why: wandb then asks for a key on the terminal. In a batch job there is none: the run hangs at "Enter your choice"
    with the cards reserved, or dies after the model was loaded.

    Fix: Set WANDB_API_KEY or run wandb login once; or WANDB_MODE=offline and wandb sync later; or log.wandb: null.

    运行要向 Weights & Biases 汇报，但没有登录。

    为何：wandb 会在终端上询问密钥。批处理作业没有终端：运行会停在 “Enter your choice” 而显卡一直被占用，
    或在加载模型之后终止。

    办法：设置 WANDB_API_KEY 或先运行一次 wandb login；或设 WANDB_MODE=offline 之后再 wandb sync；
    或 log.wandb: null。
    """
    if facts.resolved is None or facts.run.log.wandb is None:
        return
    environment, place = facts.environment, facts.origin("log.wandb")
    if environment.packages and "wandb" not in environment.packages:
        yield Finding(
            what=f"log.wandb: {facts.run.log.wandb}, and the package wandb is not installed",
            where=place,
            to_do='pip install "zhibei[wandb]", or set log.wandb: null',
            changes={"log.wandb": None},
        )
    elif fault := environment.trials.get(WANDB_CREDENTIALS, ""):
        hangs = not environment.stdin_is_terminal or environment.launch.world_size > 1
        yield Finding(
            what=f"log.wandb: {facts.run.log.wandb}, and nobody has logged in: {fault}",
            where=place,
            to_do="set WANDB_API_KEY or WANDB_MODE=offline, run  wandb login, or set log.wandb: null",
            level="stop" if hangs else "warning",
            changes={"log.wandb": None},
        )


@pitfall(
    "environment",
    cost="minutes",
    errors=[
        r"Tokenizer class \w+ does not exist or is not currently imported",
        r"cannot import name '?\w*(?:Llama|LLaMA|Qwen|Mistral|Gemma|Phi)\w*'? from '?transformers",
        r"model type `?[\w.-]+`? but Transformers does not recognize this architecture",
        r"KeyError: '(?:llama|qwen2|qwen3|mistral|mixtral|gemma\d?|phi3)'",
    ],
    sources=[
        "https://github.com/huggingface/transformers/issues/22222",
        "https://github.com/WeOpenML/PandaLM/issues/32",
        "https://github.com/IDEA-CCNL/Fengshenbang-LM/issues/371",
    ],
)
def transformers_too_old_for_llama(facts: Facts) -> Iterable[Finding]:
    """The installed transformers does not know the model's family.

    Why: config.json names a model_type that came with a later version of transformers, or one that lives only in code
    beside the weights. The error speaks of a class that does not exist.

    Fix: pip install -U transformers within the range that zhibei takes. For a model with code of its own that you
    trust, set model.trust_remote_code: true.

    当前的 transformers 不认识该模型的家族。

    为何：config.json 中的 model_type 属于更新的 transformers，或只存在于权重旁的代码里。报错却说某个类不存在。

    办法：在 zhibei 支持的范围内 pip install -U transformers。若模型自带代码且你信任它，
    设置 model.trust_remote_code: true。
    """
    known = facts.environment.model_types
    if facts.resolved is None or facts.model is None or not known:
        return
    family = facts.model.config.get("model_type")
    if not isinstance(family, str) or family in known:
        return
    if "auto_map" in facts.model.config and facts.run.model.trust_remote_code:
        return
    installed = facts.environment.packages.get("transformers", "")
    made_with = facts.model.config.get("transformers_version")
    hint = f"; its config.json was written by transformers {made_with}" if made_with else ""
    has_code = "auto_map" in facts.model.config
    yield Finding(
        what=f"model_type {family!r} is unknown to transformers {installed}{hint}",
        where=f"{facts.model.path}/config.json, field 'model_type'",
        to_do="set model.trust_remote_code: true if you trust the code beside the weights"
        if has_code
        else "pip install -U transformers (zhibei takes 5.17 and newer of 5), or use a model of a known family",
    )


@pitfall(
    "environment",
    cost="launch",
    errors=[r"is required for a normal functioning of this module, but found"],
    sources=["https://github.com/huggingface/transformers/issues/22222"],
)
def packages_outside_their_range(facts: Facts) -> Iterable[Finding]:
    """An installed package is missing or outside the range that zhibei was tested with.

    Why: Another package has changed it. Code that calls an older or newer interface fails late, or works differently
    without saying so.

    Fix: pip install -U zhibei, or make an environment of its own for training.

    某个软件包缺失，或其版本超出 zhibei 测试过的范围。

    为何：它被别的软件包改动过。按旧的或新的接口编写的代码会到后面才失败，或悄悄以不同的方式工作。

    办法：pip install -U zhibei，或为训练单独建立一个环境。
    """
    for words in facts.environment.unmet:
        yield Finding(what=words, where="this Python environment", to_do="pip install -U zhibei")


@pitfall(
    "environment",
    cost="hours",
    errors=[r"Torch not compiled with CUDA enabled", r"PyTorch was compiled without CUDA", r"Found no NVIDIA driver"],
    sources=["https://github.com/pytorch/pytorch/issues/150733"],
)
def torch_cannot_use_the_card(facts: Facts) -> Iterable[Finding]:
    """A card is there, and the installed torch is a build for processors or too new for the driver.

    Why: device: auto then trains on the processor, a hundred times slower, without an error.

    Fix: Install a CUDA build of torch that the driver serves, or update the driver. Set device: cpu if you mean it.

    机器上有显卡，但当前的 torch 是处理器版，或比驱动要求的更新。

    为何：device: auto 会在处理器上训练，慢上百倍而不报错。

    办法：安装驱动所支持的 CUDA 版 torch，或更新驱动。若确实要用处理器，设置 device: cpu。
    """
    environment, cards = facts.environment, cards_of(facts)
    if facts.machine.is_described or not cards or "torch" not in environment.packages:
        return
    torch = f"torch {environment.packages['torch']}"
    if environment.torch_cuda is None and environment.torch_hip is None:
        what, to_do = f"{torch} is a build without CUDA", "pip install torch from https://pytorch.org for this CUDA"
    elif is_older(environment.driver_cuda, environment.torch_cuda):
        what = f"{torch} needs CUDA {environment.torch_cuda}, and driver {environment.driver} serves up to "
        what += f"{environment.driver_cuda}"
        to_do = "update the driver, or install torch for an older CUDA"
    else:
        return
    yield Finding(what=f"{what}, and {described(*cards[0])} is there", where="package torch", to_do=to_do)


def is_older(served: str | None, needed: str | None) -> bool:
    """Whether the driver's CUDA is of an older major version. Within a major version drivers serve newer minors
    (CUDA's minor version compatibility)."""
    if not served or not needed:
        return False
    return int(served.split(".")[0]) < int(needed.split(".")[0])


@pitfall(
    "environment",
    cost="launch",
    errors=[r"Failed to find C compiler", r"InvalidCxxCompiler", r"No working C\+\+ compiler found"],
    sources=["https://github.com/pytorch/pytorch/issues/150733"],
)
def compile_without_c_compiler(facts: Facts) -> Iterable[Finding]:
    """Layers are to be compiled, and there is no C compiler.

    Why: torch.compile lets a C compiler build the code that starts its kernels, at the first step, after the model and
    the data were loaded.

    Fix: apt-get install gcc (or conda install gcc), or set model.compile: auto, which compiles where that works.

    要求编译模型层，却没有 C 编译器。

    为何：torch.compile 会在第一步用 C 编译器生成启动内核的代码，而那时模型与数据都已加载。

    办法：apt-get install gcc（或 conda install gcc），或设置 model.compile: auto，仅在可行时编译。
    """
    if facts.resolved is not None and facts.run.model.compile is True and not facts.environment.has_c_compiler:
        yield Finding(
            what="model.compile: true, and no C compiler (cc, gcc, clang) is on the path",
            where=facts.origin("model.compile"),
            to_do="install gcc, or set model.compile: auto",
            changes={"model.compile": "auto"},
            is_safe=True,
        )
