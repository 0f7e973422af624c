"""`zhibei plan`: memory, disk, time and money of a run before it runs. Knows where facts are, not how they add up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zhibei.cli import console
from zhibei.cli.plan_text import lines
from zhibei.config.errors import DONE, USER_MUST_ACT, UserError
from zhibei.config.read import read_run
from zhibei.config.run import RunFile
from zhibei.doctor.facts.places import folder_of
from zhibei.doctor.facts.planned import planned_rows
from zhibei.plan.document import as_document
from zhibei.plan.job import OFFLOADS, SHARDINGS
from zhibei.plan.search import Wishes, search, what_would_fit, wishes_of
from zhibei.plan.shapes import ModelShape, read_shape


def plan(
    run: str,
    /,
    *overrides: str,
    machine: str = "",
    price: float | None = None,
    sharding: str = "",
    offload: str = "",
    json: bool = False,
) -> int:
    """Say what a run will need: memory by cause and phase, disk, time and money; and how to make it fit.

    No weights are loaded. Leaves with exit code 2 when nothing fits.

    Examples:

      zhibei plan my_run.yaml
      zhibei plan my_run.yaml --machine v100-32g:4
      zhibei plan alpaca-lora-7b model.path=llama-7b data.sources=[alpaca.json] --machine rtx4090 --price 0.4
      zhibei plan my_run.yaml sft.micro_batch_tokens=8192 --json

    Parameters
    ----------
    run
        A run file, a recipe, or a run directory.
    overrides
        Settings laid over it, such as sft.micro_batch_tokens=8192.
    machine
        Plan for another machine: v100-32g:4, a100-40g:4, rtx4090, t4, h100-80g:8x2, cpu, or a YAML file.
    price
        Price of one GPU for one hour, in any currency.
    sharding
        no_shard, shard_grad_op, full_shard or hybrid; by default the fastest that fits.
    offload
        none, optimizer or all; by default the fastest that fits.
    json
        One JSON document.
    """
    from zhibei.doctor.facts.machine import machine_for

    settings = read_run(run, overrides).run
    where = machine_for(machine or None)
    shape = shape_of(settings)
    rows = planned_rows(settings)
    wishes = wishes_of(settings)
    wishes = Wishes(
        wishes.micro_batch_tokens,
        wishes.checkpointing,
        _one_of(sharding, SHARDINGS, "--sharding"),
        _one_of(offload, OFFLOADS, "--offload"),
    )
    found = search(settings, shape, where, rows, wishes)
    alternatives = [] if found.chosen.fits else what_would_fit(settings, shape, where, rows)
    if json:
        document = as_document(found, where, alternatives=alternatives, price=price)
        document["rows"] = {"assumed_full": rows.is_assumed, "longest": rows.longest, "mean_tokens": rows.mean_tokens}
        console.emit(document, as_json=True)
    else:
        for line in lines(found, where, alternatives=alternatives, price=price):
            console.stdout.print(line)
        if rows.is_assumed:
            console.stdout.print(
                f"rows were not prepared yet: each counts as {rows.longest} tokens (zhibei check prepares them)",
                style="yellow",
            )
    return DONE if found.chosen.fits else USER_MUST_ACT


def _one_of(text: str, choices: tuple[str, ...], name: str) -> Any:
    if not text:
        return None
    if text not in choices:
        raise UserError(f"{name} {text}", expected=" or ".join(choices), fix=f"write one of {', '.join(choices)}")
    return text


def shape_of(run: RunFile) -> ModelShape:
    """The model's sizes, from its config.json and the heads of its weight files. Raises UserError where neither is."""
    from zhibei.model.locate import locate

    path = run.model.path
    # A folder with config.json alone is enough here; `locate` resolves runs and adapters.
    folder = folder_of(path, revision=run.model.revision) or folder_of(
        locate(path).weights, revision=run.model.revision
    )
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(
            f"model.path: {path} is not on this machine, so its sizes are not known",
            expected="a folder that holds at least the model's config.json",
            fix="download config.json (a few hundred bytes) into a folder and set model.path to it",
            where="model.path",
        )
    return read_shape(_config(folder), _tensors(folder))


def _config(folder: Path) -> Mapping[str, Any]:
    from zhibei.store.files import read_json

    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(
            f"holds {type(config).__name__} instead of settings by name",
            expected="a JSON object",
            fix="copy the file again from the model's source",
            where=str(folder / "config.json"),
        )
    return config


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    from zhibei.store.headers import read_header

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            found |= {name: (entry.dtype, entry.shape) for name, entry in read_header(path).entries.items()}
        except (UserError, OSError):
            return None  # a damaged file is `zhibei check`'s business; config.json still says the sizes
    return found or None
