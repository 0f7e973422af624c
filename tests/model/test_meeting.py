"""Ranks that meet at a store: what they are told, whom they wait for, and who is named when one falls behind."""

import json
import os
import socket
import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from zhibei.config.errors import RankLost, UserError
from zhibei.model import meeting as meetings
from zhibei.model.meeting import Meeting, all_told, first_does, meeting
from zhibei.model.pulse import Beat, Pulse, Seen, blamed, lost_error, machine_here, state_of


def at_one_store(world: int, *, patience_seconds: float = 4.0) -> list[Meeting]:
    """Meetings of all ranks in this process; their pulses are not started."""
    store = HashStore()
    pulses = [Pulse(store, rank=rank, world=world, patience_seconds=patience_seconds) for rank in range(world)]
    return [Meeting(store, pulse, rank=rank, world=world) for rank, pulse in enumerate(pulses)]


def seen(rank: int, *, count: int, changed_at: float = 100.0, host: str = "elsewhere") -> Seen:
    return Seen(Beat(rank, host, 4711, count=count, still_seconds=9.0), changed_at)


def test_a_silent_rank_is_blamed_before_one_that_is_behind():
    own = Beat(0, "here", 1, count=5)
    others = [seen(1, count=5, changed_at=10.0), seen(2, count=4)]
    assert [beat.rank for beat, _ in blamed(own, others, now=100.0, silence_seconds=30.0)] == [1]
    assert [beat.rank for beat, _ in blamed(own, others[1:], now=100.0, silence_seconds=30.0)] == [2]


def test_nobody_is_blamed_by_a_rank_that_is_itself_among_the_last():
    others = [seen(1, count=5), seen(2, count=4)]
    assert blamed(Beat(0, "here", 1, count=4), others, now=100.0, silence_seconds=30.0) == []
    assert blamed(Beat(0, "here", 1, count=5), [seen(1, count=5)], now=100.0, silence_seconds=30.0) == []


def test_the_state_of_a_process_on_this_machine_is_looked_up():
    here = machine_here()
    assert "process has ended" in state_of(Beat(1, "h", 2**22 + 1, machine=here), here)
    assert "its process is there" in state_of(Beat(1, "h", os.getpid(), machine=here), here)
    assert "link to it is cut" in state_of(Beat(1, "h", os.getpid(), machine="another"), here)


def test_the_error_names_rank_host_step_and_stack():
    late = Beat(3, "node-b", 77, count=9, step=41, doing="adds up tensors", stack=("data.py:7 read: time.sleep()",))
    error = lost_error([(late, "has stood still for 60 s")], Beat(0, "node-a", 1), where="runs/x")
    for part in ("rank 3 on node-b (pid 77)", "in step 42: adds up tensors", "adds up tensors", "data.py:7 read"):
        assert part in error.what
    assert isinstance(error, RankLost)
    assert error.exit_code == 3


def test_one_rank_speaks_for_all_that_are_left():
    pulse = Pulse(HashStore(), rank=1, world=3, patience_seconds=10)
    assert pulse.is_first_of_those_left({0})
    assert not pulse.is_first_of_those_left({2})


def test_a_beat_that_stops_is_noticed_and_one_that_goes_on_is_not(tmp_path):
    store = HashStore()
    told: list[UserError] = []
    watching = Pulse(store, rank=0, world=2, patience_seconds=2.0)
    alive = Pulse(store, rank=1, world=2, patience_seconds=2.0)
    watching._give_up = lambda error: told.append(error)  # it would end this process
    watching.start()
    alive.start()
    time.sleep(3.5)
    assert told == [], "both stand still, and neither is behind"
    alive.stop()
    for _ in range(100):
        if told:
            break
        time.sleep(0.1)
    watching.stop()
    assert "rank 1" in told[0].what


def test_the_others_wait_for_rank_0_longer_than_any_operation_may_take():
    first, other = at_one_store(2, patience_seconds=0.5)
    for here in (first, other):
        here.pulse._give_up = lambda error: pytest.fail(str(error))
        here.pulse.start()
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(first_does(other, "rows", lambda: None)))
    waiting.start()

    def slowly() -> dict:
        time.sleep(1.5)
        return {"rows": 7}

    assert first_does(first, "rows", slowly) == {"rows": 7}
    waiting.join(10)
    first.pulse.stop()
    other.pulse.stop()
    assert found == [{"rows": 7}]


def test_what_ends_rank_0_ends_the_others_with_the_same_code():
    first, other = at_one_store(2)
    fault = UserError("no rows", expected="rows", fix="give some", where="data.json")
    first.leave(fault)
    with pytest.raises(UserError) as caught:
        first_does(other, "rows", lambda: None)
    assert (caught.value.what, caught.value.exit_code) == ("no rows", 2)


def test_a_fault_of_another_rank_is_told_with_its_name():
    first, other = at_one_store(2, patience_seconds=1.0)
    other.leave(UserError("no such card", expected="a card", fix="look", where="device"))
    for here in (first, other):
        here.pulse.start()
    error = first.pulse.explain()
    for here in (first, other):
        here.pulse.stop()
    assert error is not None
    assert error.what == f"rank 1 on {socket.gethostname()}: no such card"


def test_a_rank_that_does_not_come_is_none_among_what_was_told():
    first, other, _ = at_one_store(3)
    thread = threading.Thread(target=lambda: all_told(other, "facts", {"a": 1}, seconds=5))
    thread.start()
    told = all_told(first, "facts", {"a": 0}, seconds=1.0)
    thread.join(10)
    assert [one and one[0] for one in told] == [{"a": 0}, {"a": 1}, None]
    assert told[1] is not None
    assert abs(told[1][1]) < 5, "clocks of one machine"


@pytest.fixture
def meeting_point(monkeypatch):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return server


def test_a_meeting_says_how_it_was_left(meeting_point):
    with pytest.raises(UserError), meeting(rank=0, world=2, patience_seconds=10):
        raise UserError("no rows", expected="rows", fix="give some")
    told = json.loads(PrefixStore("zhibei/1", meeting_point).get("left/0"))
    assert told["fault"]["what"] == "no rows"
    assert meetings.present() is None


def test_started_again_nothing_of_the_first_start_is_heard(meeting_point):
    with meeting(rank=0, world=2, patience_seconds=10) as here:
        here.tell("told", value=True)
    with meeting(rank=0, world=2, patience_seconds=10) as here:
        assert here.heard("told") is None


def test_two_processes_of_one_rank_are_refused(meeting_point, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with meeting(rank=1, world=2, patience_seconds=10):
        pass
    with pytest.raises(UserError, match="two processes are rank 1"), meeting(rank=1, world=2, patience_seconds=10):
        pass


def test_a_port_that_is_taken_and_one_where_nobody_listens_are_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="cannot open port"), meeting(rank=0, world=2, patience_seconds=1):
            pass
    with pytest.raises(UserError, match=r"rank 1 on .* does not reach"), meeting(rank=1, world=2, patience_seconds=1):
        pass
