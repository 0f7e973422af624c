"""GGUF on the CPU: our chat beside llama.cpp's own server on the same file, and what each type costs. Knows no GPU.

    python -m benchmarks.gguf --model shared/data/models/stories3M

The model is exported in every type asked for. Speed: greedy answers of a fixed length to the same prompt tokens, in
turns so that other work meets both, with as many threads each; the other side is llama.cpp's server engine, called
in this process through xllamacpp. Loss: KL and perplexity against transformers in fp32 on rows the model wrote itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, Record, median_and_spread, merge, version_of, with_surroundings

NEW_TOKENS = 200
PROMPT_TOKENS = 8
SPEED_KINDS = ("F16", "Q8_0", "Q4_K_M")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
FILE = RESULTS / "gguf.json"


Answering = Callable[[list[int]], tuple[int, str]]
"""Prompt tokens to the number of tokens answered and their text."""


def ours(path: Path, num_threads: int) -> tuple[Answering, Callable[[], None]]:
    from zhibei.generate.options import SamplingOptions
    from zhibei.serve.chat import Prompt
    from zhibei.serve.gguf_speaker import open_gguf

    speaker = open_gguf(str(path), template="alpaca")
    # The same threads for both, and no end but the length.
    speaker._context = speaker.model.open(context_tokens=512, num_threads=num_threads)
    speaker.__dict__["stop_ids"] = ()
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=0)

    def answer(tokens: list[int]) -> tuple[int, str]:
        assert speaker._context is not None, "opened above"
        speaker._context.keep(0)
        (found,) = speaker.answer([Prompt(tokens)], options)
        return len(found.tokens), found.text or ""

    return answer, speaker.close


def theirs(path: Path, num_threads: int) -> tuple[Answering, Callable[[], None]]:
    from importlib import import_module

    xllamacpp: Any = import_module("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, True
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(parameters)

    def answer(tokens: list[int]) -> tuple[int, str]:
        asked = {
            "prompt": tokens, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        found = server.handle_completions(asked)
        return found["usage"]["completion_tokens"], found["choices"][0]["text"]

    return answer, lambda: None


def speed(path: Path, kind: str, num_threads: int, repeats: int) -> list[Record]:
    """Tokens per second of both, prompt included."""
    prompt = [1, *range(300, 300 + PROMPT_TOKENS - 1)]
    sides = {"zhibei": ours(path, num_threads), "llama.cpp (xllamacpp)": theirs(path, num_threads)}
    answers = {who: answer(prompt) for who, (answer, _) in sides.items()}
    same = len({text.strip() for _, text in answers.values()}) == 1
    rates: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(repeats):
        for who, (answer, _) in sides.items():
            start = time.perf_counter()
            num_tokens, _ = answer(prompt)
            rates[who].append(num_tokens / (time.perf_counter() - start))
    for _, close in sides.values():
        close()
    records = []
    for who, values in rates.items():
        median, spread = median_and_spread(values)
        records.append({
            "benchmark": "gguf_speed", "who": who, "version": version_of("xllamacpp"), "method": kind,
            "settings": {"threads": num_threads, "new_tokens": NEW_TOKENS, "prompt_tokens": PROMPT_TOKENS},
            "tokens_per_s": median, "spread": {"tokens_per_s": spread}, "same_text": same,
        })  # fmt: skip
    return records


def loss(path: Path, kind: str, reference: Any) -> Record:
    """How far a type is from transformers in fp32."""
    from zhibei.export.gguf_side import GgufSide
    from zhibei.export.probes import Probes
    from zhibei.export.proof import measure

    report = measure(reference, GgufSide(path, template="alpaca"), kind=kind.lower(), probes=Probes((), ()))
    return {
        "benchmark": "gguf_loss", "who": "zhibei", "version": version_of("xllamacpp"), "method": kind,
        "settings": {"rows": report.rows_from, "tokens": report.num_tokens},
        "mib": path.stat().st_size / 2**20, "kl_mean": report.kl_mean, "kl_max": report.kl_max,
        "top1_agreement": report.top1_agreement, "perplexity": report.other.perplexity,
        "reference_perplexity": report.reference.perplexity,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    from zhibei.export.gguf.export import export_gguf
    from zhibei.export.gguf.source import open_source
    from zhibei.export.sides import FolderSide

    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        made = export_gguf(open_source(options.model), folder, types=KINDS)
        reference = FolderSide(options.model, device="cpu", precision="fp32")
        for one in made:
            record = loss(one.paths[0], one.kind, reference)
            records.append({**record, "types": dict(one.types)})
            print(one.kind, {name: record[name] for name in ("mib", "kl_mean", "top1_agreement", "perplexity")})
        for one in made:
            if one.kind in SPEED_KINDS:
                records += speed(one.paths[0], one.kind, options.threads, options.repeats)
                print(one.kind, [(record["who"], record["tokens_per_s"]) for record in records[-2:]])
    command = f"python -m benchmarks.gguf --model {Path(options.model).name} --threads {options.threads}"
    for record in records:
        record["settings"]["model"] = Path(options.model).name
    merge(FILE, [with_surroundings(record, command) for record in records])


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
