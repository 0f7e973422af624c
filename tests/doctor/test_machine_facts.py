"""This machine as /proc, /sys, nvidia-smi and the launchers' variables describe it, on made-up ones."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.doctor.facts.environment import read_environment
from zhibei.doctor.facts.environment_reader import faults_in, is_within, read_variables, xids_in
from zhibei.doctor.facts.launch import port_owner, read_launch
from zhibei.doctor.facts.machine import gpus_of, link_of, machine_for, read_cores, read_machine, read_memory
from zhibei.doctor.facts.outside import Answer, ask, fault_of, probe, remembered_probe
from zhibei.doctor.facts.package_trials import missing_credentials
from zhibei.doctor.facts.torch_build import read_torch_build

LISTING = """0, GPU-aaaa, Tesla V100-SXM2-32GB, 32768, 32400, 7.0, 263
1, GPU-bbbb, NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0, 554
2, GPU-cccc, Tesla T4, 15360, 15000, [N/A], [N/A]
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMORY = {"proc/meminfo": "MemTotal: 104857600 kB\nMemFree: 1048576 kB\nMemAvailable: 83886080 kB\n"}


def test_cards_are_read_as_the_driver_lists_them():
    v100, a100, t4 = gpus_of(LISTING)
    assert (v100.capability, a100.capability, t4.capability) == ((7, 0), (8, 0), (7, 5))
    assert v100.memory_gib == pytest.approx((32768 - 263) / 1024, abs=0.01)
    assert t4.memory_gib == 14.6  # without the driver's word, the data sheet's
    assert a100.bandwidth_gb_per_s == 1555


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("1,0", ["NVIDIA A100-SXM4-40GB", "Tesla V100-SXM2-32GB"]),
        ("GPU-cc", ["Tesla T4"]),
        ("0,9,1", ["Tesla V100-SXM2-32GB"]),  # CUDA stops at the first one that does not exist
        ("", []),
        ("-1", []),
    ],
)
def test_only_visible_cards_count(asked, names):
    assert [gpu.name for gpu in gpus_of(LISTING, asked)] == names


def test_memory_is_what_the_container_leaves(tmp_path: Path):
    assert read_memory(tree(tmp_path, MEMORY)) == (100.0, 80.0)
    tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": str(16 * 2**30),
            "sys/fs/cgroup/job/memory.current": str(10 * 2**30),
            "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {4 * 2**30}\n",
        },
    )
    assert read_memory(tmp_path) == (16.0, 10.0)


