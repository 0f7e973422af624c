"""Seconds of a PPO iteration at the 7B shape on one frozen base, beside plain transformers and PEFT.

    python -m benchmarks.ppo all --folder /dev/shm/ppo --out ppo.json          # on a GPU, about six minutes
    python -m benchmarks.ppo all --folder /tmp/ppo --shape tiny --answers 8 --new-tokens 8   # a smoke test
    python -m benchmarks.ppo merge ppo.json

zhibei runs as a user runs it: a reward model is trained (two steps; its quality does not matter for time), then
`stage: ppo` with `ppo.models: shared`, and seconds are read from its metrics. Weights are random, so answers never end
by themselves and both sides write the same number of tokens. Each side runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.plain_ppo import PlainPpo, Sizes
from benchmarks.records import RESULTS, Record, median_and_spread, merge, read, version_of, with_surroundings
from benchmarks.workload import Workload, random_model

RESULT_FILE = RESULTS / "ppo.json"
PARTS = ("writing_seconds", "reward_seconds", "scoring_seconds", "learning_seconds", "seconds")
NUM_PROMPTS = 640
TEMPLATE = "alpaca"


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(
        answers=options.answers,
        minibatches=options.minibatches,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
    )


def make(options: argparse.Namespace) -> None:
    """Model folder, prompts and pairs, unless they are there."""
    import torch

    folder = Path(options.folder)
    if (folder / "model").is_dir():
        return
    workload = Workload(shape=options.shape, layers=options.layers)
    on_gpu = torch.cuda.is_available()
    model = random_model(workload, dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu")
    model.save_pretrained(folder / "model")
    numbers_tokenizer(workload.vocabulary).save_pretrained(folder / "model")
    words = random.Random(0)
    length = options.prompt_tokens - template_tokens(folder / "model")

    def text() -> str:
        return " ".join(f"t{words.randrange(3, workload.vocabulary)}" for _ in range(length))

    prompts = [{"instruction": text(), "input": "", "output": "t5"} for _ in range(NUM_PROMPTS)]
    pairs = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(64)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "pairs.json").write_text(json.dumps(pairs))


def numbers_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the words t3, t4, ... between spaces; every other word is unknown, and one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = models.WordLevel({**specials, **{f"t{i}": i for i in range(3, vocabulary)}}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    named = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def template_tokens(folder: Path) -> int:
    """How many tokens of a prompt are the template's."""
    from zhibei.text.families import find_template
    from zhibei.text.messages import Message
    from zhibei.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    rendered = find_template(TEMPLATE, tokenizer).render([Message("user", "t5")], answer_next=True)
    return len(tokenizer.encode(rendered.text)) - 1


def run_file(options: argparse.Namespace, stage: str, section: dict[str, Any], source: str) -> Path:
    folder = Path(options.folder).resolve()
    content = {
        "name": stage,
        "runs": str(folder / "runs"),
        "stage": stage,
        "rehearse": "never",
        "model": {"path": str(folder / "model"), "method": "lora", "compile": False},
        "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": {
            "sources": [str(folder / source)],
            "template": TEMPLATE,
            "max_tokens": 2 * options.prompt_tokens + 64,
            "validation": 8,
            "workers": 0,
        },
        stage: {"schedule": "constant", "warmup_steps": 0, **section},
        "log": {"tensorboard": False},
    }
    path = folder / f"{stage}.json.yaml"  # JSON is YAML
    path.write_text(json.dumps(content, indent=1))
    return path


def zhibei(options: argparse.Namespace) -> Record:
    """Reward model, then PPO through the product's own road; figures of its metrics and its plan."""
    from zhibei.config.read import read_run
    from zhibei.train.loops import train

    common = {"micro_batch_tokens": options.tokens, "learning_rate": 1e-5}
    reward = {**common, "global_batch": 8, "max_steps": 2, "evaluate_every": 0, "save_every": 0}
    reward_run = train(read_run(str(run_file(options, "reward", reward, "pairs.json"))))
    ppo = {
        **common,
        "models": "shared",
        "reward_model": str(reward_run.path),
        "min_reward_accuracy": 0,
        "global_batch": options.answers // options.minibatches,
        "minibatches": options.minibatches,
        "max_steps": options.iterations,
        "max_new_tokens": options.new_tokens,
        "rollout_batch": options.rollout_rows,
        "evaluate_rows": 8,
        "evaluate_every": 0,
        "save_every": 0,
        "sample_tokens": 0,
    }
    run_dir = train(read_run(str(run_file(options, "ppo", ppo, "prompts.json"))))
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    iterations = [record for record in records if record["kind"] == "iteration"]
    plan = json.loads(run_dir.plan.read_text()) if run_dir.plan.is_file() else {}
    return {
        "who": "zhibei",
        "version": version_of("zhibei"),
        **figures(options, iterations),
        "answer_tokens": statistics_of(iterations, "tokens"),
        "peak_gib": max((record.get("peak_gib") or 0) for record in iterations),
        "predicted_gib": plan.get("peak_gib"),
    }


