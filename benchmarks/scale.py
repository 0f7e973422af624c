"""Plans of full training from 7B to 70B on many GPUs and of QLoRA on a few small ones. Nothing is run: it is the
planner's own arithmetic.

python -m benchmarks.scale     writes benchmarks/results/scale.json and the tables of docs/scale.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown
from zhibei.config.read import read_run
from zhibei.plan.communication import LINK_GB_PER_S
from zhibei.plan.job import Rows, Sharding
from zhibei.plan.machines import Machine, parse_machine
from zhibei.plan.search import Candidate, Wishes, search
from zhibei.plan.shapes import ModelShape, read_shape

RESULTS = Path(__file__).parent / "results" / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
GIB = 2**30
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
         "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "34B": (8192, 22016, 48, 64, 8),
    "70B": (8192, 28672, 80, 64, 8),
}
"""Width, MLP width, layers, heads, heads of keys: LLaMA 2's 7B, 13B, 70B; Code Llama's 34B."""
NODES = (1, 2, 8, 64)
NODE_LINKS = {"assumed": 25.0, "fast": 400.0}
"""GB/s of a node: what the planner assumes (one adapter of 200 Gbit/s), and eight of 400 Gbit/s (DGX H100)."""
CARDS = (1, 2, 4, 8)
"""Of 24 GiB each, in one machine."""
TOKENS_PER_GPU, ROW_TOKENS = 16384, 4096
DISK_GB_PER_S = 2.0
"""What one node is taken to write to shared storage. Assumed."""


def shape_of(name: str) -> ModelShape:
    hidden, mlp, layers, heads, key_heads = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return read_shape({**LLAMA, **sizes, "num_attention_heads": heads, "num_key_value_heads": key_heads}, None)


def planned(name: str, machine: Machine, sharding: Sharding) -> Candidate:
    """The fastest way with this sharding; every GPU has 16,384 tokens of each step."""
    rows_of_step = machine.num_gpus * TOKENS_PER_GPU // ROW_TOKENS
    settings = [f"sft.global_batch={rows_of_step}", f"data.max_tokens={ROW_TOKENS}"]
    run = read_run("alpaca-7b", ["model.path=x", "data.sources=[x.json]", "model.method=full", *settings]).run
    rows = Rows(ROW_TOKENS, float(ROW_TOKENS), 10**6)
    return search(run, shape_of(name), machine, rows, Wishes(sharding=sharding, offload="none")).chosen


def records() -> Iterator[dict[str, Any]]:
    """A record for every model, number of nodes, link and sharding."""
    for name in SHAPES:
        for nodes in NODES:
            links = NODE_LINKS if nodes > 1 else {"assumed": 0.0}
            for link, gb_per_s in links.items():
                machine = replace(parse_machine(f"h100-80g:8x{nodes}"), node_link_gb_per_s=gb_per_s)
                ways: Sequence[Sharding] = ("full_shard", "hybrid") if nodes > 1 else ("shard_grad_op", "full_shard")
                for sharding in ways:
                    found = planned(name, machine, sharding)
                    yield {"model": name, "nodes": nodes, "link": link, **figures(found, machine)}


def few_cards() -> Iterator[dict[str, Any]]:
    """QLoRA on cards of 24 GiB: whole on each, and divided."""
    for name in ("34B", "70B"):
        for cards in CARDS:
            machine = parse_machine(f"rtx4090:{cards}")
            settings = [f"data.max_tokens={ROW_TOKENS // 2}", "sft.global_batch=16", "model.method=qlora"]
            run = read_run("alpaca-7b", ["model.path=x", "data.sources=[x.json]", *settings]).run
            rows = Rows(ROW_TOKENS // 2, float(ROW_TOKENS // 2), 10**6)
            ways: Sequence[Sharding] = ("no_shard", "full_shard") if cards > 1 else ("no_shard",)
            for sharding in ways:
                wishes = Wishes(sharding=sharding, offload="none")
                found = search(run, shape_of(name), machine, rows, wishes).chosen
                yield {"model": name, "cards": cards, **figures(found, machine)}


def table_of_cards(found: list[dict[str, Any]]) -> str:
    """Markdown of the plans for a few cards."""
    head = ["model", "cards of 24 GiB", "sharding", "GiB per card", "gathered (GiB a step)", "tokens/s"]
    rows = []
    for one in found:
        memory = f"{one['device_gib']}" + ("" if one["fits"] else " (does not fit)")
        speed = f"{one['tokens_per_s']:,}" if one["fits"] else "-"
        rows.append([one["model"], str(one["cards"]), one["sharding"], memory, str(one["gathered_gib"]), speed])
    return markdown(head, rows)


def figures(found: Candidate, machine: Machine) -> dict[str, Any]:
    """What is shown of one plan."""
    speed, memory, job = found.speed, found.memory, found.job
    assert speed is not None
    assert memory.disk is not None
    assert memory.shape is not None
    saved = 12 * memory.shape.num_parameters
    writers = 1 if job.sharding == "hybrid" else machine.num_nodes
    return {
        "sharding": job.sharding,
        "fits": found.fits,
        "device_gib": round(memory.device_gib, 1),
        "tokens_a_pass": found.micro_batch_tokens,
        "checkpointing": job.checkpointing,
        "passes": job.num_passes,
        "gathered_gib": round(speed.traffic.gathered / GIB, 1),
        "scattered_gib": round(speed.traffic.scattered / GIB, 1),
        "added_up_gib": round(speed.traffic.added_up / GIB, 1),
        "efficiency": round(speed.efficiency, 3),
        "tokens_per_s": round(speed.tokens_per_s),
        "checkpoint_gib": round(saved / GIB, 1),
        "checkpoint_seconds": round(saved / writers / (DISK_GB_PER_S * 1e9), 1),
    }


def table(found: list[dict[str, Any]], link: str) -> str:
    """Markdown of the records with this link."""
    head = ["model", "GPUs", "sharding", "GiB per GPU", "gathered + scattered + added up (GiB a step)", "efficiency",
            "tokens/s", "checkpoint (s)"]  # fmt: skip
    rows = []
    for one in found:
        if one["link"] != link:
            continue
        memory = f"{one['device_gib']}" + ("" if one["fits"] else " (does not fit)")
        moved = f"{one['gathered_gib']} + {one['scattered_gib']} + {one['added_up_gib']}"
        rates = [f"{100 * one['efficiency']:.0f} %", f"{one['tokens_per_s']:,}", f"{one['checkpoint_seconds']:,}"]
        rows.append([one["model"], str(8 * one["nodes"]), one["sharding"], memory, moved, *rates])
    return markdown(head, rows)


def main() -> int:
    found, cards = list(records()), list(few_cards())
    assumed = {
        "gpu_link_gb_per_s": LINK_GB_PER_S["nvlink"],
        "node_links_gb_per_s": NODE_LINKS,
        "disk_gb_per_s_of_a_node": DISK_GB_PER_S,
        "tokens_per_gpu_and_step": TOKENS_PER_GPU,
    }
    document = {"command": "python -m benchmarks.scale", "is_measured": False, "assumed": assumed, "plans": found}
    document["few_cards"] = cards
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    made = {link: table(found, link) for link in NODE_LINKS} | {"few cards": table_of_cards(cards)}
    for name, text in made.items():
        pattern = rf"(<!-- scale {name} -->\n).*?(<!-- end {name} -->)"
        page = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
