"""Messages of processes, launchers and disks that many faults share. Knows no run."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall

BECAUSE = "Many faults end in this message; those that can be seen before a run have checks of their own."


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"communicator was aborted",
        r"\bncclRemoteError\b",
        r"remote process exiting prematurely",
        r"connection reset by peer",
        r"connection closed by (?:remote )?peer",
        r"\bbroken pipe\b",
        r"\bRayActorError\b|\bActorDiedError\b|actor died unexpectedly",
        r"watchdog.{0,60}(?:terminat|taking the entire process down|process down)",
        r"EngineCore (?:failed to start|encountered)|Engine core initialization failed",
        r"sending process \d+ closing signal SIGTERM",
        r"\[c10d\] .{0,80}(?:recvValue|sendBytes) failed",
    ],
)
def other_rank_died() -> None:
    """Another process of the job has died; this one only noticed.

    Why: When one rank ends, the others lose their connection or wait until a time-out. Their messages look like
    network trouble and hide the first error.

    Fix: Look at the log of the rank that failed first: earliest time stamp, or the root cause in torchrun's table.
    Give all ranks' logs to `zhibei explain` together; torchrun --tee 3 --log-dir logs keeps them apart.

    作业中的另一个进程先死了，这里只是后果。

    为何：一个进程退出后，其他进程会断开连接或一直等到超时。它们的报错看似网络问题，掩盖了最初的错误。

    办法：去看最先失败的进程的日志：时间最早，或 torchrun 表格中的 root cause。
    可以把所有进程的日志一起交给 `zhibei explain`；torchrun --tee 3 --log-dir logs 会分别保存。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"CalledProcessError.{0,2000}non-zero exit status",
        r"\bChildFailedError\b",
        r"exits with return code = [1-9]",
        r"failed \(exitcode: [1-9]\d*\)",
        r"process \d+ terminated with (?:exit code [1-9]|signal)",
        r"\bProcess(?:Raised|Exited)Exception\b",
        r"exited with exit code [1-9]\d*",
        r"exitcode\s*: [1-9]\d* \(pid",
    ],
)
def child_process_failed() -> None:
    """A launcher reports that the program it started has failed.

    Why: torchrun, accelerate, DeepSpeed and srun print their own traceback last, about a command with a non-zero
    exit status. It says nothing about why; the program's error stands above it or in another rank's log.

    Fix: Read upwards to the first traceback, or give the whole log to `zhibei explain`. If nothing stands there,
    set TORCHELASTIC_ERROR_FILE or torchrun --tee 3 --log-dir logs and run again.

    启动器报告它启动的程序失败了。

    为何：torchrun、accelerate、DeepSpeed、srun 会在最后打印自己的 traceback，只说某个命令以非零状态退出，
    不说明原因；真正的错误在上面，或在别的进程的日志里。

    办法：往上找第一个 traceback，或把完整日志交给 `zhibei explain`。如果什么都没有，
    用 torchrun --tee 3 --log-dir logs 重跑。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"CANCELLED AT .{0,60}DUE TO",
        r"DUE TO (?:TIME LIMIT|PREEMPTION|NODE FAILURE)",
        r"SignalException: Process \d+ got signal: \d+",
        r"Received Signals\.SIG(?:HUP|TERM|INT) death signal",
        r"received (?:signal )?SIG(?:TERM|HUP)\b",
        r"slurmstepd: error: \*\*\* (?:JOB|STEP) .{0,60}CANCELLED",
        r"spot (?:instance )?interruption|node .{0,40} is being preempted",
    ],
)
def job_ended_from_outside() -> None:
    """The job was ended from outside: its time limit, a preemption, or a closed terminal.

    Why: Slurm ends jobs at their time limit, clouds take spot machines back, and torchrun forwards SIGHUP when the
    SSH session closes. The program itself had no fault; what it had not saved is gone.

    Fix: Save more often than you can bear to lose, ask for enough time, start long runs in tmux or with nohup and
    setsid. `zhibei train` saves on SIGTERM and SIGUSR1 (sbatch --signal=USR1@120); go on with `zhibei resume RUN`.

    作业是被外部结束的：到了时限、被抢占，或终端被关闭。

    为何：Slurm 到时限就会结束作业，云平台会回收竞价实例，SSH 断开时 torchrun 会转发 SIGHUP。程序本身没有错，
    但没保存的进度都丢了。

    办法：让保存间隔不超过你能承受的损失，申请足够的时间，长任务放在 tmux 里或用 nohup、setsid 启动。
    `zhibei train` 收到 SIGTERM 和 SIGUSR1 会先保存（sbatch --signal=USR1@120），之后用 `zhibei resume RUN` 继续。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"out of memory: killed process",
        r"oom[-_]kill",
        r"invoked oom-killer",
        r"cannot allocate memory",
        r"DefaultCPUAllocator: (?:not enough|can't allocate) memory",
        r"^(?:\w+\.)*MemoryError\b",
        r"std::bad_alloc",
        r"unable to allocate [\d.]+ [KMGT]iB for an array",
        r"node running low on memory",
        r"\bOOMKilled\b",
        r"return code = -9\b|exitcode\s*:?\s*-9\b|terminated with signal (?:9|SIGKILL)|signal 9 \(SIGKILL\)",
        r"exceeded (?:job |step )?memory limit",
    ],
)
def host_memory_exhausted() -> None:
    """The memory of the host, or the limit of its container, is full.

    Why: The kernel, Slurm or the container ends the process that asks for more; often every rank loads a full copy
    of the weights, or data workers each hold the data set. The killed process can say nothing itself.

    Fix: Load weights once per node or straight to the GPU, use fewer data workers, raise the job's memory limit
    (--mem, docker -m). `zhibei plan RUN` shows host memory by phase.

    主机内存（或容器的内存上限）耗尽。

    为何：内核、Slurm 或容器会直接杀掉继续申请内存的进程；常见原因是每个进程各自加载一整份权重，
    或每个数据进程都持有整个数据集。被杀的进程来不及留下任何信息。

    办法：每个节点只加载一次权重或直接加载到显卡，减少数据进程，提高作业的内存上限（--mem、docker -m）。
    `zhibei plan RUN` 会按阶段列出主机内存。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"\bRendezvous(?:Timeout|Connection|Closed|Graceful)\w*Error",
        r"client socket has (?:timed out|failed to connect)",
        r"timed out after \d+ ?(?:ms|s|seconds?) waiting for clients",
        r"\bDist(?:Store|Network)Error\b",
        r"connect\(\) timed out",
        r"rendezvous .{0,60}(?:timed out|timeout|failed)",
        r"waiting for all ranks|waiting in store based barrier",
    ],
)
def rendezvous_timed_out() -> None:
    """The processes of a job did not find one another.

    Why: The address or port of the first node is wrong or blocked, a node was not started, or they disagree on the
    number of nodes or the job's id. Each waits for the others until the time-out.

    Fix: Use the same --rdzv-endpoint HOST:PORT, --rdzv-id and --nnodes everywhere; test the port from another node
    (nc -vz HOST PORT); check firewall and that HOST resolves to the address that others reach.

    作业的各进程没有会合。

    为何：首节点的地址或端口错误或被拦截、有节点没启动，或各节点的节点数、作业号不一致。大家互相等待直到超时。

    办法：各处使用相同的 --rdzv-endpoint HOST:PORT、--rdzv-id、--nnodes；在别的节点测试端口（nc -vz HOST PORT）；
    检查防火墙，以及 HOST 解析出的地址是否可达。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"DataLoader worker .{0,60}(?:is )?killed by signal",
        r"DataLoader worker .{0,60}exited unexpectedly",
    ],
)
def data_worker_killed() -> None:
    """A process that prepares data was killed.

    Why: Usually the host ran out of memory, or /dev/shm of a container is too small for the batches that workers
    hand over; sometimes a library crashed in the worker.

    Fix: Fewer workers, --shm-size=16g or --ipc=host for containers, and one run without workers, which shows the
    true traceback.

    准备数据的进程被杀。

    为何：通常是主机内存耗尽，或容器的 /dev/shm 太小、放不下进程间传递的批次；有时是库在进程里崩溃。

    办法：减少数据进程数；容器用 --shm-size=16g 或 --ipc=host；用 0 个数据进程跑一次，可看到真正的 traceback。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"too many open files",
        r"\bErrno 24\b",
        r"received 0 items of ancdata",
    ],
)
def too_many_open_files() -> None:
    """The process may not open more files.

    Why: Workers that share tensors use one file descriptor per tensor; the usual limit of 1024 is soon reached.

    Fix: ulimit -n 65536 before the start (or LimitNOFILE of the service), or fewer workers.

    打开的文件数达到上限。

    为何：共享张量的数据进程每个张量占一个文件描述符，默认的 1024 很快就会用完。

    办法：启动前执行 ulimit -n 65536（或设置服务的 LimitNOFILE），或减少数据进程。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"segmentation fault",
        r"fatal python error: (?:segmentation|aborted|bus|illegal)",
        r"SIGSEGV",
        r"SIGABRT",
        r"SIGILL\b",
        r"illegal instruction",
        r"exitcode\s*:?\s*-(?:4|6|11)\b",
        r"return code = -(?:4|6)\b",
    ],
)
def process_crashed() -> None:
    """A process crashed outside of Python.

    Why: Compiled code failed: an extension built for another torch, two CUDA runtimes in one process, a processor
    without the instructions a package was built for. There is no traceback.

    Fix: PYTHONFAULTHANDLER=1 shows the Python line. Import the compiled packages one by one (flash_attn, deepspeed,
    bitsandbytes); `zhibei doctor` does that, each in its own process. Reinstall the one that crashes for this
    torch.

    进程在 Python 之外崩溃。

    为何：编译代码出错：扩展为另一版 torch 编译、进程里有两套 CUDA 运行时，或 CPU 没有该软件包所需的指令集。
    没有 traceback。

    办法：设置 PYTHONFAULTHANDLER=1 可显示 Python 行号。逐个 import 编译包（flash_attn、deepspeed、bitsandbytes）；
    `zhibei doctor` 会在独立进程里逐个尝试。为当前 torch 重装崩溃的那个。
    """


