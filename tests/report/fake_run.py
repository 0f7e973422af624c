"""A run directory as training leaves it, made up: hundreds of steps, a resume, samples, dropped rows, hostile text."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from zhibei.store.run_dir import RunDir

EVIL = "<script>alert('pwned')</script><img src=http://evil.example/x.png onerror=alert(1)>"


def fake_run(folder: Path, *, num_steps: int = 400, seed: int = 0, end: str = "finished") -> RunDir:
    """Write every file that a report reads. Figures are invented, but shaped like those of a real run."""
    run_dir = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in records(num_steps, seed, end)))
    run_dir.audit.write_text(json.dumps(AUDIT))
    run_dir.ledger.write_text("".join(json.dumps(entry) + "\n" for entry in LEDGER))
    run_dir.manifest.write_text(json.dumps(MANIFEST))
    run_dir.proofs.write_text(json.dumps(PROOFS))
    run_dir.check.write_text(json.dumps(CHECK))
    run_dir.rehearsal.write_text(json.dumps(REHEARSAL))
    run_dir.plan.write_text(json.dumps(PLAN))
    run_dir.resolved.write_text(RESOLVED)
    run_dir.run_file.write_text("name: fake\n")
    run_dir.samples.mkdir(exist_ok=True)
    for step in range(100, num_steps + 1, 100):
        (run_dir.samples / f"step-{step:06d}.json").write_text(json.dumps(samples(step)))
    (run_dir.checkpoint(num_steps)).mkdir(parents=True, exist_ok=True)
    (run_dir.checkpoint(num_steps) / "model-00001.safetensors").write_bytes(bytes(300_000))
    run_dir.model.mkdir(exist_ok=True)
    (run_dir.model / "model.safetensors").write_bytes(bytes(150_000))
    (run_dir.model / "config.json").write_text("{}")
    return run_dir


def records(num_steps: int, seed: int, end: str) -> list[dict[str, Any]]:
    """Loss falls like a power law with noise; held-out loss has its minimum at three quarters."""
    noise = random.Random(seed)
    now = 1_790_000_000.0
    made: list[dict[str, Any]] = [
        {"kind": "event", "step": 0, "time": now, "event": "started", "text": "", "total_steps": num_steps},
        heldout(0, 3.1, now + 2, is_best=True),
    ]
    now += 30
    for step in range(1, num_steps + 1):
        now += 1.6
        if step == num_steps // 2 + 1:
            now += 7200
            made.append({"kind": "event", "step": step - 1, "time": now, "event": "resumed",
                         "text": f"from checkpoints/step-{step - 1:06d}"})  # fmt: skip
        made.append(train(step, num_steps, noise, now))
        if step % (num_steps // 8 or 1) == 0:
            loss = 1.25 + 1.6 * math.exp(-step / num_steps * 5) + 0.15 * max(0, step / num_steps - 0.75)
            made.append(heldout(step, loss, now + 3, is_best=step <= num_steps * 3 // 4))
            made.append({"kind": "event", "step": step, "time": now + 5, "event": "saved",
                         "text": f"checkpoints/step-{step:06d}"})  # fmt: skip
    if end:
        made.append({"kind": "event", "step": num_steps, "time": now + 9, "event": end, "text": f"{end} {EVIL}"})
    return made


def train(step: int, num_steps: int, noise: random.Random, now: float) -> dict[str, Any]:
    progress = step / num_steps
    return {
        "kind": "train", "step": step, "time": now, "epoch": 3 * progress,
        "loss": 1.2 + 1.9 * math.exp(-progress * 6) + noise.gauss(0, 0.07),
        "grad_norm": 0.8 + 2.5 * math.exp(-progress * 9) + abs(noise.gauss(0, 0.2)),
        "learning_rate": 2e-5 * min(1, step / 12) * 0.5 * (1 + math.cos(math.pi * progress)),
        "tokens": 40_000 + noise.randrange(4000), "supervised_tokens": 11_000 + noise.randrange(900),
        "tokens_per_s": 26_000 + noise.gauss(0, 500) - (20_000 if step == 1 else 0), "seconds": 1.6,
        "peak_gib": 61.2, "gpu_held_gib": 42.7, "host_gib": 9.4, "micro_batches": 10,
    }  # fmt: skip


def heldout(step: int, loss: float, now: float, *, is_best: bool) -> dict[str, Any]:
    return {"kind": "heldout", "step": step, "time": now, "loss": loss, "perplexity": math.exp(loss),
            "tokens": 51234, "seconds": 2.5, "is_best": is_best}  # fmt: skip


def samples(step: int) -> list[dict[str, str]]:
    base = "Give three tips for staying healthy.\nGive three tips for staying healthy.\nGive three tips"
    return [
        {"prompt": "Give three tips for staying healthy.", "base": base,
         "tuned": f"1. Eat a balanced diet.\n2. Sleep well.\n3. Move every day. (step {step})"},
        {"prompt": "用一句话解释什么是光合作用。", "base": "光合作用光合作用光合作用",
         "tuned": "光合作用是植物利用光能，把二氧化碳和水转化为有机物并释放氧气的过程。"},
        {"prompt": EVIL, "base": "", "tuned": "</div></section>" + EVIL},
    ]  # fmt: skip


BIN_BORDERS = (0, 16, 32, 64, 128, 256, 512, 1024)
AUDIT: dict[str, Any] = {
    "template": "alpaca", "terminator": "</s>", "rows_read": 18857, "rows_kept": 18815, "rows_train": 18439,
    "rows_heldout": 376, "dropped": {"too_long": 41, "nothing_learned": 1}, "changed": {}, "rows_cut": 0,
    "rows_without_supervision": 1, "tokens": 2_431_902, "tokens_supervised": 913_337, "supervised_share": 0.37556,
    "answers": 18815, "terminators": 18815, "terminators_supervised": 18815, "terminators_supervised_share": 1.0,
    "bos_per_row": {"min": 1, "max": 1}, "unknown_tokens": 0, "rows_with_border_merges": 0, "border_merges": 0,
    "prompts_compared": {"equal": 64, "merged": 0, "different": 0}, "rows_with_special_tokens_in_text": 0,
    "lengths": {
        "mean": 129.25,
        "percentiles": {"0": 48, "5": 61, "25": 77, "50": 103, "75": 152, "95": 311, "99": 566, "100": 1019},
        "histogram": [{"from": low, "below": below, "rows": rows} for low, below, rows in
                      zip(BIN_BORDERS[:-1], BIN_BORDERS[1:], (0, 0, 1410, 10822, 5377, 1034, 172), strict=True)],
    },
    "longest_rows": [{"row": f"data/alpaca.json#{n}", "tokens": 1019 - n} for n in range(3)],
    "sources": [{"source": "data/alpaca.json", "rows": 18815, "rows_heldout": 376, "tokens": 2_431_902,
                 "tokens_supervised": 913_337}],
    "duplicates": {"rows_said_before": 12, "across_train_and_heldout": 0},
    "tokenizer": {"source": "llama-2-7b", "ids": 32000, "bos": "<s>", "eos": "</s>", "pad": "<unk>", "unk": "<unk>"},
    "notices": [f"a notice about {EVIL}"],
    "previews": [{"row": f"data/alpaca.json#{n}", "tokens": 71, "tokens_supervised": 24, "tokens_not_shown": n,
                  "pieces": [["<s>Below is an instruction.\n\n### Instruction:\nName three colours.\n\n### Response:\n",
                              False], [f"Red, green and blue. {EVIL}</s>", True]]} for n in range(2)],
    "future_figure": {"nested": 17, "text": EVIL},
}  # fmt: skip
LEDGER: list[dict[str, Any]] = [
    *[{"row": f"data/alpaca.json#{n}", "where": f"data/alpaca.json, record {n}", "action": "dropped",
       "reason": "too_long", "detail": f"1,{n + 100} tokens"} for n in range(41)],
    {"row": "data/alpaca.json#7", "where": "data/alpaca.json, record 7 (line 43)", "action": "dropped",
     "reason": "nothing_learned", "detail": EVIL},
    {"source": "data/alpaca.json", "record": 9, "line": 50, "field": "output", "reason": "of another kind",
     "excerpt": "an entry as the store writes it"},
]  # fmt: skip
MANIFEST: dict[str, Any] = {
    "zhibei": "0.1.0", "template": {"name": "alpaca", "sha256": "3f1c" * 16}, "base": {"path": "llama-2-7b"},
    "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"}, "global_batch": 128,
    "machine": {"gpu": ["NVIDIA H100 80GB HBM3"], "host_gib": 128.0}, "evil": EVIL,
}  # fmt: skip
PROOFS: list[dict[str, Any]] = [
    {"name": "reloaded tensors are equal", "passed": True, "detail": "291 tensors, bit for bit", "value": 0.0},
    {"name": "same logits after reload", "passed": True, "detail": "largest difference", "value": 3.1e-06},
    {"name": "every weight is finite", "passed": False, "detail": EVIL, "value": None},
]
RESOLVED = f"""# The effective run file. The comment behind a value is its origin.
name: fake  # fake.yaml:1
seed: 0  # default

