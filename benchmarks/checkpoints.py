"""What saving costs while two ranks train, and what a run that goes on with other ranks computes. CPU ranks over gloo.

Saves: bytes, seconds that training waits, seconds until the checkpoint counts, and the most memory rank 0 holds, with
saves written at once, beside the training, and not at all. Trials: a run that was cut is resumed by other numbers of
ranks and other divisions, and its losses are compared with those of a run that one process made in one go.

    python -m benchmarks.checkpoints
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, merge, version_of, with_surroundings

FILE = RESULTS / "checkpoints.json"
COMMAND = "python -m benchmarks.checkpoints"
MIB = 2**20
STEPS, CUT_AFTER = 16, 6
STEPS_OF_SAVES, SAVE_EVERY = 6, 2
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 16_000}
SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1000}
SAVES = {"no saves": ("false", 0), "at once": ("false", SAVE_EVERY), "beside the training": ("true", SAVE_EVERY)}
TRIALS = (("full_shard", 1, "full_shard"), ("full_shard", 4, "full_shard"), ("full_shard", 2, "no_shard"),
          ("no_shard", 2, "full_shard"), ("full_shard", 2, "shard_grad_op"))  # fmt: skip


def model_folder(folder: Path, shape: dict[str, Any]) -> int:
    """A random Llama in fp32 with a byte tokenizer; returns the number of its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = {word: number for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 3
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_file(folder: Path, model: Path, *, rate: float) -> Path:
    """Sixty sums to learn."""
    rows = [
        {"instruction": f"Add {i} and {i * 7 % 13}.", "input": "", "output": str(i + i * 7 % 13)} for i in range(60)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    file = folder / "run.yaml"
    file.write_text(
        f"""name: run
runs: {folder / "runs"}
device: cpu
model: {{path: {model}, precision: fp32}}
data: {{sources: [{folder / "rows.json"}], template: alpaca, max_tokens: 256, validation: 0, workers: 0}}
sft: {{global_batch: 8, micro_batch_tokens: 1024, max_steps: {STEPS}, learning_rate: {rate},
      save_every: 0, sample_tokens: 0, warmup_steps: 1}}
log: {{tensorboard: false, every: 1}}
""",
        encoding="utf-8",
    )
    return file


def as_rank(order: dict[str, Any]) -> None:
    """Train one run as the rank that the environment says."""
    import torch

    from zhibei.config.errors import RunInterrupted
    from zhibei.config.read import read_run
    from zhibei.store.run_dir import RunDir
    from zhibei.train.loops import train

    torch.set_num_threads(1)

    def watch(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == order.get("cut_after"):
            os.kill(os.getpid(), signal.SIGTERM)

    resume = RunDir(Path(order["resume"])) if order.get("resume") else None
    try:
        train(read_run(order["file"], order["overrides"]), watch=watch, resume=resume)
    except RunInterrupted:
        if not order.get("cut_after"):
            raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(order["peaks"]).joinpath(os.environ.get("RANK", "0")).write_text(str(peak))


def run_ranks(world: int, order: dict[str, Any], folder: Path) -> int:
    """Start the ranks and wait; returns the most memory that one of them held, in bytes."""
    peaks = folder / "peaks"
    peaks.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    told = json.dumps({**order, "peaks": str(peaks)})
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.checkpoints", "--as-rank", told],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]
    if any([rank.wait() for rank in ranks]):
        raise RuntimeError(f"a rank failed: {told}")
    return max(int((peaks / str(rank)).read_text()) for rank in range(world))


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records_of(run) if record["kind"] == "train"]


def save_records(folder: Path) -> list[Record]:
    """One record for each way of saving. The last save of a run is not among the figures: nothing goes on beside it."""
    num_parameters = model_folder(folder / "large", LARGE)
    file = run_file(folder, folder / "large", rate=1e-4)
    found = []
    for name, (background, every) in SAVES.items():
        run = name.replace(" ", "-")
        settings = [f"name={run}", f"sft.save_in_background={background}", f"sft.save_every={every}"]
        settings += [f"sft.max_steps={STEPS_OF_SAVES}", "distributed.sharding=full_shard"]
        settings += ["sft.keep_checkpoints=1", "sft.global_batch=2"]
        peak = run_ranks(2, {"file": str(file), "overrides": settings}, folder)
        seen = records_of(folder / "runs" / run)
        saves = [r for r in seen if r.get("event") == "saved" and r["step"] < STEPS_OF_SAVES]
        steps = [r for r in seen if r["kind"] == "train"]
        record: Record = {
            "benchmark": "checkpoint_saves",
            "who": "zhibei",
            "version": version_of("zhibei"),
            "method": name,
            "settings": {"ranks": 2, "parameters": num_parameters, "steps": STEPS_OF_SAVES, "save_every": every},
            "saves": len(saves),
            "checkpoint_bytes": next((r["bytes"] for r in reversed(seen) if r.get("event") == "saved"), None),
            "waited_seconds": _mean([r["waited_seconds"] for r in saves]),
            "seconds": _mean([r["seconds"] for r in saves]),
            "loop_seconds": steps[-1]["time"] - steps[0]["time"],
            "peak_bytes": peak,
        }
        found.append(with_surroundings(record, COMMAND))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 3) if values else None


def export_record(folder: Path) -> Record:
    """The newest checkpoint of the saves as a Hugging Face folder, in a process of its own."""
    run = folder / "runs" / "beside-the-training"
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoints", "--export", str(run)],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return with_surroundings(json.loads(told.stdout.splitlines()[-1]), COMMAND)


def as_export(run: Path) -> Record:
    """Export, and say how far the memory rose above what the programs themselves take."""
    import peft  # noqa: F401  imported so that it does not count
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from zhibei.export.checkpoints import export_checkpoint

    torch.set_num_threads(1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.monotonic()
    made = export_checkpoint(str(run), "newest")
    seconds = time.monotonic() - started
    return {
        "benchmark": "checkpoint_export",
        "who": "zhibei",
        "version": version_of("zhibei"),
        "method": "hf",
        "settings": {"checkpoint": "of two ranks"},
        "model_bytes": sum(file.stat().st_size for file in made.path.glob("*.safetensors")),
        "seconds": round(seconds, 2),
        "rise_bytes": _status("VmHWM") - before,
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def trial_records(folder: Path) -> list[Record]:
    """One record for each way of going on, and one for the run in one go."""
    model_folder(folder / "small", SMALL)
    file = run_file(folder, folder / "small", rate=3e-3)
    run_ranks(1, {"file": str(file), "overrides": ["name=straight"]}, folder)
    straight = losses(folder / "runs" / "straight")
    found = []
    for number, (before, world, after) in enumerate(TRIALS):
        name = f"trial{number}"
        cut = {"file": str(file), "overrides": [f"name={name}", f"distributed.sharding={before}"]}
        run_ranks(2, {**cut, "cut_after": CUT_AFTER}, folder)
        on = {"file": str(file), "overrides": [f"name={name}", f"distributed.sharding={after}"]}
        run_ranks(world, {**on, "resume": str(folder / "runs" / name)}, folder)
        theirs = losses(folder / "runs" / name)
        differences = [abs(a - b) / a for a, b in zip(straight, theirs, strict=True)]
        record: Record = {
            "benchmark": "checkpoint_resume",
            "who": "zhibei",
            "version": version_of("zhibei"),
            "method": f"2 ranks {before} -> {world} {'rank' if world == 1 else 'ranks ' + after}",
            "settings": {"steps": STEPS, "cut_after": CUT_AFTER, "order": number},
            "first_loss": straight[0],
            "last_loss": theirs[-1],
            "largest_relative_difference": max(differences),
            "after_the_cut": max(differences[CUT_AFTER:]),
        }
        found.append(with_surroundings(record, COMMAND))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-rank", help="(started by itself) one run, as JSON")
    parser.add_argument("--export", help="(started by itself) a run to export from")
    parser.add_argument("--only", choices=("saves", "trials"), help="one half of it")
    options = parser.parse_args(arguments)
    if options.as_rank:
        as_rank(json.loads(options.as_rank))
        return 0
    if options.export:
        print(json.dumps(as_export(Path(options.export))))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "saves":
            merge(FILE, trial_records(folder))
        if options.only != "trials":
            merge(FILE, [*save_records(folder), export_record(folder)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
