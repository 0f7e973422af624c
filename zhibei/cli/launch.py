"""`zhibei launch`: one run on several GPUs or nodes. Knows how a launch is asked for, not how ranks are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from zhibei.cli import console
from zhibei.cli.train import unfinished
from zhibei.config.errors import UserError
from zhibei.config.read import read_run, with_compat_set


def launch(
    run: str = "",
    /,
    *overrides: str,
    nodes: int = 1,
    node_rank: str = "auto",
    gpus_per_node: int | None = None,
    master: str = "",
    max_restarts: int = 2,
    wait_seconds: float = 600,
    resume: Path | None = None,
    write: Literal["slurm", "kubernetes", "ray"] | None = None,
    output: Path | None = None,
    compat: str = "",
    quiet: bool = False,
    json: bool = False,
) -> int | None:
    """Train one run on several GPUs, on one node or many.

    Every node is given the same command. Ranks that die or hang are named, and the run starts again from its newest
    sound checkpoint.

    Examples:

      zhibei launch my_run.yaml
      zhibei launch my_run.yaml --gpus-per-node 4
      zhibei launch my_run.yaml --nodes 2 --master 10.0.0.1:29500
      zhibei launch --resume runs/my_run
      zhibei launch my_run.yaml --nodes 4 --gpus-per-node 8 --write slurm --output train.sbatch

    Parameters
    ----------
    run
        A run file or the name of a recipe; the same on every node.
    overrides
        Settings laid over it, such as sft.epochs=1.
    nodes
        How many nodes.
    node_rank
        Which node this is, counted from 0; auto: the nodes settle it.
    gpus_per_node
        How many ranks each node has. By default one for each GPU, or one where there is none.
    master
        Where the nodes meet: the first node's address and a free port there.
    max_restarts
        How often the ranks are started again after a failure.
    wait_seconds
        How long this node waits for the others.
    resume
        Go on with the run in this directory instead of starting one.
    write
        Start nothing; write a file for this cluster manager.
    output
        Where to write it; by default it is printed.
    compat
        A set of numbers to be laid over the recipe: coati-2023.
    quiet
        Print only what went wrong, and the last word.
    json
        Every record as one JSON line.
    """
    settings = with_compat_set(overrides, compat)
    command, name = _command(run, settings, resume)
    if write is not None:
        return _write(write, output, command, nodes=nodes, gpus_per_node=gpus_per_node, max_restarts=max_restarts)
    if output is not None:
        raise UserError(
            "--output without --write", expected="a file to write", fix="add --write slurm", where="--output"
        )
    # Torch reads this when it is loaded; it would tell of every broken connection with a stack of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from zhibei.launch.nodes import Nodes, ranks_here
    from zhibei.launch.nodes import launch as start

    asked = Nodes(
        num_nodes=nodes,
        node_rank=_node_rank(node_rank),
        ranks_per_node=ranks_here(gpus_per_node),
        master=master,
        max_restarts=max_restarts,
        wait_seconds=wait_seconds,
    )
    command += ["--quiet"] if quiet else []
    command += ["--json"] if json else []
    return start(asked, command, name=name, say=lambda text: console.stderr.print(text, style="yellow"))


def _command(run: str, settings: tuple[str, ...], resume: Path | None) -> tuple[list[str], str]:
    """What each rank is started with, and the name under which the nodes meet. Raises UserError for a faulty run."""
    if resume is not None:
        if run:
            raise UserError(
                f"both a run ({run}) and --resume {resume}",
                expected="one of them",
                fix=f"to go on: zhibei launch --resume {resume}",
                where="--resume",
            )
        return ["resume", str(resume)], read_run(str(unfinished(resume).resolved)).run.name
    if not run:
        raise UserError(
            "nothing to train was named",
            expected="a run file or a recipe, or --resume RUN_DIR",
            fix="zhibei launch my_run.yaml",
        )
    return ["train", run, *settings], read_run(run, settings).run.name


def _node_rank(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise UserError(f"--node-rank {text}", expected="a number from 0, or auto", fix="number the nodes from 0")
    return int(text)


def _write(
    kind: str, output: Path | None, command: list[str], *, nodes: int, gpus_per_node: int | None, max_restarts: int
) -> None:
    from zhibei.launch.files import WRITERS, Cluster

    cluster = Cluster(command, num_nodes=nodes, gpus_per_node=gpus_per_node or 1, max_restarts=max_restarts)
    text = WRITERS[kind](cluster)
    if output is None:
        console.stdout.print(text, markup=False, end="")
        return
    output.write_text(text, encoding="utf-8")
    console.stdout.print(f"{output} is written. {cluster.how_to_start(kind, output)}")
