"""What `zhibei doctor` tries, as run in a process of its own: `python -m zhibei.doctor.trial_scripts < trials.json`.

Reads a JSON list of trials, and for each writes {"started": name} and then {"name", "words", "figures"}, {"name",
"fault"} or {"name", "absent"} as one line. A crash in between leaves a trial started and not ended. Knows no table.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB, GIB = 2**20, 2**30
# Largest error of a 256 x 256 product relative to its largest entry. Two to four times what rounding the inputs to the
# dtype explains: 2^-24 (fp32), 2^-11 (tf32, fp16), 2^-8 (bf16), 2^-4 (fp8 e4m3), over sums of 256 terms.
BOUNDS = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 2e-2, "fp16": 3e-3, "fp8": 1.5e-1}
SIZE = 256
TIMED_SIZE = {"cuda": 4096, "cpu": 512}
SPEED_SECONDS = 0.3
ALL_REDUCE_MIB = 64
ALL_REDUCE_SECONDS = 60
DISK_MIB = 256
SHARED_MIB = 128
HOST_MIB = 1024


class NotHereError(Exception):
    """The device or a package for this trial is not there; that is no fault."""


Said = tuple[str, dict[str, float]]
Spec = Mapping[str, Any]


def multiply(spec: Spec) -> Said:
    """A product against its fp64 reference, and how fast larger ones go."""
    import torch

    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    device, name = torch.device(spec["device"]), spec["dtype"]
    if name == "fp8":
        return _multiply_fp8(device)
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    product = (left.to(device, dtypes[name]) @ right.to(device, dtypes[name])).double().cpu()
    _require_close(product, left @ right, BOUNDS[name])
    rate = _rate(device, dtypes[name])
    return f"{rate:.3g} TFLOPS" if rate >= 1 else f"{1000 * rate:.3g} GFLOPS", {"tflops": rate}


def _multiply_fp8(device: Any) -> Said:
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    one = torch.ones((), device=device)
    scaled_mm: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]  torch's only product of fp8
    product = scaled_mm(
        left.to(device, torch.float8_e4m3fn),
        right.t().contiguous().to(device, torch.float8_e4m3fn).t(),
        scale_a=one,
        scale_b=one,
        out_dtype=torch.bfloat16,
    )
    _require_close(product.double().cpu(), left @ right, BOUNDS["fp8"])
    return "e4m3", {}


def _require_close(found: Any, wanted: Any, bound: float) -> None:
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not error <= bound:  # NaN is not close
        raise ArithmeticError(f"wrong result: relative error {error:.2g}, at most {bound:.2g} expected")


def _rate(device: Any, dtype: Any) -> float:
    import torch

    size = TIMED_SIZE[device.type]
    x = torch.randn(size, size, device=device, dtype=dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    torch.mm(x, x)
    wait()
    started, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - started < SPEED_SECONDS:
        torch.mm(x, x)
        times += 1
        if times % 10 == 0:
            wait()
    wait()
    return 2 * size**3 * times / (time.perf_counter() - started) / 1e12


def sdpa(spec: Spec) -> Said:
    """One backend of torch's attention against the plain formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    device = torch.device(spec["device"])
    half = torch.float32 if device.type == "cpu" else torch.bfloat16 if spec["has_bf16"] else torch.float16
    query, key, value = _heads(device, half)
    try:
        with sdpa_kernel(backends[spec["backend"]]):
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "not compiled" in str(error):
            raise NotHereError(f"no such kernel for this device in torch {torch.__version__}") from None
        raise
    _require_close(mixed.double().cpu(), _plain_attention(query, key, value), 2e-2)
    return str(half).removeprefix("torch."), {}


def _heads(device: Any, dtype: Any, *, tokens: int = 64) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, tokens, 64, generator=generator).to(device, dtype) for _ in range(3)]