model:
  path: "{EVIL}"  # command line
  method: full  # default

sft:
  learning_rate: 2e-05  # planned
  # warmup_steps: no effect; nothing follows from it
"""
FINDING = {
    "id": "wrong-family-template", "area": "template", "cost": "run", "level": "warning",
    "what": f"template chatml uses control tokens that this tokenizer does not have {EVIL}", "where": "run.yaml:7",
    "why": "", "to_do": "take the template of the model's family", "changes": {}, "is_safe": False, "evidence": [],
}  # fmt: skip
CHECK: dict[str, Any] = {
    "blocks": False, "counts": {"stop": 0, "warning": 1, "note": 0}, "findings": [FINDING],
    "accepted": [{**FINDING, "id": "learning-rate-too-high", "what": "sft.learning_rate: 0.01", "to_do": "2e-5"}],
    "defects": [], "checks": 127,
}  # fmt: skip
REHEARSAL: dict[str, Any] = {
    "passed": True, "seconds": 18.2, "findings": [],
    "steps": [
        {"name": "load", "passed": True, "seconds": 6.1, "detail": "6.7 billion parameters learn, bf16 on cuda:0"},
        {"name": "worst batch", "passed": True, "seconds": 2.4, "detail": f"rows of 1,019 tokens {EVIL}"},
        {"name": "memory", "passed": False, "seconds": 0.0, "detail": "61.20 of 79.11 GiB, planned 60.80"},
    ],
}  # fmt: skip
PLAN: dict[str, Any] = {
    "machine": "this machine", "fits": True, "micro_batch_tokens": 16384, "activation_checkpointing": "none",
    "peak_gib": 60.8, "peak_phase": "steady", "host_gib": 10.1, "steps": 400, "hours": 0.19,
    "phases": [
        {"name": "steady", "gib": 60.8, "causes_gib": {"weights": 12.55, "optimiser states": 30.1, "loss": 18.15}},
        {"name": "save", "gib": 44.0, "causes_gib": {"weights": 12.55, "optimiser states": 30.1, "checks": 1.35}},
    ],
}  # fmt: skip
