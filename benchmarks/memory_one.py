"""Memory of one configuration, phase by phase, in this process: the product's own loader, step, evaluation and save.

Knows one setting, not the grid. `explained` says what lay in memory at the peak, from the allocator's own record.
"""

from __future__ import annotations

import gc
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.memory_grid import HELD_OUT_ROWS, Setting
from benchmarks.packed_model import pack
from benchmarks.records import Record, version_of

GIB = 2**30
STEPS = 3
CHECKPOINT_LIMIT_GIB = 3.0


def measure(setting: Setting, *, explains: bool = False) -> Record:
    """Peaks of every phase in GiB: what tensors held (`allocated`), what torch took from the driver (`reserved`)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Peaks(device, explains=explains)
    with clock.phase("load"):
        parts = _assembled(setting, device)
    batches, stepper, heldout, plain = parts["batches"], parts["stepper"], parts["heldout"], parts["plain"]
    last: Any = None
    longest = 0
    for step, micro_batches in batches.steps():
        with clock.phase("first step" if step == 0 else "steady"):
            record = stepper.step(micro_batches, learning_rate=1e-5)
        last, longest = micro_batches, max(longest, *(batch.tokens_BT.numel() for batch in micro_batches))
    with clock.phase("evaluation"):
        _evaluate(stepper.model, heldout, plain, setting)
    with clock.phase("save"):
        _save(stepper, last)
    figures: Record = {
        "measured": clock.figures,
        "pass_tokens": longest,
        "num_passes": record.num_micro_batches,
        "loss": round(record.loss, 3),
    }
    if explains:
        figures["explained"] = clock.explained
        figures["saved"] = _saved(stepper, last[0])
    return {"who": "zhibei", "version": version_of("zhibei"), "method": setting.method, **figures}


class Peaks:
    """Resets and reads the allocator's counters around each phase."""

    def __init__(self, device: torch.device, *, explains: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.explains = explains and self.on_gpu
        self.figures: dict[str, dict[str, float]] = {}
        self.explained: dict[str, Any] = {}
        if self.on_gpu:
            torch.cuda.init()
            torch.zeros(1, device=device)
        if self.explains:
            torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=2_000_000)

    def outside_gib(self, reserved: int) -> float:
        """Device memory in use beside torch's allocator: CUDA's context and kernels, and other processes if any."""
        free, total = torch.cuda.mem_get_info()
        return (total - free - reserved) / GIB

    def phase(self, name: str) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def measured() -> Any:
            if not self.on_gpu:
                yield
                self.figures[name] = {"allocated_gib": 0.0, "reserved_gib": 0.0}
                return
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            yield
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            now = {
                "allocated_gib": stats["allocated_bytes.all.peak"] / GIB,
                "reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
                "after_gib": stats["allocated_bytes.all.current"] / GIB,
                "outside_gib": self.outside_gib(stats["reserved_bytes.all.current"]),
            }
            known = self.figures.get(name, now)
            self.figures[name] = {key: round(max(known[key], value), 4) for key, value in now.items()}
            if self.explains and name in ("load", "steady", "evaluation") and name not in self.explained:
                taken: Any = torch.cuda.memory._snapshot()
                self.explained[name] = at_peak(taken["device_traces"][0], self.explained)

        return measured()