def _plain_attention(query: Any, key: Any, value: Any) -> Any:
    import torch

    query, key, value = (x.double().cpu() for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def packed_attention(spec: Spec) -> Said:
    """zhibei's own kernels over two packed rows: neither may see the other. With gradients."""
    import torch

    from zhibei.model.attention import RowLengths, document_attention, varlen_attention, varlen_is_available

    device = torch.device(spec["device"])
    if spec["kernel"] == "varlen" and not varlen_is_available(device):
        raise NotHereError("needs a CUDA card of compute capability 8.0 or newer; `documents` is used instead")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16 if spec["has_bf16"] else torch.float16
    heads = [one.requires_grad_() for one in _heads(device, dtype)]
    lengths = (40, 24)
    kernel: Any = varlen_attention if spec["kernel"] == "varlen" else document_attention
    borders = torch.tensor([0, 40, 64], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"rows": RowLengths(lengths), "borders": borders, "longest": 40}
    mixed, _ = kernel(torch.nn.Identity(), heads[0], heads[1], heads[2], None, **options)
    mixed.sum().backward()
    parts = zip(*(one.detach().split(lengths, dim=2) for one in heads), strict=True)
    wanted = torch.cat([_plain_attention(*part) for part in parts], dim=2).transpose(1, 2)
    _require_close(mixed.detach().double().cpu(), wanted, 2e-2)
    if not all(bool(torch.isfinite(one.grad).all()) for one in heads if one.grad is not None):
        raise ArithmeticError("its gradients are not finite")
    return str(dtype).removeprefix("torch."), {}


def compile_layers(spec: Spec) -> Said:
    """torch.compile of a small function, with gradients."""
    import torch

    device = torch.device(spec["device"])

    def function(x: Any) -> Any:
        return (torch.nn.functional.silu(x) * x).sum()

    plain, compiled = (torch.linspace(-1, 1, 64, device=device).requires_grad_() for _ in range(2))
    function(plain).backward()
    started = time.perf_counter()
    torch.compile(function)(compiled).backward()
    assert plain.grad is not None
    assert compiled.grad is not None
    _require_close(compiled.grad.double().cpu(), plain.grad.double().cpu(), 1e-5)
    return f"in {time.perf_counter() - started:.0f} s", {}


def quantise(spec: Spec) -> Said:
    """bitsandbytes: 4-bit values there and back, and one step of its 8-bit AdamW."""
    import torch

    from zhibei.text.hub import no_fetched_kernels

    try:
        with no_fetched_kernels():
            import bitsandbytes  # pyright: ignore[reportMissingImports] (optional)
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise NotHereError(f'{error} (pip install "zhibei[bnb]" for quantised bases and 8-bit optimisers)') from None
    device = torch.device(spec["device"])
    if spec["bits"] == 4:
        plain = torch.randn(256, 256, device=device)
        packed, state = quantize_4bit(plain, blocksize=64, quant_type="nf4")
        # Half the widest gap of the NF4 code, 0.30 of a block's largest value (arXiv:2305.14314), is the bound.
        _require_close(dequantize_4bit(packed, state).double().cpu(), plain.double().cpu(), 0.16)
        return f"bitsandbytes {bitsandbytes.__version__}", {}
    weight = torch.nn.Parameter(torch.ones(128, 128, device=device))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=1e-2)  # pyright: ignore[reportPrivateImportUsage]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    _require_close(weight.detach().double().cpu(), torch.full((128, 128), 0.99).double(), 1e-3)
    return f"bitsandbytes {bitsandbytes.__version__}", {}


