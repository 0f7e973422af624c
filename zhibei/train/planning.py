"""Plans a run on the device it is about to use, so that `auto` settings become values. Knows cards, not loops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import RunFile
from zhibei.model.locate import locate
from zhibei.model.ranks import current, ranks_asked
from zhibei.plan.cards import known_card
from zhibei.plan.document import as_document
from zhibei.plan.job import rows_of_lengths
from zhibei.plan.machines import Gpu, Machine, machine_of
from zhibei.plan.memory import CONTEXT_GIB
from zhibei.plan.settle import Settled, settle
from zhibei.plan.shapes import ModelShape, read_shape
from zhibei.store.files import write_json_atomic
from zhibei.store.headers import read_header

GIB = 2**30


def settled_for(device: torch.device, run: RunFile, lengths: Sequence[int]) -> Settled:
    """The plan of a run on this device; `lengths`: tokens of what is never torn apart, a row or a pair."""
    ranks = ranks_asked()
    machine = Machine("this machine")
    if device.type == "cuda":
        gpu = gpu_of_device(device)
        card = known_card(gpu.name, gpu.memory_gib)
        # The ranks must choose alike, so that links are taken from the card and not measured by each.
        around = machine_of(card, num_gpus=ranks.per_node, num_nodes=ranks.world // ranks.per_node) if card else machine
        machine = replace(machine, gpus=(gpu,), gpu_link=around.gpu_link, node_link_gb_per_s=around.node_link_gb_per_s)
    rows = rows_of_lengths(lengths, global_batch=run.training.global_batch)
    settled = settle(run, shape_of_model(run), machine, rows, ranks=ranks.world, per_node=ranks.per_node)
    # Free memory differs from card to card; what rank 0 has chosen is what all do.
    return replace(settled, values=current().from_first(settled.values))


def gpu_of_device(device: torch.device) -> Gpu:
    """The card as planning sees it; what other programs hold of it is not free."""
    properties: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    memory_gib = total / GIB
    card = known_card(properties.name, memory_gib)
    return Gpu(
        name=properties.name,
        memory_gib=memory_gib,
        capability=(properties.major, properties.minor),
        vendor="amd" if torch.version.hip else "nvidia",
        bandwidth_gb_per_s=card.bandwidth_gb_per_s if card else 0.0,
        half_tflops=card.half_tflops if card else 0.0,
        # Asking for it has started CUDA already, which the plan counts too.
        free_gib=min(memory_gib, free / GIB + CONTEXT_GIB),
    )


def shape_of_model(run: RunFile) -> ModelShape | None:
    """The model's sizes; None for a hub id that is not here yet and for families whose sizes are not known."""
    try:
        folder = Path(locate(run.model.path).weights)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            tensors |= {name: (entry.dtype, entry.shape) for name, entry in read_header(path).entries.items()}
        return read_shape(config, tensors or None)
    except (UserError, OSError, ValueError):
        return None  # loading says what is wrong with the model; a run without a plan is no fault of the run


def write_plan(path: Path, settled: Settled) -> None:
    """plan.json of a run directory; nothing where the model's sizes are not known."""
    if settled.search is not None and settled.machine is not None:
        write_json_atomic(path, as_document(settled.search, settled.machine))