def test_memory_groups_of_version_1_and_of_the_inside_of_a_container(tmp_path: Path):
    tree(
        tmp_path,
        {
            **MEMORY,
            "proc/self/cgroup": "4:memory,hugetlb:/docker/abc\n1:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(8 * 2**30),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2**30),
        },
    )
    assert read_memory(tmp_path) == (8.0, 7.0)
    tree(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert read_memory(tmp_path) == (100.0, 80.0)


def test_cores_are_what_the_container_leaves(tmp_path: Path):
    assert read_cores(tree(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000"})) == 1


def test_this_machine_can_be_read():
    machine = read_machine()
    assert machine.cpu_cores >= 1
    assert 0 < machine.host_free_gib <= machine.host_gib
    assert not machine.is_described


def test_links():
    assert link_of("        GPU0    GPU1\nGPU0     X      NV12\nGPU1    NV12     X\n") == "nvlink"
    assert link_of("        GPU0    GPU1\nGPU0     X      PHB\nGPU1    PHB     X\nLegend: NV# = NVLink") == "pcie"


def test_a_machine_by_name_by_file_and_wrong(tmp_path: Path):
    assert machine_for("v100-32g:4").num_gpus == 4
    path = tmp_path / "box.yaml"
    path.write_text("card: a100-40g\ngpus: 4\nhost_memory: 1 TiB\n")
    assert (machine_for(str(path)).num_gpus, machine_for(str(path)).host_gib) == (4, 1024)
    path.write_text("card: a100-40g\ngpus: four\n")
    with pytest.raises(UserError) as caught:
        machine_for(str(path))
    assert caught.value.where == f"{path}:2"
    with pytest.raises(UserError, match=r"no such file"):
        machine_for(str(tmp_path / "none.yaml"))


def test_launchers_are_recognised_by_their_variables():
    torchrun = {
        "TORCHELASTIC_RUN_ID": "1", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }  # fmt: skip
    launch = read_launch(torchrun)
    assert (launch.launcher, launch.world_size, launch.rank, launch.local_rank) == ("torchrun", 8, 5, 1)
    assert (launch.num_nodes, launch.node_rank, launch.local_world_size) == (2, 1, 4)
    mpi = read_launch({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert (mpi.launcher, mpi.world_size, mpi.rank, mpi.num_nodes) == ("mpirun", 4, 2, 2)
    deepspeed = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "LOCAL_SIZE": "2",
    }
    assert read_launch(deepspeed).launcher == "deepspeed"
    srun = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2"}
    assert (read_launch(srun).launcher, read_launch(srun).world_size, read_launch(srun).rank) == ("srun", 2, 1)
    # The script of sbatch itself is one process, whatever was asked of Slurm for later.
    assert read_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NODEID": "0"}).world_size == 1
    assert read_launch({}).launcher == ""


def test_figures_that_are_no_numbers_are_told():
    launch = read_launch({"WORLD_SIZE": "four", "RANK": "0", "NNODES": "1:4"})
    assert launch.unreadable == ("WORLD_SIZE=four",)


def test_a_port_in_use_names_its_holder():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert "pid" in port_owner(port)
        assert read_launch({"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}).port_owner
        # torchrun holds the port itself, and other ranks do not bind it.
        assert not read_launch({"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}).port_owner
        assert not read_launch({"MASTER_PORT": str(port), "RANK": "1", "WORLD_SIZE": "2"}).port_owner
    assert port_owner(port) == ""
    assert "65535" in port_owner(70000)


def test_a_name_without_an_address_does_not_resolve():
    assert not read_launch({"MASTER_ADDR": "no-such-host.invalid"}).master_resolves
    assert read_launch({"MASTER_ADDR": "127.0.0.1"}).master_resolves


def test_faults_of_cards():
    assert faults_in("0, 0\n1, 12\n2, [N/A]\n", "ECC errors") == ["GPU 1: 12 ECC errors"]
    assert faults_in("0, No\n1, Yes\n", "rows that could not be remapped") == ["GPU 1: rows that could not be remapped"]
    log = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen\nNVRM: Xid (PCI:0000:3b:00): 13, Graphics\n" * 2
    assert xids_in(log) == ["GPU at PCI 0000:3b:00: Xid 79 in the kernel's log"]


def test_secrets_are_not_kept():
    kept = read_variables({"WANDB_API_KEY": "abc", "HF_TOKEN": "abc", "TOKENIZERS_PARALLELISM": "false", "HOME": "/x"})
    assert kept == {"WANDB_API_KEY": "(set)", "HF_TOKEN": "(set)", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize(
    ("version", "bounds", "met"),
    [
        ("2.13.0+cpu", ">=2.10", True),
        ("5.23.0", ">=5.17,<6", True),
        ("4.27.0", ">=5.17,<6", False),
        ("6.0.0", ">=5.17,<6", False),
        ("0.23.1", ">=0.23.1,<0.24", True),
        ("6.1.dev0", "", True),
    ],
)
def test_versions_and_their_bounds(version, bounds, met):
    assert is_within(version, bounds) is met


def test_credentials_of_wandb(tmp_path: Path):
    assert "WANDB_API_KEY" in missing_credentials({}, tmp_path)
    for variables in ({"WANDB_MODE": "offline"}, {"WANDB_API_KEY": "x"}):
        assert missing_credentials(variables, tmp_path) == ""
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert missing_credentials({}, tmp_path) == ""
    assert missing_credentials({"WANDB_BASE_URL": "https://wandb.example.org/"}, tmp_path)


def test_a_crash_is_an_answer():
    assert "SIGSEGV" in probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").fault
    assert "memory" in fault_of(-9, "")
    assert "shared memory" in fault_of(-7, "")
    assert "SIGBUS" in fault_of(135, "")  # as a shell reports it
    assert probe("raise ValueError('no such thing')").fault == "ValueError: no such thing"
    assert ask(["no-such-program"]).fault.startswith("cannot be started")
    assert ask(["sleep", "5"], seconds=0.1).fault == "did not end within 0.1 seconds"


def test_an_answer_is_remembered_until_what_it_depends_on_changes(tmp_path: Path):
    code = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('hello')"
    for known, times in (("1", 1), ("1", 1), ("2", 2)):
        assert remembered_probe(code, known_by={"torch": known}) == Answer("hello\n")
        assert len((tmp_path / "count").read_text()) == times


def test_the_build_of_torch_is_read_without_importing_it(tmp_path: Path):
    (tmp_path / "version.py").write_text(
        "__version__ = '2.11.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
    )
    build = read_torch_build(tmp_path)
    assert (build.version, build.cuda, build.hip, build.is_for_gpus) == ("2.11.0+cu128", "12.8", None, True)
    assert read_torch_build().version


def test_the_environment_names_packages_and_model_types():
    facts = read_environment()
    assert facts.packages["torch"]
    assert {"llama", "qwen3", "mistral"} <= facts.model_types
    assert facts.unmet == ()


def test_a_described_machine_is_not_judged_by_the_cards_of_this_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    facts = read_environment(machine=machine_for("v100-32g:4"))
    assert (facts.torch_cuda, facts.torch_architectures, facts.driver, facts.gpu_faults) == (None, (), None, ())
