"""`zhibei plan`: memory, disk, time and money of a run before it runs. Knows where facts are, not how they add up."""

from __future__ import annotations

from zhibei.cli import console
from zhibei.cli.plan_text import lines
from zhibei.cli.run import look_at
from zhibei.config.errors import DONE, USER_MUST_ACT, UserError
from zhibei.config.read import read_run, with_compat_set
from zhibei.doctor.outlook import look_ahead
from zhibei.pipeline.file import is_pipeline


def plan(
    run: str,
    /,
    *overrides: str,
    compat: str = "",
    machine: str = "",
    price: float | None = None,
    sharding: str = "",
    offload: str = "",
    json: bool = False,
) -> int:
    """Say what a run will need: memory by cause and phase, disk, time and money; and how to make it fit.

    No weights are loaded. Leaves with exit code 2 when nothing fits. Time comes from a model of throughput; once the
    run has logged a few steps on this machine, from those.

    Examples:

      zhibei plan my_run.yaml
      zhibei plan my_run.yaml --machine v100-32g:4
      zhibei plan alpaca-lora-7b model.path=llama-7b data.sources=[alpaca.json] --machine rtx4090 --price 0.4
      zhibei plan my_run.yaml sft.micro_batch_tokens=8192 --json

    Parameters
    ----------
    run
        A run file, a recipe, a run directory, or a pipeline file (a line for every stage).
    overrides
        Settings laid over it, such as sft.micro_batch_tokens=8192.
    compat
        A set of numbers to be laid over the recipe: coati-2023 (docs/recipes.md says what it changes).
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

    if price is not None and not 0 <= price < float("inf"):
        raise UserError(
            f"--price {price:g}",
            expected="a price of one GPU for one hour: 0 or more",
            fix="leave it out, or give a number such as --price 1.20",
        )
    overrides = with_compat_set(overrides, compat)
    if is_pipeline(run):
        _require_plain(price=price, sharding=sharding, offload=offload)
        return look_at(run, overrides, machine=machine, json=json)
    settings = read_run(run, overrides).run
    ahead = look_ahead(settings, machine_for(machine or None), sharding=sharding, offload=offload)
    if json:
        console.emit(ahead.as_dict(price=price), as_json=True)
        return DONE if ahead.fits else USER_MUST_ACT
    for line in lines(ahead.search, ahead.machine, alternatives=list(ahead.alternatives), price=price):
        console.stdout.print(line)
    if ahead.rows.is_assumed:
        longest = ahead.rows.longest
        console.stdout.print(
            f"rows were not prepared yet: each counts as {longest} tokens (zhibei check prepares them)", style="yellow"
        )
    return DONE if ahead.fits else USER_MUST_ACT


def _require_plain(**given: object) -> None:
    """Options of a single run say nothing about several. Raises UserError."""
    idle = [name for name, value in given.items() if value]
    if idle:
        raise UserError(
            f"--{idle[0]} with a pipeline file",
            expected="the plan of a single run",
            fix=f"leave it out, or plan one stage: zhibei plan RUN --{idle[0]} ...",
        )
