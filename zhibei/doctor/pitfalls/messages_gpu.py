"""Messages of GPUs and their links that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = "Many faults end in this message; those that can be seen before a run have checks of their own."


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"NCCL error",
        r"\bncclSystemError\b|\bncclInternalError\b|\bncclUnhandledCudaError\b|\bncclInvalidUsage\b",
        r"unhandled (?:system|cuda) error",
        r"NCCL WARN (?:Cuda failure|Error|Call to|Failed)",
        r"NCCL operation .{1,60} failed",
    ],
)
def nccl_failed() -> None:
    """The GPUs of a job could not talk to one another.

    Why: NCCL only says that a call failed; the reason (a wrong interface, too little shared memory, two ranks on
    one card, a dead peer, a driver problem) stands in its own log.

    Fix: Run again with NCCL_DEBUG=INFO and read the first WARN. Then `zhibei doctor`, which tries an all-reduce
    here. Usual cures: NCCL_SOCKET_IFNAME for the right interface, docker --ipc=host, one rank per GPU.

    多卡之间无法通信。

    为何：NCCL 只报告某次调用失败；真正原因（网卡选错、共享内存太小、两个进程用同一张卡、对端已退出、
    驱动问题）在它自己的日志里。

    办法：设置 NCCL_DEBUG=INFO 重跑，看第一条 WARN。再运行 `zhibei doctor`，它会实际做一次 all-reduce。常见办法：
    用 NCCL_SOCKET_IFNAME 指定网卡、docker --ipc=host、每卡一个进程。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"NVIDIA driver on your system is too old",
        r"driver version is insufficient for CUDA runtime",
        r"forward compatibility was attempted on non supported HW",
        r"unsupported display driver / cuda driver combination",
        r"provided PTX was compiled with an unsupported toolchain",
        r"requires a CUDA driver version of at least",
    ],
)
def cuda_driver_too_old() -> None:
    """The GPU driver is older than the CUDA that torch was built with.

    Why: A torch build brings its own CUDA runtime, and each runtime needs a driver of a certain age. The driver
    belongs to the machine, not to the environment, so a fresh `pip install` breaks what worked.

    Fix: Update the driver, or install the torch build of an older CUDA (the version that `nvidia-smi` shows at the
    top right, or less). `zhibei doctor` names both versions.

    显卡驱动比 torch 所用的 CUDA 旧。

    为何：torch 自带 CUDA 运行时，每个版本都要求足够新的驱动。驱动属于机器而不属于环境，
    所以重新 `pip install` 会弄坏原本能用的机器。

    办法：升级驱动，或安装较旧 CUDA 版本的 torch（不超过 `nvidia-smi` 右上角显示的版本）。
    `zhibei doctor` 会列出两个版本。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"no CUDA GPUs are available",
        r"found no NVIDIA driver",
        r"torch not compiled with CUDA enabled",
        r"NVIDIA-SMI has failed",
        r"deserialize object on a CUDA device but torch\.cuda\.is_available\(\) is False",
        r"no CUDA-capable device is detected",
        r"failed to initialize NVML",
        r"invalid device ordinal",
        r"attempting to deserialize object on CUDA device \d+ but",
        r"cuda unknown error",
    ],
)
def no_gpu_visible() -> None:
    """A GPU was asked for that this process cannot see.

    Why: The torch build has no CUDA, the container was started without --gpus, CUDA_VISIBLE_DEVICES hides the card
    or names one that is not there, or the driver is not loaded.

    Fix: Compare nvidia-smi with `zhibei doctor`. Install a CUDA build of torch, start the container with --gpus
    all, correct CUDA_VISIBLE_DEVICES, and start as many ranks as there are cards.

    程序要用的显卡对它不可见。

    为何：可能是 torch 装成了 CPU 版、容器启动时没有 --gpus、CUDA_VISIBLE_DEVICES 隐藏了显卡或写了不存在的编号，
    或者驱动没有加载。

    办法：对比 nvidia-smi 与 `zhibei doctor`。安装 CUDA 版 torch，用 --gpus all 启动容器，
    改正 CUDA_VISIBLE_DEVICES，进程数不超过显卡数。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"device-side assert(?: triggered)?",
        r"\bcudaErrorAssert\b",
        r"index out of range in self",
        r"index .{1,40} is out of bounds for dimension",
    ],
)
def device_side_assert() -> None:
    """An index lies outside of its table on the GPU.

    Why: Most often a token id is beyond the embedding (a tokenizer with more tokens than the model), a label is
    beyond the classes, or a position is beyond the longest the model has. CUDA reports it late and at another
    place.

    Fix: Run one batch on the CPU, or with CUDA_LAUNCH_BLOCKING=1: the true place shows. Compare the highest id of
    the data with the embedding's rows; `zhibei check` does that for every row.

    索引超出了表的范围（GPU 端断言）。

    为何：最常见的是词元编号超出嵌入层（分词器比模型大）、标签超出类别数，或位置超出模型支持的最大长度。
    CUDA 会延后并在别处报告。

    办法：用 CPU 跑一个批次，或设置 CUDA_LAUNCH_BLOCKING=1，就能看到真正的位置。比较数据中的最大编号与嵌入层行数；
    `zhibei check` 会对每一行检查。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"illegal memory access",
        r"misaligned address",
        r"\bcudaErrorIllegalAddress\b",
        r"unspecified launch failure",
        r"illegal instruction was encountered",
        r"an invalid argument was encountered.{0,40}CUDA|CUDA error: invalid argument",
    ],
)
def illegal_memory_access() -> None:
    """A kernel on the GPU touched memory that is not its own.

    Why: A faulty extension, an extension built for another torch, an index that nothing checks, or a card that is
    failing. After it the CUDA context is lost, so later messages mislead.

    Fix: Run with CUDA_LAUNCH_BLOCKING=1 for the true place. Switch compiled extras off one at a time (attention
    kernels, 8-bit optimisers, torch.compile). If the place changes from run to run, test the card: `zhibei doctor`,
    dmesg for Xid.

    GPU 内核访问了非法地址。

    为何：可能是扩展有错、扩展为另一版 torch 编译、没有检查的越界索引，或显卡本身有故障。此后 CUDA 上下文失效，
    后面的报错会误导人。

    办法：用 CUDA_LAUNCH_BLOCKING=1 找到真正的位置。逐个关闭编译出来的组件（注意力内核、8 位优化器、
    torch.compile）。如果位置每次都不同，请检查显卡：`zhibei doctor`，dmesg 里的 Xid。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"CUBLAS_STATUS_(?!ALLOC_FAILED)[A-Z_]+",
        r"CUDNN_STATUS_[A-Z_]+",
        r"cusolver error",
        r"\bcuDNN error\b",
        r"unable to find an engine to execute this computation",
    ],
)
def gpu_library_failed() -> None:
    """cuBLAS or cuDNN refused a computation.

    Why: These libraries fail when memory is nearly full, when an earlier kernel already broke the context (an index
    out of range), when two versions of them are loaded, or when the card lacks the number format.

    Fix: Run with CUDA_LAUNCH_BLOCKING=1; look for an earlier assert. Leave memory free (smaller micro-batch).
    Remove a second CUDA from LD_LIBRARY_PATH. `zhibei doctor` tries a product in each number format.

    cuBLAS 或 cuDNN 拒绝计算。

    为何：显存将满、更早的内核已破坏上下文（越界索引）、加载了两个版本的库，或显卡不支持该数值格式时，都会这样失败。

    办法：用 CUDA_LAUNCH_BLOCKING=1 重跑，看前面是否有断言；留出显存（减小微批）；
    从 LD_LIBRARY_PATH 移除另一套 CUDA。`zhibei doctor` 会对每种数值格式实际试算。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"NVRM: Xid",
        r"uncorrectable (?:NVLink|ECC) error",
        r"GPU has fallen off the bus",
        r"GPU is lost",
        r"hardware stack exception",
    ],
)
def gpu_reports_a_fault() -> None:
    """A graphics card reports a hardware fault.

    Why: Memory errors, a lost bus or an NVLink fault end a run at random places, or make one rank slow and all
    others wait.

    Fix: Take the card out of the job (CUDA_VISIBLE_DEVICES), restart the machine, and have the card tested;
    nvidia-smi -q -d ECC and dmesg show the counters. Then resume from the last checkpoint.

    显卡报告硬件故障。

    为何：显存错误、掉卡或 NVLink 故障会让训练在随机位置中断，或让一个进程变慢、其余全部等待。

    办法：先把这张卡移出作业（CUDA_VISIBLE_DEVICES），重启机器并送检；nvidia-smi -q -d ECC 和 dmesg 可看计数。
    然后从最近的检查点继续。
    """
