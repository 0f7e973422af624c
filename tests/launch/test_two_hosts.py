"""Two hosts, as far as one machine can have them: two network namespaces, a node in each, and a link that is cut."""

import subprocess
import time

import pytest

from tests.launch.nodes import ADDRESSES, LONG, PATIENCE_SECONDS, end, ip, start, step_of, two_hosts, wait_for_step
from tests.train.small_run import small_run
from zhibei.store.checkpoint import newest_sound
from zhibei.store.run_dir import RunDir


@pytest.fixture
def hosts():
    made = two_hosts()
    try:
        names = made.__enter__()
    except (OSError, subprocess.SubprocessError) as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    yield names
    made.__exit__(None, None, None)


@pytest.mark.slow
def test_a_cut_link_is_named_and_the_run_goes_on_afterwards(hosts, tmp_path, record_property):
    small_run(tmp_path)
    run_dir = RunDir(tmp_path / "runs" / "hosts")
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    common = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "--master",
        f"{ADDRESSES[0]}:29511",
        "--max-restarts",
        "0",
        "--quiet",
    ]
    first = [str(tmp_path / "run.yaml"), "name=hosts", *LONG, *common]
    nodes = [start(first, log, namespace=name) for name, log in zip(hosts, logs, strict=True)]
    try:
        wait_for_step(run_dir, 25, nodes)
        ip("-n", hosts[1], "link", "set", "veth-b", "down")
        cut = time.monotonic()
        codes, ended = [], []
        for node in nodes:
            codes.append(node.wait(PATIENCE_SECONDS + 120))
            ended.append(time.monotonic() - cut)
        told = [log.read_text() for log in logs]
        assert all(code not in (0, 1) for code in codes), told
        assert "rank 1 on" in told[0]
        assert "link to it is cut" in told[0], told[0]
        assert f"{ADDRESSES[0]}" in told[1]
        assert "cannot be reached" in told[1], told[1]
        record_property("seconds_until_both_nodes_ended", ended)

        sound = newest_sound(run_dir.checkpoints)
        assert sound is not None
        ip("-n", hosts[1], "link", "set", "veth-b", "up")
        stopped_at = step_of(run_dir)
        again = ["--resume", str(run_dir.path), *common]
        nodes = [start(again, log, namespace=name) for name, log in zip(hosts, logs, strict=True)]
        wait_for_step(run_dir, stopped_at + 30, nodes)
    finally:
        end(nodes)
    assert [node.returncode for node in nodes] == [130, 130], "\n".join(log.read_text()[-2000:] for log in logs)