def plain(options: argparse.Namespace) -> Record:
    """The straightforward implementation, with micro-batches and sampling batches of the same size."""
    import torch

    sizes = sizes_of(options)
    tokens = sizes.prompt_tokens + sizes.new_tokens
    ppo = PlainPpo(
        str(Path(options.folder) / "model"),
        sizes,
        micro_rows=max(1, options.plain_tokens // tokens),
        generate_rows=options.rollout_rows,
    )
    vocabulary = Workload(shape=options.shape).vocabulary
    generator = torch.Generator().manual_seed(0)
    iterations = []
    for _ in range(options.iterations):
        shape = (sizes.answers, sizes.prompt_tokens)
        iterations.append(ppo.iteration(torch.randint(3, vocabulary, shape, generator=generator)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "who": "transformers + PEFT",
        "version": f"{version_of('transformers')} + {version_of('peft')}",
        **figures(options, iterations),
        "answer_tokens": sizes.answers * sizes.new_tokens,
        "peak_gib": peak,
    }


def statistics_of(iterations: list[dict[str, Any]], name: str) -> float:
    return median_and_spread([iteration[name] for iteration in iterations])[0]


def figures(options: argparse.Namespace, iterations: list[dict[str, Any]]) -> Record:
    """Medians over all iterations but the first, which compiles and allocates."""
    timed = iterations[1:] or iterations
    found: Record = {"repeats": len(timed), "spread": {}, "first_seconds": iterations[0]["seconds"]}
    for name in PARTS:
        values = [iteration[name] for iteration in timed if name in iteration]
        if values:
            found[name], found["spread"][name] = median_and_spread(values)
    found["written_tokens_per_s"] = options.answers * options.new_tokens / found["writing_seconds"]
    found["writing_share"] = found["writing_seconds"] / found["seconds"]
    return found


def described(options: argparse.Namespace, record: Record) -> Record:
    names = ["shape", "answers", "minibatches", "prompt_tokens", "new_tokens", "rollout_rows"]
    settings = {name: getattr(options, name) for name in names}
    settings |= {"layers": options.layers} if options.layers else {}
    pass_tokens = options.tokens if record["who"] == "zhibei" else options.plain_tokens
    return {
        "benchmark": "ppo",
        "method": "one frozen bf16 base; policy, critic and reward are rank 16 adapters",
        "settings": {**settings, "pass_tokens": pass_tokens},
        **record,
    }


SIDES = {"zhibei": zhibei, "plain": plain}


def main(arguments: list[str] | None = None) -> None:
    """Measure one side, or all of them in processes of their own; or merge a file of another machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("all", "merge", *SIDES))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--folder", default="/dev/shm/ppo")
    parser.add_argument("--shape", default="llama-7b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--answers", type=int, default=128)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rollout-rows", type=int, default=128, help="answers written at the same time")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of one of our forward passes")
    parser.add_argument("--plain-tokens", type=int, default=4096, help="tokens of one of the plain side's passes")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=280, help="limit for one side")
    parser.add_argument("--out", type=Path, default=RESULT_FILE)
    options = parser.parse_args(arguments)
    if options.verb == "merge":
        merge(RESULT_FILE, read(options.file))
        return
    make(options)
    if options.verb == "all":
        words = sys.argv[2:] if arguments is None else arguments[1:]
        for side in SIDES:
            subprocess.run([sys.executable, "-m", "benchmarks.ppo", side, *words], timeout=options.seconds, check=False)
        return
    words = " ".join(sys.argv[1:] if arguments is None else arguments)
    record = with_surroundings(described(options, SIDES[options.verb](options)), f"python -m benchmarks.ppo {words}")
    merge(options.out, [record])
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
