"""Generation on the CPU: ours beside `model.generate` of transformers, on a real small LLaMA. Knows no GPU.

    python -m benchmarks.generate_cpu --model shared/data/models/stories3M

Both answer the same prompts greedily in fp32 on one thread, in turns, so that other work meets both: once
with answers of a fixed length, once with answers that end at their first line break, each at its own place.
`cpu_seconds` is the processor time of this process, which other work disturbs less than the clock. The answers are
compared token by token before anything is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings

PROMPT_TOKENS = 32
NEW_TOKENS = 128
# (rows, whether all answers have the full length or end at the first line break)
CASES = ((1, "fixed length"), (8, "fixed length"), (8, "own end"))
LINE_BREAK = 13
FILE = RESULTS / "generate_cpu.json"


def prompts_of(model: Any, batch: int) -> list[list[int]]:
    """Prompts of equal length, which both sides can take: the model goes on from one random token."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(300, model.config.vocab_size, (batch, 1), generator=generator)
    begun = torch.cat([torch.full((batch, 1), model.config.bos_token_id), first], dim=1)
    settings = {"max_new_tokens": PROMPT_TOKENS - 2, "min_new_tokens": PROMPT_TOKENS - 2, "do_sample": False}
    return model.generate(begun, attention_mask=torch.ones_like(begun), pad_token_id=0, **settings).tolist()


def ours(model: Any, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    from zhibei.generate.options import SamplingOptions
    from zhibei.generate.sampler import generate

    options = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0)
    return [answer.tokens for answer in generate(model, prompts, options=options, stop_ids=stops)]


def theirs(model: Any, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    ids_BT = torch.tensor(prompts)
    out_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=0,
    )
    answers = out_BT[:, ids_BT.shape[1] :].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in stops), len(row)) for row in answers]
    return [row[:end] for row, end in zip(answers, ends, strict=True)]


RIVALS: dict[str, tuple[str, Callable[[Any, list[list[int]], list[int]], list[list[int]]]]] = {
    "zhibei": ("zhibei", ours),
    "transformers": ("transformers", theirs),
}


def measure(model: Any, *, batch: int, ends: str, repeats: int) -> list[Record]:
    """One record for each side. Raises AssertionError when the answers differ."""
    prompts = prompts_of(model, batch)
    stops = [LINE_BREAK] if ends == "own end" else []
    answers = ours(model, prompts, stops)
    assert answers == theirs(model, prompts, stops), "the two sides do not give the same answers"
    lengths = [len(answer) for answer in answers]
    seconds: dict[str, list[float]] = {who: [] for who in RIVALS}
    cpu_seconds: dict[str, list[float]] = {who: [] for who in RIVALS}
    for _ in range(repeats):
        for who, (_, run) in RIVALS.items():
            begun, cpu_begun = time.perf_counter(), time.process_time()
            run(model, prompts, stops)
            seconds[who].append(time.perf_counter() - begun)
            cpu_seconds[who].append(time.process_time() - cpu_begun)
    settings = {
        "model": "stories3M",
        "batch": batch,
        "prompt_tokens": PROMPT_TOKENS,
        "most_new_tokens": NEW_TOKENS,
        "ends": ends,
        "answer_tokens": lengths,
    }
    return [_record(who, settings, seconds=seconds[who], cpu_seconds=cpu_seconds[who]) for who in RIVALS]


def _record(who: str, settings: Record, *, seconds: list[float], cpu_seconds: list[float]) -> Record:
    num_tokens = sum(settings["answer_tokens"])
    median, spread = median_and_spread(seconds)
    cpu_median, cpu_spread = median_and_spread(cpu_seconds)
    return {
        "benchmark": "generate_cpu",
        "who": who,
        "version": version_of(RIVALS[who][0]),
        "method": "greedy, fp32, 1 thread",
        "settings": settings,
        "useful_tokens_per_s": round(num_tokens / median, 1),
        "tokens_per_cpu_s": round(num_tokens / cpu_median, 1),
        "seconds": round(median, 4),
        "cpu_seconds": round(cpu_median, 4),
        "peak_gib": None,
        "model_tflops": None,
        "spread": {
            "useful_tokens_per_s": [round(num_tokens / value, 1) for value in spread[::-1]],
            "tokens_per_cpu_s": [round(num_tokens / value, 1) for value in cpu_spread[::-1]],
            "seconds": [round(value, 4) for value in spread],
            "cpu_seconds": [round(value, 4) for value in cpu_spread],
        },
        "repeats": len(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of stories3M")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    records = [
        record for batch, ends in CASES for record in measure(model, batch=batch, ends=ends, repeats=chosen.repeats)
    ]
    command = f"python -m benchmarks.generate_cpu --model {chosen.model.name} --repeats {chosen.repeats}"
    merge(FILE, [with_surroundings(record, command) for record in records])
    for record in records:
        settings = record["settings"]
        print(record["who"], settings["batch"], settings["ends"], settings["answer_tokens"])
        print("  ", record["useful_tokens_per_s"], "tokens/s;", record["tokens_per_cpu_s"], "per processor second")


if __name__ == "__main__":
    main()
