"""Ready-made files for cluster managers: Slurm, Kubernetes and Ray. Knows their formats, no network and no ranks.

Sources: sbatch's manual (slurm.schedmd.com/sbatch.html), the custom resource kubeflow.org/v1 PyTorchJob of the Kubeflow
training operator, and ray.train.torch.TorchTrainer of Ray 2.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PORT = 29500
OPERATOR_PORT = 23456
"""The port for which the training operator makes a service."""
IMAGE = "REGISTRY/zhibei:0.1"


@dataclass(frozen=True)
class Cluster:
    """What is started (arguments of zhibei: `train RUN ...` or `resume RUN_DIR`) and on what."""

    command: Sequence[str]
    num_nodes: int
    gpus_per_node: int
    max_restarts: int

    @property
    def launched(self) -> list[str]:
        """The same as arguments of `zhibei launch`."""
        verb, *rest = self.command
        return ["--resume", *rest] if verb == "resume" else list(rest)

    @property
    def name(self) -> str:
        """A name that every manager takes: letters, digits and dashes, at most 40 of them."""
        stem = Path(self.command[1]).stem.lower()
        return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:40].strip("-") or "run"

    def how_to_start(self, kind: str, file: Path) -> str:
        """What to do with the written file."""
        ways = {
            "slurm": f"Look at partition and time in it, then: sbatch {file}",
            "kubernetes": f"Put your image and volume claim into it, then: kubectl apply -f {file}",
            "ray": f"On a node of the Ray cluster: python {file}",
        }
        return ways[kind]


def slurm(cluster: Cluster) -> str:
    """An sbatch script: one task on each node, which starts a rank for each GPU. Started again by Slurm after a
    failure of a node, the run goes on."""
    launch = shlex.join(
        [
            "zhibei", "launch", *cluster.launched,
            "--nodes", str(cluster.num_nodes), "--gpus-per-node", str(cluster.gpus_per_node),
            "--max-restarts", str(cluster.max_restarts),
        ]
    )  # fmt: skip
    return f"""#!/bin/bash
#SBATCH --job-name={cluster.name}
#SBATCH --nodes={cluster.num_nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={cluster.gpus_per_node}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# Set what your cluster asks for: #SBATCH --partition=..., #SBATCH --account=...

set -euo pipefail

# The first node of the job is where all meet. A job that is put back into the queue keeps its number, so that the run
# directory it made is its own to go on in.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export ZHIBEI_LAUNCH_ID="slurm-${{SLURM_JOB_ID}}"

# --signal above tells the ranks five minutes before the time is over; they save and end.
exec srun --kill-on-bad-exit=0 --wait=60 {launch} --master "${{first_node}}:{PORT}"
"""


def kubernetes(cluster: Cluster) -> str:
    """A PyTorchJob for the Kubeflow training operator: one pod for each node, the first one being the meeting point."""
    name = cluster.name
    launch = [
        "zhibei", "launch", *cluster.launched,
        "--nodes", str(cluster.num_nodes), "--gpus-per-node", str(cluster.gpus_per_node),
        "--max-restarts", str(cluster.max_restarts),
    ]  # fmt: skip
    if cluster.num_nodes > 1:
        launch += ["--master", f"{name}-master-0:{OPERATOR_PORT}"]
    replicas = _replica("Master", 1, launch, cluster)
    if cluster.num_nodes > 1:
        replicas += _replica("Worker", cluster.num_nodes - 1, launch, cluster)
    return f"""# Set: the image (with zhibei in it), the claim of the volume where run file, data, model and runs lie.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {name}
spec:
  runPolicy:
    cleanPodPolicy: None
    backoffLimit: {cluster.max_restarts}
  pytorchReplicaSpecs:
{replicas}"""


def _replica(kind: str, count: int, launch: list[str], cluster: Cluster) -> str:
    """One entry of pytorchReplicaSpecs. The container must be called pytorch; a pod that failed is started again, and
    the launch id tells it that the run directory is its own."""
    return f"""    {kind}:
      replicas: {count}
      restartPolicy: OnFailure
      template:
        spec:
          containers:
            - name: pytorch
              image: {IMAGE}
              workingDir: /work
              command: {json.dumps(launch)}
              env:
                - name: ZHIBEI_LAUNCH_ID
                  valueFrom:
                    fieldRef:
                      fieldPath: metadata.labels['training.kubeflow.org/job-name']
              ports:
                - name: pytorchjob-port
                  containerPort: {OPERATOR_PORT}
              resources:
                limits:
                  nvidia.com/gpu: {cluster.gpus_per_node}
              volumeMounts:
                - name: work
                  mountPath: /work
                - name: shm
                  mountPath: /dev/shm
          volumes:
            - name: work
              persistentVolumeClaim:
                claimName: CLAIM
            - name: shm
              emptyDir:
                medium: Memory
"""


def ray(cluster: Cluster) -> str:
    """A Python file that trains on a Ray cluster which is there already, with the same training function."""
    workers = cluster.num_nodes * cluster.gpus_per_node
    return f'''"""Trains {cluster.name} on a Ray cluster: {workers} workers. Written by zhibei launch --write ray.

On a node of the cluster:   python FILE
Run file, data, model and runs must lie where every worker sees them, under the paths of the run file. For a trial
without GPUs:               ZHIBEI_RAY_GPUS=0 python FILE
"""

import os
import sys
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

COMMAND = {json.dumps(list(cluster.command))}
NUM_WORKERS = {workers}
USE_GPU = os.environ.get("ZHIBEI_RAY_GPUS", "1") != "0"


def train_one_rank(settings: dict) -> None:
    """What every worker does: the same as a rank of zhibei launch. Ray starts all again when one raises."""
    from zhibei.cli.app import run_command

    os.chdir(settings["folder"])
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)  # Ray sets it for another library
    os.environ["ZHIBEI_LAUNCH_ID"] = ray.train.get_context().get_experiment_name()
    code = run_command(settings["command"])
    if code in (1, 3):  # a defect or a lost rank
        raise RuntimeError(f"zhibei {{' '.join(settings['command'])}} ended with exit code {{code}}")
    ray.train.report({{"exit_code": code}})


if __name__ == "__main__":
    trainer = TorchTrainer(
        train_one_rank,
        train_loop_config={{"command": COMMAND, "folder": os.getcwd()}},
        scaling_config=ScalingConfig(num_workers=NUM_WORKERS, use_gpu=USE_GPU),
        run_config=RunConfig(
            name={json.dumps(cluster.name)},
            storage_path=str(Path("ray_results").absolute()),
            failure_config=FailureConfig(max_failures={cluster.max_restarts}),
        ),
    )
    result = trainer.fit()
    sys.exit(int((result.metrics or {{}}).get("exit_code", 0)))
'''


WRITERS: dict[str, Callable[[Cluster], str]] = {"slurm": slurm, "kubernetes": kubernetes, "ray": ray}
"""By the names of `--write`."""
