"""The files for cluster managers: what their own formats demand of them, and Ray really run with two workers."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.small_run import small_run
from zhibei.launch.files import WRITERS, Cluster, kubernetes, ray, slurm

TWO_NODES = Cluster(["train", "my run.yaml", "name=a b"], num_nodes=2, gpus_per_node=8, max_restarts=3)
ONE_NODE = Cluster(["resume", "runs/my_run"], num_nodes=1, gpus_per_node=4, max_restarts=0)

# Options of sbatch that the script uses, from `man sbatch`.
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time", "output", "requeue", "open-mode",
    "signal",
}  # fmt: skip
# From the custom resource of the training operator, version v1 of pytorchjobs.kubeflow.org.
JOB_SPEC = {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
RUN_POLICY = {
    "activeDeadlineSeconds", "backoffLimit", "cleanPodPolicy", "managedBy", "schedulingPolicy", "suspend",
    "ttlSecondsAfterFinished",
}  # fmt: skip
REPLICA = {"replicas", "restartPolicy", "template"}
RESTART_POLICIES = {"Always", "OnFailure", "Never", "ExitCode"}


@pytest.mark.parametrize("cluster", [TWO_NODES, ONE_NODE])
def test_the_slurm_script_is_bash_and_asks_for_the_nodes(cluster, tmp_path):
    text = slurm(cluster)
    file = tmp_path / "job.sbatch"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert set(options) == SBATCH
    assert len(options) == len(re.findall(r"^#SBATCH", text, re.MULTILINE))
    assert options["nodes"] == str(cluster.num_nodes)
    assert options["gpus-per-node"] == str(cluster.gpus_per_node)
    assert options["ntasks-per-node"] == "1", "one launcher on each node, which starts the ranks"


def test_words_with_blanks_stay_one_word():
    assert "'my run.yaml' 'name=a b'" in slurm(TWO_NODES)


@pytest.mark.parametrize("cluster", [TWO_NODES, ONE_NODE])
def test_the_pytorchjob_has_the_fields_of_its_resource(cluster):
    job = yaml.safe_load(kubernetes(cluster))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", job["metadata"]["name"])
    assert set(job["spec"]) <= JOB_SPEC
    assert set(job["spec"]["runPolicy"]) <= RUN_POLICY
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == ({"Master", "Worker"} if cluster.num_nodes > 1 else {"Master"})
    assert sum(one["replicas"] for one in replicas.values()) == cluster.num_nodes
    for one in replicas.values():
        assert set(one) == REPLICA
        assert one["restartPolicy"] in RESTART_POLICIES
        [container] = one["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == cluster.gpus_per_node
        assert container["command"][:2] == ["zhibei", "launch"]
        volumes = {volume["name"] for volume in one["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    if cluster.num_nodes > 1:
        command = replicas["Worker"]["template"]["spec"]["containers"][0]["command"]
        assert command[command.index("--master") + 1] == f"{job['metadata']['name']}-master-0:23456"


def test_the_ray_file_is_python_for_all_workers():
    tree = ast.parse(ray(TWO_NODES))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert ast.literal_eval(values["NUM_WORKERS"]) == 16
    assert ast.literal_eval(values["COMMAND"]) == list(TWO_NODES.command)


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_command_writes_the_file(kind, tmp_path):
    small_run(tmp_path)
    file = tmp_path / "job"
    command = [sys.executable, "-m", "zhibei", "launch", str(tmp_path / "run.yaml"), "--nodes", "2"]
    done = subprocess.run(
        [*command, "--write", kind, "--output", str(file)], capture_output=True, text=True, check=True
    )
    assert str(file) in done.stdout.replace("\n", "")
    assert file.read_text() == subprocess.run(
        [*command, "--write", kind], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_two_ray_workers_train_the_run(tmp_path):
    pytest.importorskip("ray")
    small_run(tmp_path)
    settings = ["name=on-ray", "sft.max_steps=4", "sft.sample_tokens=0", "distributed.sharding=no_shard"]
    cluster = Cluster(["train", str(tmp_path / "run.yaml"), *settings], num_nodes=1, gpus_per_node=2, max_restarts=0)
    file = tmp_path / "job.py"
    file.write_text(ray(cluster))
    # Ray keeps sockets below its folder, and their paths may not be long.
    folder = Path("/tmp") / f"zhibei-ray-{tmp_path.name[-4:]}"
    driver = "import ray, runpy, sys; ray.init(num_cpus=3, include_dashboard=False, _temp_dir=sys.argv[2]); "
    driver += "runpy.run_path(sys.argv[1], run_name='__main__')"
    environment = {"ZHIBEI_RAY_GPUS": "0", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    try:
        done = subprocess.run(
            [sys.executable, "-c", driver, str(file), str(folder)],
            cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    proofs = json.loads((tmp_path / "runs" / "on-ray" / "proofs.json").read_text())
    assert all(proof["passed"] for proof in proofs)
