"""Predicted and measured GPU memory of reward models, DPO, PPO, GRPO and RAFT, each run in a process of its own.

    python -m benchmarks.memory_stages                       # on a GPU, about four minutes; results are merged
    python -m benchmarks.memory_stages --out FILE            # into another file, after each configuration
    python -m benchmarks.memory_stages --only ppo --folder /dev/shm/stages
    python -m benchmarks.memory_stages --tiny --folder /tmp/s --out /tmp/s.json   # a smoke test, also on a CPU
    python -m benchmarks.memory_stages --tracked             # without a GPU: an eighth of the widths, tensors counted
    python -m benchmarks.memory_stages --merge FILE          # take in the result file of another machine
    python -m benchmarks.memory_stages --show

The product's own loops run on random weights at the width of real models with few layers, from the run file to the
last step; `predicted` is what the run's own plan.json says. Weights are random, so answers never end by themselves.
Measured is the most that torch's tensors held, by phase: while loading, evaluating, and in a step or an iteration.
`--tracked` has no allocator to ask and counts the tensors themselves (benchmarks/tensors_held.py): it sees what loops
and models hold, not what graphs and libraries of a GPU keep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.memory_grid import SHAPES
from benchmarks.ppo import TEMPLATE, numbers_tokenizer, template_tokens
from benchmarks.records import RESULTS, Record, merge, read, version_of, with_surroundings

RESULT_FILE = RESULTS / "memory_stages.json"
TRACKED_FILE = RESULTS / "memory_stages_tracked.json"
NARROWER = 8
"""How much narrower models are that run on a CPU: width, heads, and the vocabulary."""
GIB = 2**30
ANSWERS = 16
NUM_RECORDS, HELD_OUT = 48, 8
JUDGE = "judge"
COMMAND = "python -m benchmarks.memory_stages"
MEASURED_PHASES = {"started": "load", "heldout": "evaluation", "evaluation": "evaluation"}
"""Which phase ended, by the record that a loop writes; all other figures are those of steps."""
PREDICTED_PHASES = {
    "load": ("load", "evaluation"),  # log-probabilities of a reference are computed before the loop begins
    "evaluation": ("evaluation", "answers"),
    "steps": ("first step", "steady", "answers"),
}


REWARD = """def length(prompts, answers, references):
    return [len(answer) % 7 for answer in answers]
"""


class Done(Exception):
    """Enough was measured."""


@dataclass(frozen=True)
class Setting:
    """One configuration: a stage with some of its settings on a shape with few layers."""

    name: str
    stage: str
    method: str = "lora"
    shape: str = "llama-7b"
    layers: int = 2
    judged_by: str = "length"
    """length: a function. adapter: a reward model on the policy's base. model: one of its own."""
    section: dict[str, Any] = field(default_factory=dict)
    checkpointing: str = "none"
    tokens: int = 256
    """Of a prompt, and of an answer."""


SETTINGS = [
    Setting("reward lora", "reward"),
    Setting("reward full", "reward", "full"),
    Setting("reward full, full checkpointing", "reward", "full", layers=4, checkpointing="full"),
    Setting("dpo adapters off", "dpo", section={"reference": "adapters_off"}),
    Setting("dpo precomputed", "dpo", section={"reference": "precomputed"}),
    Setting("dpo full", "dpo", "full"),
    Setting("dpo tied head", "dpo", "full", shape="llama-0.5b-tied", layers=4),
    Setting("ppo shared", "ppo"),
    Setting("ppo shared, judge on the base", "ppo", judged_by="adapter"),
    Setting("ppo separate, judge beside", "ppo", judged_by="model", section={"models": "separate"}),
    Setting("ppo full", "ppo", "full"),
    Setting("ppo shared, full checkpointing", "ppo", layers=4, checkpointing="full"),
    Setting("grpo", "grpo"),
    Setting("grpo, judge on the base", "grpo", judged_by="adapter"),
    Setting("grpo full", "grpo", "full"),
    Setting("grpo tied head", "grpo", shape="llama-0.5b-tied", layers=4),
    Setting("raft", "raft"),
    Setting("raft full", "raft", "full"),
]