def at_peak(trace: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """Blocks alive when most was allocated since the events already looked at, grouped by size and by who asked."""
    start = max((entry["events"] for entry in known.values()), default=0)
    live: dict[int, int] = {}
    total = best = best_at = 0
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            live[event["addr"]] = number
            total += event["size"]
        elif event["action"] == "free_requested" and event["addr"] in live:
            total -= trace[live.pop(event["addr"])]["size"]
        if number >= start and total > best:
            best, best_at = total, number
    live = {}
    for number, event in enumerate(trace[: best_at + 1]):
        if event["action"] == "alloc":
            live[event["addr"]] = number
        elif event["action"] == "free_requested":
            live.pop(event["addr"], None)
    groups: Counter[tuple[int, str]] = Counter()
    for number in live.values():
        groups[trace[number]["size"], caller(trace[number]["frames"])] += 1
    shown = sorted(groups.items(), key=lambda item: -item[0][0] * item[1])[:70]
    last = caller(trace[best_at]["frames"]) if trace else ""
    blocks = [[size, count, who] for (size, who), count in shown]
    return {"events": len(trace), "peak_bytes": best, "asked_last": last, "blocks": blocks}


def caller(frames: list[dict[str, Any]]) -> str:
    """The innermost frames outside torch's own files: `modeling_llama.py:forward:66 < attention.py:...`."""
    named = [
        f"{Path(frame['filename']).name}:{frame['name']}:{frame['line']}"
        for frame in frames
        if "/torch/" not in frame["filename"] or "inductor" in frame["filename"]
    ]
    return " < ".join(named[:3]) or "autograd"


def _assembled(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Model, optimiser and batches as `zhibei train` puts them together, on random weights and rows."""
    from zhibei.data.prepared import PreparedSet
    from zhibei.model import attention
    from zhibei.model.device import DTYPES
    from zhibei.model.language_model import LanguageModel, check_head
    from zhibei.model.load import Need, check_finite, choose_attention
    from zhibei.model.lora import add_adapters
    from zhibei.train.materials import make_batches, make_stepper

    run = run_file(setting, device)
    need = Need(device=device, precision=setting.precision, packing=setting.packing, longest_row=setting.row)
    attention.register()
    name = choose_attention(run.model.attention, need)
    hf = random_model(setting, DTYPES[setting.precision], device)
    hf.set_attn_implementation("sdpa" if name == "auto" else name)
    if name == "auto":
        hf.set_attn_implementation(attention.plain_attention(hf.config))
    if setting.quantize != "none":
        hf = pack(hf, setting.quantize)
        if device.type == "cuda":
            # A folder's weights are packed one by one while they are read; these lay there whole.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    check_finite(hf, "random")
    if setting.method != "full":
        hf = add_adapters(hf, run.lora, seed=run.seed)
    model = LanguageModel(hf, attention_name=name, longest_row=setting.row)
    if name == attention.VARLEN and model.config.to_dict().get("attn_logit_softcapping") is not None:
        model.attention_name = attention.DOCUMENTS
        model.inner.set_attn_implementation(attention.DOCUMENTS)
    check_head(model)
    model.hf.train()
    stepper, task = make_stepper(run, model)
    rows_of_step = setting.tokens * setting.passes // setting.row
    vocabulary = model.config.get_text_config().vocab_size
    rows = PreparedSet(
        train=rows_of(setting.row, rows_of_step * STEPS, vocabulary),
        heldout=rows_of(setting.row, HELD_OUT_ROWS, vocabulary),
        audit={},
        ledger=[],
        key="random",
        template="none",
    )
    batches, heldout = make_batches(run, rows, pad_token=0, device=device)
    return {"batches": batches, "heldout": heldout, "stepper": stepper, "plain": task.plain_loss}


def run_file(setting: Setting, device: torch.device) -> Any:
    """The run file of a setting; its paths name nothing."""
    from zhibei.config.run import RunFile

    content: dict[str, Any] = {
        "name": "memory",
        "device": device.type,
        "model": {
            "path": "random",
            "method": setting.method,
            "precision": setting.precision,
            "activation_checkpointing": setting.checkpointing,
            "compile": setting.compile,
        },
        "data": {"sources": ["random"], "max_tokens": setting.row, "packing": setting.packing},
        "sft": {
            "global_batch": setting.tokens * setting.passes // setting.row,
            "max_steps": STEPS,
            "micro_batch_tokens": setting.tokens,
            "learning_rate": 1e-5,
            "optimizer": setting.optimizer,
        },
    }
    if setting.quantize != "none":
        content["model"]["quantize"] = setting.quantize
    if setting.method != "full":
        targets = setting.targets if setting.targets == "all-linear" else setting.targets.split(",")
        content["lora"] = {"rank": setting.rank, "alpha": 2 * setting.rank, "targets": targets}
    return RunFile.model_validate(content)


def random_model(setting: Setting, dtype: torch.dtype, device: torch.device) -> Any:
    """The shape with random weights, made on the device: normal(0, 0.02), norms at one."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = dict(setting.config())
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.no_grad():
            model: Any = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model


def rows_of(length: int, count: int, vocabulary: int) -> Any:
    """Rows of one length, two thirds of each learned."""
    from zhibei.data.prepared import PreparedRows

    draw = np.random.default_rng(0)
    learned = np.tile(np.arange(length) >= length // 3, count)
    return PreparedRows(
        tokens=draw.integers(3, vocabulary, length * count, dtype=np.int32),
        supervised=learned,
        borders=(np.arange(count + 1) * length).astype(np.int64),
        row_ids=[f"random#{number}" for number in range(count)],
    )


def _evaluate(model: Any, heldout: Any, plain: Callable[..., Any], setting: Setting) -> None:
    """The held-out loss, and four prompts answered."""
    from zhibei.generate.options import SamplingOptions
    from zhibei.generate.sampler import generate
    from zhibei.train.heldout import heldout_loss

    heldout_loss(model, heldout, plain, num_rows=HELD_OUT_ROWS)
    prompts = [list(range(3, 3 + setting.row // 3))] * 4
    options = SamplingOptions(max_new_tokens=16, temperature=0.0, overflow="fewer_tokens")
    generate(model.hf, prompts, options=options, stop_ids=(), pad_id=0)
    gc.collect()


def _save(stepper: Any, micro_batches: list[Any]) -> None:
    """What a checkpoint asks of the GPU; written to disk only where that is quick."""
    from zhibei.train.resume import Progress, save

    stepper.require_finite_weights(micro_batches)
    tensors = [*stepper.model.trainable().values(), *stepper.optimizer.tensors().values()]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < CHECKPOINT_LIMIT_GIB * GIB:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), stepper, Progress(run_id="memory", key="random", step=1))


def _saved(stepper: Any, batch: Any) -> list[list[Any]]:
    """[dtype, shape, how often] of what autograd keeps between forward and backward, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stepper.model.hf.parameters()}
    seen: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        if key[0] not in parameters:
            seen[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = stepper.loss_sum(stepper.model, batch.to(stepper.model.device))
    del loss
    counts = Counter(seen.values())
    sizes = {value: key[1] for key, value in seen.items()}
    return [[dtype, list(shape), count, sizes[dtype, shape]] for (dtype, shape), count in counts.most_common()]
