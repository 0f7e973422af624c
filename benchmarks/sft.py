"""Speed and memory of supervised fine-tuning at the 7B shape: zhibei beside TRL (+ Liger) and Unsloth, on one GPU.

Examples (each measurement runs in a process of its own, so that memory is clean):

    python -m benchmarks.sft zhibei --method full --tokens 8192
    python -m benchmarks.sft peer-trl --method lora --liger --batch 32 --checkpointing none
    python -m benchmarks.sft profile --method lora --tokens 16384
    python -m benchmarks.sft all --plan main --seconds 540 --out results.json
    python -m benchmarks.sft merge results.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Record, merge, read, with_surroundings
from benchmarks.workload import SHAPES, Workload

RESULT_FILE = RESULTS / "sft.json"


def _workload(options: argparse.Namespace) -> Workload:
    return Workload(shape=options.shape, layers=options.layers, global_batch=options.global_batch)


def _ours(options: argparse.Namespace) -> list[Record]:
    from benchmarks.ours import zhibei

    return [zhibei(_our_settings(options), _workload(options), steps_timed=options.steps, warmup=options.warmup)]


def _our_settings(options: argparse.Namespace):
    from benchmarks.ours import OurSettings

    return OurSettings(
        method=options.method,
        micro_batch_tokens=options.tokens,
        checkpointing=options.checkpointing,
        compile=options.compile == "on",
        packing=not options.padded,
        quantize=options.quantize,
    )


def _peer(options: argparse.Namespace) -> list[Record]:
    from benchmarks import peers

    settings = peers.PeerSettings(
        method=options.method,
        weights=options.weights,
        batch=options.batch,
        checkpointing=options.checkpointing,
        liger=options.verb == "peer-trl" and options.liger,
        packing=options.packing,
    )
    run = peers.trl if options.verb == "peer-trl" else peers.unsloth
    return [run(settings, _workload(options), steps=options.steps, warmup=options.warmup)]


def _ceiling(options: argparse.Namespace) -> list[Record]:
    from benchmarks.ceiling import ceilings

    return ceilings()


def _profile(options: argparse.Namespace) -> list[Record]:
    from benchmarks.profile_step import as_table, profile

    record = profile(_our_settings(options), _workload(options), warmup=options.warmup)
    print(as_table(record), flush=True)
    return [record]


def _all(options: argparse.Namespace) -> list[Record]:
    from benchmarks.plans import PLANS, run_plan

    chosen = {"--shape": options.shape, "--layers": options.layers, "--global-batch": options.global_batch}
    defaults = {"--shape": "llama-7b", "--layers": 0, "--global-batch": 128}
    scale = [word for name in chosen if chosen[name] != defaults[name] for word in (name, str(chosen[name]))]
    if options.steps_given:
        scale += ["--steps", str(options.steps)]
    return run_plan(
        PLANS[options.plan],
        extra=scale,
        seconds=options.seconds,
        out=options.out,
        peer_packages=options.peer_packages,
        only=options.only,
        skip=options.skip,
    )


def _merge(options: argparse.Namespace) -> list[Record]:
    merge(RESULT_FILE, read(options.file))
    print(f"{RESULT_FILE}: {len(read(RESULT_FILE))} records")
    return []


VERBS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    "zhibei": _ours,
    "peer-trl": _peer,
    "peer-unsloth": _peer,
    "ceiling": _ceiling,
    "profile": _profile,
    "all": _all,
    "merge": _merge,
}


def parser() -> argparse.ArgumentParser:
    """Every verb's options, with what they mean."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = top.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(verb)
        if verb == "merge":
            sub.add_argument("file", type=Path, help="result file of another machine")
            continue
        sub.add_argument("--shape", choices=tuple(SHAPES), default="llama-7b")
        sub.add_argument("--layers", type=int, default=0, help="cut the model to so many layers (0: all)")
        sub.add_argument("--global-batch", type=int, default=128, help="rows per optimiser step, for everybody")
        sub.add_argument("--steps", type=int, default=None, help="timed optimiser steps (default 6)")
        sub.add_argument("--warmup", type=int, default=2, help="steps before, timed apart")
        sub.add_argument("--out", type=Path, default=None, help="result file to merge into")
        if verb == "all":
            sub.add_argument("--plan", default="main", help="which list of measurements")
            sub.add_argument("--seconds", type=float, default=540, help="start nothing that would end later")
            sub.add_argument("--only", default="", help="run only measurements whose command contains this text")
            sub.add_argument("--skip", type=Path, default=None, help="result file of what need not be measured again")
            sub.add_argument("--peer-packages", default="", help="folder of the rivals' packages, seen only by them")
        elif verb != "ceiling":
            sub.add_argument("--method", choices=("full", "lora", "qlora"), default="lora")
            checkpointing = {"peer-trl": ("none", "full"), "peer-unsloth": ("none", "full", "unsloth")}
            sub.add_argument(
                "--checkpointing", choices=checkpointing.get(verb, ("none", "selective", "full")), default="none"
            )
        if verb in ("zhibei", "profile"):
            sub.add_argument("--tokens", type=int, default=8192, help="tokens of one forward pass")
            sub.add_argument("--compile", choices=("on", "off"), default="on")
            sub.add_argument("--quantize", choices=("nf4", "int8"), default="nf4", help="the base of method qlora")
            sub.add_argument("--padded", action="store_true", help="pad instead of packing")
        if verb.startswith("peer"):
            sub.add_argument("--batch", type=int, default=32, help="rows of one forward pass")
            sub.add_argument("--weights", choices=("fp32", "bf16", "nf4"), default="bf16")
            sub.add_argument("--packing", action="store_true", help="the rival's own packing, rows of 2,048 tokens")
        if verb == "peer-trl":
            sub.add_argument("--liger", action="store_true")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; print each record as one JSON line; a failing measurement becomes a record with `error`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    options.steps_given = getattr(options, "steps", None) is not None
    if hasattr(options, "steps") and options.steps is None:
        options.steps = 6
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = "python -m benchmarks.sft " + " ".join(words)
    records = VERBS[options.verb](options)
    if options.verb in ("all", "merge"):
        return 0
    records = [with_surroundings(record, command) for record in records]
    for record in records:
        print(json.dumps(record), flush=True)
    if options.out:
        merge(options.out, records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