@pitfall(
    "messages",
    cost="run",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"no space left on device",
        r"\bErrno 28\b",
        r"disk quota exceeded",
        r"\bErrno 122\b",
        r"not enough (?:free )?disk space|insufficient disk space",
    ],
)
def no_space_left() -> None:
    """A disk, a quota or a temporary folder is full.

    Why: A checkpoint with optimiser states is several times the model; caches and /tmp often lie on a small disk.
    The file being written is torn.

    Fix: Free room (old checkpoints, ~/.cache/huggingface), point HF_HOME and TMPDIR to a large disk, keep fewer
    checkpoints. `zhibei plan RUN` adds up every file before the run. Do not load the torn file: `zhibei verify`.

    磁盘、配额或临时目录已满。

    为何：带优化器状态的检查点是模型的数倍；缓存和 /tmp 常在小盘上。正在写的文件会残缺。

    办法：清理空间（旧检查点、~/.cache/huggingface），把 HF_HOME、TMPDIR 指向大盘，少留检查点。
    `zhibei plan RUN` 会在训练前算出所有文件的大小。不要加载残缺文件：先 `zhibei verify`。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"PermissionError: ",
        r"permission denied",
        r"\bErrno (?:13|30)\b",
        r"read-only file system",
    ],
)
def not_writable() -> None:
    """A file or folder may not be read or written.

    Why: It belongs to another user (often root, from a container), or the disk is mounted read-only.

    Fix: Write elsewhere, or have the owner changed; run containers with --user $(id -u). Caches: set HF_HOME to a
    folder of your own.

    文件或目录没有读写权限。

    为何：它属于别的用户（常是容器里的 root），或磁盘以只读方式挂载。

    办法：写到别处，或改变属主；容器用 --user $(id -u) 运行。缓存可把 HF_HOME 指向自己的目录。
    """


@pitfall(
    "messages",
    cost="launch",
    kind="explained",
    because=BECAUSE,
    errors=[
        r"FileNotFoundError: ",
        r"no such file or directory",
        r"\bErrno 2\b",
        r"unable to find '?.{1,200}'? at |Couldn't find (?:file|any data file|a dataset script)",
    ],
)
def file_missing() -> None:
    """A file or folder that was named is not there.

    Why: A relative path is read from where the program was started, ranks on other nodes see other disks, and ~ is
    not expanded inside quotes.

    Fix: Use absolute paths, and look at the path exactly as the message prints it, on the node that printed it.

    指定的文件或目录不存在。

    为何：相对路径以启动目录为准，其他节点看到的是另外的磁盘，引号里的 ~ 不会展开。

    办法：使用绝对路径，并在报错的那台机器上按信息里的原样检查路径。
    """
