"""Messages about packages and compiled code that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = "It is the library's own refusal, met at once; what can be seen before a run has checks of its own."


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"(?:ModuleNotFound|Import)Error: no module named",
        r"No module named '?[\w.]+'?",
        r"requires the following packages that were not found",
        r"(?:requires|needs) .{0,60}(?:library|package|it).{0,40}(?:not found|not installed)",
        r"requires .{1,80}: '?pip install",
        r"Please install (?:it )?(?:with|via|using)?.{0,10}'?pip install",
    ],
)
def package_missing() -> None:
    """A package that the program needs is not installed in the Python that runs it.

    Why: Often pip belongs to another Python than the one that starts the program, or the launcher starts the
    system's python.

    Fix: python -m pip install PACKAGE with the very python that runs the program (`which -a python`), and start
    launchers as python -m torch.distributed.run.

    运行程序的 Python 里缺少所需的软件包。

    为何：常见原因是 pip 属于另一个 Python，或启动器用的是系统的 python。

    办法：用真正运行程序的那个 python 执行 python -m pip install 包名（`which -a python` 查看），
    并用 python -m torch.distributed.run 启动。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"ImportError: cannot import name",
        r"cannot import name '\w+' from",
        r"TypeError: .{0,160}got an unexpected keyword argument",
        r"AttributeError: (?:partially initialized )?module '.{1,80}' has no attribute",
        r"is required for a normal functioning of this module",
        r"\bVersionConflict\b|\bResolutionImpossible\b|pip's dependency resolver",
        r"(?:transformers|torch|accelerate|peft|trl|tokenizers|deepspeed|bitsandbytes)\S* (?:is required"
        r"|requires) .{0,40}but .{0,40}found",
    ],
)
def versions_disagree() -> None:
    """Two packages, or a script and a package, are of versions that do not fit.

    Why: Names and arguments move between releases of transformers, TRL, PEFT and torch; a script written for one
    release fails with the next, often hours after installation when an optional path is reached.

    Fix: Install the versions that the script names (its requirements or the date of its last commit), or change the
    argument to the new name from the package's migration notes. Keep a lock file.

    两个软件包（或脚本与软件包）的版本不匹配。

    为何：transformers、TRL、PEFT、torch 的名字和参数会随版本变化；为旧版写的脚本在新版上会失败，
    而且往往走到某个分支才暴露。

    办法：安装脚本所要求的版本（看 requirements 或最后提交日期），或按迁移说明改成新参数名。请保留锁定文件。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"numpy\.(?:dtype|ufunc|ndarray) size changed",
        r"compiled using NumPy 1\.x cannot be run in",
        r"_ARRAY_API not found",
        r"numpy\.core\.multiarray failed to import",
        r"module 'numpy' has no attribute '(?:int|bool|float|object|complex)'",
    ],
)
def numpy_generations_mixed() -> None:
    """A package was built for another generation of numpy.

    Why: numpy 2 changed its binary interface and removed old names; packages built for numpy 1 fail at import or
    later.

    Fix: pip install -U the named package, or pip install 'numpy<2' until it has a new release.

    软件包是为另一代 numpy 编译的。

    为何：numpy 2 改变了二进制接口并移除了旧名字；为 numpy 1 编译的包会在导入时或之后失败。

    办法：升级报错的软件包，或暂时 pip install 'numpy<2'。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"undefined symbol: ",
        r"GLIBC(?:XX)?_[\d.]+'? not found",
        r"cannot open shared object file",
        r"DLL load failed while importing",
        r"libcud\w+\.so[\d.]*:? .{0,40}(?:not found|no such file)",
    ],
)
def shared_library_missing() -> None:
    """A compiled package does not find the library it was built against.

    Why: It was built for another torch, CUDA or system library than those present; conda and pip mixed, or
    LD_LIBRARY_PATH put another one first.

    Fix: Reinstall the package for this torch and CUDA; unset LD_LIBRARY_PATH; do not mix conda's and pip's CUDA.
    For GLIBC use a newer container, for GLIBCXX conda install libstdcxx-ng.

    编译好的软件包找不到它所依赖的库。

    为何：它为另一个 torch、CUDA 或系统库编译；也可能是混用 conda 与 pip，或 LD_LIBRARY_PATH 把别的库排在了前面。

    办法：为当前 torch 与 CUDA 重装该包；unset LD_LIBRARY_PATH；不要混用 conda 与 pip 的 CUDA。GLIBC 问题换新容器，
    GLIBCXX 问题 conda install libstdcxx-ng。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"requires a different python",
        r"'type' object is not subscriptable",
        r"unsupported operand type\(s\) for \|: '",
        r"python (?:3\.[0-9]|2\.\d)\S* is not supported|requires python >= ?3",
    ],
)
def python_too_old() -> None:
    """The program needs a newer Python.

    Why: Newer packages use syntax that an old Python cannot read, or pip quietly installs an ancient release of
    them.

    Fix: Make an environment with Python 3.10 or newer and install again.

    Python 版本太旧。

    为何：新软件包使用旧 Python 读不懂的语法，或者 pip 会悄悄装上很老的版本。

    办法：用 Python 3.10 或更新版本建立环境后重新安装。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"failed to find C compiler",
        r"\bBackendCompilerFailed\b|\bInductorError\b",
        r"triton\S*\.\S*CompilationError",
        r"torch\._dynamo\.exc\.\w+",
        r"\bCppCompileError\b",
        r"PTXASError|ptxas.{0,40}fatal",
    ],
)
def compile_failed() -> None:
    """torch.compile or Triton could not build a kernel.

    Why: It needs a C compiler and Python's headers at run time, a Triton that knows the card, and code that it can
    trace.

    Fix: Install gcc and python3-dev, or switch compilation off (model.compile: false; TORCHDYNAMO_DISABLE=1
    elsewhere). `zhibei doctor` compiles a small kernel to see.

    torch.compile 或 Triton 无法生成内核。

    为何：运行时需要 C 编译器和 Python 头文件、认识该显卡的 Triton，以及可以追踪的代码。

    办法：安装 gcc 和 python3-dev，或关闭编译（model.compile: false；其他程序用 TORCHDYNAMO_DISABLE=1）。
    `zhibei doctor` 会实际编译一个小内核。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"error building extension",
        r"ninja is required to load C\+\+ extensions",
        r"CUDA_HOME environment variable is not set|\bMissingCUDAException\b|CUDA_HOME does not exist",
        r"failed building wheel for (?:flash|deepspeed|apex|bitsandbytes|xformers|mamba|causal)",
    ],
)
def extension_not_built() -> None:
    """An extension could not be compiled on this machine.

    Why: It needs ninja, a host compiler that fits nvcc, and a CUDA toolkit of torch's own CUDA version, not only a
    driver.

    Fix: Take a ready-made wheel for this torch and CUDA, or install the toolkit and set CUDA_HOME; pip install
    ninja. Or do without the extension: zhibei needs none.

    扩展无法在本机编译。

    为何：它需要 ninja、与 nvcc 相配的主机编译器，以及与 torch 相同版本的 CUDA 工具包，仅有驱动不够。

    办法：安装与当前 torch、CUDA 对应的预编译包，或安装工具包并设置 CUDA_HOME；pip install ninja。也可以不用该扩展：
    zhibei 不需要任何扩展。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"FlashAttention2? has been toggled on, but it cannot be used",
        r"does not support (?:an attention implementation|Flash ?Attention)",
        r"flash_attn\S* seems to be not installed|package flash_attn seems",
        r"no available kernel\. Aborting execution",
        r"attn_implementation.{0,80}(?:not supported|not available|cannot be used|invalid)",
    ],
)
def attention_kernel_not_available() -> None:
    """The attention kernel that was asked for is not there.

    Why: flash-attn is a separate package for certain cards, and not every architecture works with every
    implementation.

    Fix: Leave it to the program (model.attention: auto), or attn_implementation="sdpa"; install flash-attn's wheel
    for this torch if you need it.

    所要求的注意力内核不可用。

    为何：flash-attn 是单独的软件包且只支持部分显卡，也不是每种结构都支持每种实现。

    办法：交给程序选择（model.attention: auto），或 attn_implementation="sdpa"；
    确有需要再装与当前 torch 对应的 flash-attn。
    """


@pitfall(
    "messages",
    cost="minutes",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"'?use_cache'?=?.{0,10}True'? is incompatible with gradient checkpointing",
        r"token indices sequence length is longer than the specified maximum",
        r"the current process just got forked, after parallelism has already been used",
        r"torch_dtype'? is deprecated",
        r"setting 'pad_token_id' to 'eos_token_id'",
    ],
)
def notice_without_harm() -> None:
    """A notice that comes with sound runs too.

    Why: The library mends it by itself (it switches the cache off, sets padding for generation) or only announces a
    change; it does not end a run.

    Fix: Nothing. Look for another line if the run failed.

    正常运行也会出现的提示。

    为何：库会自行处理（关闭缓存、为生成设置填充），或只是预告变化，不会中断训练。

    办法：不用处理。如果训练失败，请看别的行。
    """
