"""`zhibei launch` on one node: what is refused, who is named when a rank dies or hangs, and that the run goes on."""

import json
import os
import signal
import time

import pytest

from tests.launch.nodes import LONG, PATIENCE_SECONDS, end, ranks_of, start, step_of, wait_for_step
from tests.train.small_run import small_run
from zhibei.config.errors import UserError
from zhibei.launch.network import is_own, parse_master, require_reachable
from zhibei.launch.nodes import Nodes, meeting_point
from zhibei.store.run_dir import RunDir


def point(**figures):
    return meeting_point(Nodes(**{"num_nodes": 2, "wait_seconds": 1.0, **figures}), say=print)


def test_one_node_meets_itself_at_a_port_that_is_free():
    found = meeting_point(Nodes(), say=print)
    assert (found.host, found.port, found.is_here) == ("127.0.0.1", 0, True)


@pytest.mark.parametrize(
    ("figures", "what"),
    [
        ({}, "nothing says where they meet"),
        ({"master": "localhost:29500"}, "means a different machine on each node"),
        ({"master": "10.0.0.1"}, "is no HOST:PORT"),
        ({"master": "no.such.host.invalid:29500"}, "has no address"),
        ({"master": "192.0.2.1:29500", "node_rank": 0}, "is not this node"),
        ({"master": "192.0.2.1:29500", "node_rank": 2}, "--node-rank 2"),
        ({"master": "192.0.2.1:29500", "node_rank": 1}, "192.0.2.1"),
    ],
)
def test_nodes_that_cannot_meet_are_told_why(figures, what):
    with pytest.raises(UserError) as caught:
        point(**figures)
    assert what in caught.value.what


def test_a_first_node_that_does_not_listen_is_waited_for_and_named():
    said = []
    with pytest.raises(UserError, match=r"127.0.0.1:1 \(1 s tried\)"):
        require_reachable("127.0.0.1", 1, seconds=1.0, say=said.append)
    assert len(said) == 1


def test_addresses_are_told_apart():
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.1")
    assert parse_master("[fe80::1]:29500") == ("fe80::1", 29500)


@pytest.mark.slow
def test_a_killed_and_a_stopped_rank_are_named_and_the_run_goes_on(tmp_path):
    small_run(tmp_path)
    run_dir, log = RunDir(tmp_path / "runs" / "here"), tmp_path / "launch.log"
    first = [str(tmp_path / "run.yaml"), "name=here", *LONG, "--gpus-per-node", "2", "--max-restarts", "1", "--quiet"]
    launched = start(first, log)
    try:
        wait_for_step(run_dir, 25, [launched])
        os.kill(ranks_of("here")[1], signal.SIGKILL)
        wait_for_step(run_dir, step_of(run_dir) + 30, [launched])
        told = log.read_text()
        assert "rank 1 on" in told
        assert "is gone: its process has ended" in told
        assert "started again" not in told, "--quiet"

        os.kill(ranks_of("here")[1], signal.SIGSTOP)
        stopped = time.monotonic()
        other = ranks_of("here")[0]
        while os.path.exists(f"/proc/{other}"):
            assert time.monotonic() < stopped + PATIENCE_SECONDS + 15
            time.sleep(0.1)
        assert launched.wait(90) == 3
        assert "is stopped (SIGSTOP)" in log.read_text()
        mine = json.loads((run_dir.path / "ranks" / "rank-0.json").read_text())
        assert mine["stack"], "where the rank stood that waited"
    finally:
        end([launched])
    losses = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    steps = [record["step"] for record in losses if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "each step once, as if nothing had happened"