def copy_to_card(spec: Spec) -> Said:
    """Pinned host memory to the card: what offloading lives on."""
    import torch

    device = torch.device(spec["device"])
    host = torch.ones(256 * MIB // 4, pin_memory=True)
    card = torch.empty_like(host, device=device)
    card.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    card.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    rate = 256 * MIB / (time.perf_counter() - started) / 1e9
    if card.sum(dtype=torch.float64).item() != card.numel():
        raise ArithmeticError("what arrives on the card is not what was sent")
    return f"{rate:.1f} GB/s", {"gb_per_s": rate}


def all_reduce(spec: Spec) -> Said:
    """Processes that add up a tensor: two by gloo, or one per card by NCCL."""
    from torch import distributed

    if not distributed.is_available():
        raise NotHereError("this torch was built without torch.distributed")
    backend, ranks = spec["backend"], spec["ranks"]
    if backend == "nccl" and not distributed.is_nccl_available():
        raise NotHereError("this torch was built without NCCL")
    with tempfile.TemporaryDirectory(prefix="zhibei-doctor-") as folder:
        command = [sys.executable, "-m", "zhibei.doctor.trial_scripts", "--rank"]
        children = [
            subprocess.Popen(
                [*command, json.dumps({"backend": backend, "ranks": ranks, "rank": rank, "store": f"{folder}/store"})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for rank in range(ranks)
        ]
        return _gathered(children, backend)


def _gathered(children: list[subprocess.Popen[str]], backend: str) -> Said:
    from zhibei.doctor.facts.outside import fault_of

    deadline, rates, faults = time.monotonic() + ALL_REDUCE_SECONDS, [], []
    try:
        for rank, child in enumerate(children):
            try:
                output, error = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                faults.append(f"rank {rank} got no answer from the others in {ALL_REDUCE_SECONDS} seconds")
                continue
            if child.returncode:
                faults.insert(0, f"rank {rank}: {fault_of(child.returncode, error)}")
            else:
                rates.append(float(output.split()[-1]))
    finally:
        for child in children:
            child.kill()
            child.wait()
    if faults:
        raise RuntimeError(faults[0])
    return f"{len(children)} processes, {min(rates):.1f} GB/s by {backend}", {"gb_per_s": min(rates)}


def take_part(spec: Spec) -> None:
    """One rank of `all_reduce`; prints GB/s of the sum."""
    from datetime import timedelta

    import torch
    from torch import distributed

    rank, ranks, backend = spec["rank"], spec["ranks"], spec["backend"]
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store = distributed.FileStore(spec["store"], ranks)  # pyright: ignore[reportPrivateImportUsage]
    patience = timedelta(seconds=ALL_REDUCE_SECONDS - 5)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    numbers = torch.full((ALL_REDUCE_MIB * MIB // 4,), float(rank + 1), device=device)
    distributed.all_reduce(numbers[:1].clone())
    distributed.barrier()
    started = time.perf_counter()
    distributed.all_reduce(numbers)
    total = numbers[-1].item()  # waits for the device
    seconds = time.perf_counter() - started
    if total != ranks * (ranks + 1) / 2:
        raise ArithmeticError(f"the sum over ranks is {total}, not {ranks * (ranks + 1) / 2}")
    distributed.destroy_process_group()
    print(ALL_REDUCE_MIB * MIB / seconds / 1e9)


def fill_host_memory(spec: Spec) -> Said:
    """Memory is really there when it is written to."""
    num_bytes = int(min(HOST_MIB * MIB, spec["free_gib"] * GIB / 4))
    started = time.perf_counter()
    with mmap.mmap(-1, num_bytes) as memory:
        page = b"\x01" * MIB
        for start in range(0, num_bytes - MIB + 1, MIB):
            memory[start : start + MIB] = page
    return f"{num_bytes / GIB:.2g} GiB filled in {time.perf_counter() - started:.1f} s", {}


def fill_shared_memory(spec: Spec) -> Said:
    """A file in /dev/shm, written through a mapping as NCCL and worker processes do."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        raise NotHereError("there is no /dev/shm on this system")
    num_bytes = SHARED_MIB * MIB
    with tempfile.NamedTemporaryFile(prefix="zhibei-doctor-", dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        with mmap.mmap(file.fileno(), num_bytes) as memory:
            memory[-1] = 1
    return f"{SHARED_MIB} MiB", {}


def write_disk(spec: Spec) -> Said:
    """Write, flush to the disk, rename and read back, as a checkpoint does."""
    folder = Path(spec["folder"])
    block = os.urandom(MIB)
    with tempfile.TemporaryDirectory(prefix=".zhibei-doctor-", dir=folder) as place:
        new, final = Path(place) / "new", Path(place) / "final"
        started = time.perf_counter()
        with open(new, "xb", buffering=0) as file:
            for _ in range(DISK_MIB):
                file.write(block)
            os.fsync(file.fileno())
        rate = DISK_MIB * MIB / (time.perf_counter() - started) / 1e9
        new.rename(final)
        if final.stat().st_size != DISK_MIB * MIB:
            raise OSError(f"{DISK_MIB} MiB were written and {final.stat().st_size} bytes are there")
        with open(final, "rb") as file:
            file.seek(-MIB, os.SEEK_END)
            if file.read() != block:
                raise OSError("what is read back is not what was written")
    return f"{rate:.2g} GB/s to the disk in {folder}", {"gb_per_s": rate}


KINDS: dict[str, Callable[[Spec], Said]] = {
    "multiply": multiply,
    "sdpa": sdpa,
    "packed": packed_attention,
    "compile": compile_layers,
    "quantise": quantise,
    "copy": copy_to_card,
    "all_reduce": all_reduce,
    "host": fill_host_memory,
    "shared": fill_shared_memory,
    "disk": write_disk,
}


def main() -> None:
    """Run the trials of stdin, or take part in one as a rank."""
    if sys.argv[1:2] == ["--rank"]:
        return take_part(json.loads(sys.argv[2]))
    # What libraries print must not get between the lines of answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**line: Any) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    for spec in json.load(sys.stdin):
        answer(started=spec["name"])
        try:
            words, figures = KINDS[spec["kind"]](spec)
            answer(name=spec["name"], words=words, figures=figures)
        except NotHereError as absent:
            answer(name=spec["name"], absent=str(absent))
        except Exception as error:
            text = " ".join(str(error).split())
            answer(name=spec["name"], fault=f"{type(error).__name__}: {text}"[:400])
    with suppress(OSError):
        answers.close()
    return None


if __name__ == "__main__":
    main()