def folder_of(setting: Setting, folder: Path) -> Path:
    return folder / f"{setting.shape.replace(' ', '-')}-{setting.layers}"


def sizes_of(shape: str) -> dict[str, Any]:
    """The sizes of a shape of the grid, or of one with "narrow " before its name."""
    sizes = dict(SHAPES[shape.removeprefix("narrow ")])
    if shape.startswith("narrow "):
        for name in ("hidden_size", "intermediate_size", "vocab_size"):
            sizes[name] //= NARROWER
        for name in ("num_attention_heads", "num_key_value_heads"):
            sizes[name] = max(1, sizes[name] // NARROWER)
    return sizes


def make(folder: Path, setting: Setting) -> None:
    """Model folder, prompts and pairs, unless they are there."""
    place = folder_of(setting, folder)
    if (place / "model").is_dir():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**sizes_of(setting.shape), "num_hidden_layers": setting.layers, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    is_tiny = setting.shape == "tiny"
    torch.set_default_dtype(torch.float32 if is_tiny and not torch.cuda.is_available() else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    unfinished = place / "unfinished"
    model.save_pretrained(unfinished)
    numbers_tokenizer(config.vocab_size).save_pretrained(unfinished)
    words = random.Random(0)
    length = setting.tokens - template_tokens(unfinished)

    def text(count: int) -> str:
        return " ".join(f"t{words.randrange(3, config.vocab_size)}" for _ in range(count))

    prompts = [{"instruction": text(length), "input": "", "output": "t5"} for _ in range(NUM_RECORDS)]
    answers = setting.tokens - 1
    pairs = [{"prompt": text(length), "chosen": text(answers), "rejected": text(answers)} for _ in range(NUM_RECORDS)]
    (place / "prompts.json").write_text(json.dumps(prompts))
    (place / "pairs.json").write_text(json.dumps(pairs))
    (place / "rewards.py").write_text(
        "def length(prompts, answers, references):\n    return [len(a) % 7 for a in answers]\n"
    )
    unfinished.rename(place / "model")


def run_file(setting: Setting, folder: Path, *, name: str, tracked: bool = False) -> Path:
    """The run file of a setting; a tracked one computes on the CPU in the 16 bits of a GPU."""
    place = folder_of(setting, folder).resolve()
    writes = setting.stage in ("ppo", "grpo", "raft")
    section: dict[str, Any] = {
        "global_batch": ANSWERS if writes else ANSWERS // 2,
        "micro_batch_tokens": 4096,
        "max_steps": 2,
        "learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "evaluate_rows": HELD_OUT,
        "evaluate_every": 1,
        "save_every": 0,
        **setting.section,
    }
    if writes:
        section |= {"minibatches": 1, "max_new_tokens": setting.tokens, "rollout_batch": ANSWERS, "sample_tokens": 16}
        judge = {
            "length": {"reward": f"python:{place / 'rewards.py'}:length"},
            "adapter": {"reward_model": str(place / "runs" / JUDGE), "min_reward_accuracy": 0},
            "model": {"reward_model": str(place / "runs" / JUDGE), "min_reward_accuracy": 0},
        }
        section |= judge[setting.judged_by]
    if setting.stage == "raft":
        section |= {"answers_per_prompt": 2, "keep_share": 0.5, "global_batch": ANSWERS // 2}
    if tracked:
        section["save_in_background"] = False  # the copy of the weights would lie on the host, which is looked at here
    content = {
        "name": name,
        "runs": str(place / "runs"),
        "stage": setting.stage,
        "rehearse": "never",
        "model": {
            "path": str(place / "model"),
            "method": setting.method,
            "activation_checkpointing": setting.checkpointing,
            "compile": False,
            **({"precision": "bf16"} if tracked else {}),
        },
        **({"device": "cpu"} if tracked else {}),
        "data": {
            "sources": [str(place / ("prompts.json" if writes else "pairs.json"))],
            "template": TEMPLATE,
            "max_tokens": 1024,
            "validation": HELD_OUT,
            "workers": 0,
            "cache": str(place / "cache"),
        },
        setting.stage: section,
        "log": {"tensorboard": False},
    }
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(content, indent=1))  # JSON is YAML
    return path


class Allocator:
    """The count that torch keeps on a GPU; nothing elsewhere."""

    @property
    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    def reset_peak(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def measured(path: Path, *, to_the_end: bool, tracked: bool) -> dict[str, float]:
    """The peaks of a run in GiB, by phase. The run ends after its last step unless its model is wanted."""
    from benchmarks.tensors_held import TensorsHeld
    from zhibei.config.read import read_run
    from zhibei.train.loops import train

    counter = TensorsHeld() if tracked else Allocator()
    peaks: dict[str, float] = {}
    resolved = read_run(path)
    last = resolved.run.training.max_steps

    def watch(record: dict[str, Any]) -> None:
        name = str(record.get("event") or record["kind"])
        phase = MEASURED_PHASES.get(name, "steps")
        if name != "note":
            peaks[phase] = max(peaks.get(phase, 0.0), round(counter.peak / GIB, 4))
            counter.reset_peak()
        if not to_the_end and name in ("heldout", "evaluation") and record["step"] == last:
            raise Done

    with contextlib.suppress(Done), counter if isinstance(counter, TensorsHeld) else contextlib.nullcontext():
        train(resolved, watch=watch)
    return peaks


def one(folder: Path, setting: Setting, *, name: str, to_the_end: bool = False, tracked: bool = False) -> Record:
    """Measure one configuration in this process."""
    path = run_file(setting, folder, name=name, tracked=tracked)
    peaks = measured(path, to_the_end=to_the_end, tracked=tracked)
    plan = json.loads((folder_of(setting, folder) / "runs" / name / "plan.json").read_text())
    promised = {phase["name"]: phase["gib"] for phase in plan["phases"]}
    predicted = {phase: max(promised[part] for part in PREDICTED_PHASES[phase] if part in promised) for phase in peaks}
    most, planned = max(peaks.values()), max(predicted.values())
    causes = max((p for p in plan["phases"] if p["name"] not in ("proof", "merge")), key=lambda p: p["gib"])
    return with_surroundings(
        {
            "benchmark": "memory_stages",
            "who": "zhibei",
            "version": version_of("zhibei"),
            "method": setting.method,
            "settings": vars(setting),
            "measured": peaks,
            "predicted": predicted,
            "measured_gib": most,
            "predicted_gib": planned,
            "error_percent": round(100 * (planned / most - 1), 2) if most else None,
            "peak_at": f"{causes['name']}: {causes['moment']}",
            "causes_gib": causes["causes_gib"],
        },
        f"{COMMAND} --tracked" if tracked else COMMAND,
    )


def in_process(folder: Path, setting: Setting, *, name: str, flags: Sequence[str], limit: float) -> Record:
    """The record of a process of its own, or what went wrong in it."""
    words = [sys.executable, "-m", "benchmarks.memory_stages", "--folder", str(folder), "--one"]
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*words, json.dumps(vars(setting)), "--name", name, *flags], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        error = f"no result within {limit:.0f} s"
    else:
        if done.returncode == 0:
            return {**json.loads(done.stdout.strip().splitlines()[-1]), "seconds": round(time.monotonic() - began, 1)}
        error = " | ".join(done.stderr.strip().splitlines()[-5:])[-1500:]
    lost: Record = {"benchmark": "memory_stages", "who": "zhibei", "version": "", "method": setting.method}
    return {
        **lost,
        "settings": vars(setting),
        "device": "",
        "versions": {},
        "command": COMMAND,
        "date": "",
        "error": error,
    }


def summary(record: Record) -> str:
    name = record["settings"]["name"]
    if "error" in record:
        return f"FAILED {name}: {record['error']}"
    phases = " ".join(
        f"{phase} {value:.2f}/{record['predicted'][phase]:.2f}" for phase, value in record["measured"].items()
    )
    error = record["error_percent"]
    shown = f"{error:+6.2f} %" if error is not None else "no GPU"
    return f"{record.get('seconds', 0):4.0f}s {shown}  {name} | measured/predicted GiB: {phases} | {record['peak_at']}"


def settings_of(options: argparse.Namespace) -> Iterator[Setting]:
    for setting in SETTINGS:
        if options.only in setting.name:
            changes: dict[str, Any] = {"shape": "tiny", "tokens": 64} if options.tiny else {}
            if options.tracked:
                changes["shape"] = f"narrow {setting.shape}"
            yield replace(setting, **changes)


def run(options: argparse.Namespace) -> int:
    """Make models and the judge, then measure as many configurations side by side as the time allows."""
    folder = Path(options.folder or tempfile.mkdtemp(prefix="memory-stages-"))
    began = time.monotonic()
    wanted = list(settings_of(options))
    shapes = {(s.shape, s.layers): s for s in wanted}
    with ThreadPoolExecutor(max_workers=len(shapes)) as pool:
        list(pool.map(lambda setting: make_in_process(folder, setting), shapes.values()))
    judges = {(s.shape, s.layers): threading.Event() for s in wanted if s.judged_by != "length"}

    def train_judge(shape: tuple[str, int]) -> None:
        setting = shapes[shape]
        if not (folder_of(setting, folder) / "runs" / JUDGE / "model").is_dir():
            judge = Setting(JUDGE, "reward", shape=setting.shape, layers=setting.layers, tokens=setting.tokens)
            record = in_process(folder, judge, name=JUDGE, flags=["--to-the-end"], limit=options.seconds)
            print("judge:", summary(record), flush=True)
        judges[shape].set()

    for shape in judges:
        threading.Thread(target=train_judge, args=[shape]).start()
    lock, gate = threading.Lock(), threading.Semaphore(options.parallel)

    def work(number: int, setting: Setting) -> None:
        if setting.judged_by != "length":
            judges[(setting.shape, setting.layers)].wait()
        with gate:
            left = options.seconds - (time.monotonic() - began)
            if left < 5:
                print(f"# not started, the time is over: {setting.name}", flush=True)
                return
            name = f"{setting.stage}-{number}-{int(began)}"
            flags = ["--tracked"] if options.tracked else []
            record = in_process(folder, setting, name=name, flags=flags, limit=left)
        with lock:
            print(summary(record), flush=True)
            merge(options.out, [record])

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return show(options)


def make_in_process(folder: Path, setting: Setting) -> None:
    """Weights are made in another process: this one must hold nothing of the card."""
    words = [sys.executable, "-m", "benchmarks.memory_stages", "--folder", str(folder), "--make"]
    subprocess.run([*words, json.dumps(vars(setting))], check=True)


def show(options: argparse.Namespace) -> int:
    records = read(options.out)
    for record in records:
        print(summary(record))
    errors = [abs(r["error_percent"]) for r in records if r.get("error_percent") is not None]
    if errors:
        print(f"{len(errors)} configurations: worst {max(errors):.2f} %, median {statistics.median(errors):.2f} %")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--folder", default="", help="where models and runs are put; by default a fresh one")
    top.add_argument("--out", type=Path, help="result file, written after each configuration")
    top.add_argument("--only", default="", help="only settings whose names contain this")
    top.add_argument("--seconds", type=float, default=240, help="start nothing after that")
    top.add_argument("--parallel", type=int, default=8, help="most configurations measured at the same time")
    top.add_argument("--tracked", action="store_true", help="narrow models on the CPU, tensors counted one by one")
    top.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    top.add_argument("--merge", type=Path, help="take in a result file")
    top.add_argument("--show", action="store_true", help="print what the result file holds")
    for name in ("--make", "--one", "--name"):
        top.add_argument(name, help=argparse.SUPPRESS)
    top.add_argument("--to-the-end", action="store_true", help=argparse.SUPPRESS)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.out = options.out or (TRACKED_FILE if options.tracked else RESULT_FILE)
    if options.make:
        make(Path(options.folder), Setting(**json.loads(options.make)))
        return 0
    if options.one:
        setting = Setting(**json.loads(options.one))
        record = one(
            Path(options.folder), setting, name=options.name, to_the_end=options.to_the_end, tracked=options.tracked
        )
        print(json.dumps(record))
        return 0
    if options.merge:
        merge(RESULT_FILE, read(options.merge))
        return show(options)
    return show(options) if options.show else run(options)


if __name__ == "__main__":
    raise SystemExit(main())
