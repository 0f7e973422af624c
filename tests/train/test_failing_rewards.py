"""A reward that fails in the middle of a run stops it with everything saved, and the run goes on once it works."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.small_policy import small_policy
from tests.train.test_policy_runs import iterations
from zhibei.config.errors import RunStopped
from zhibei.store.checkpoint import list_steps
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.loops import train

FAILING = '''
import pathlib, time
CALLS = pathlib.Path(__file__).with_name("calls")


def flaky(prompts, answers, references):
    """Fails from its third call on, until a file named `mended` is there."""
    calls = int(CALLS.read_text()) + 1 if CALLS.exists() else 1
    CALLS.write_text(str(calls))
    if calls >= %d and not CALLS.with_name("mended").exists():
        %s
    return [float(len(answer)) for answer in answers]
'''
FAULTS = {
    "raises": ("raise ValueError('no judge today')", "raised ValueError: no judge today .*rewards_failing.py, line"),
    "hangs": ("time.sleep(9)", "did not answer within 1 s"),
    "gives no number": ("return [float('nan')] * len(answers)", "gave nan for answer 0"),
    "gives too few": ("return [1.0]", "gave 1 rewards for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_that_fails_in_the_middle_loses_no_work(fault: str, tmp_path: Path) -> None:
    """Calls: evaluation at 0, iteration 1, evaluation at 1, iteration 2, evaluation at 2. Raising comes with the last,
    the other faults with the one before."""
    statement, said = FAULTS[fault]
    file, step = tmp_path / "rewards_failing.py", 2 if fault == "raises" else 1
    file.write_text(FAILING % (3 + step, statement))
    more = ["grpo.save_every=0", "grpo.evaluate_every=1", f"grpo.reward=python:{file}:flaky", "grpo.reward_seconds=1"]
    run = small_policy(tmp_path, "grpo", *more, "grpo.global_batch=8", "name=failing")
    with pytest.raises(RunStopped, match=said) as caught:
        train(run)
    run_dir = RunDir(tmp_path / "runs" / "failing")
    assert f"zhibei resume {run_dir.path}" in caught.value.fix
    assert [one for one, _ in list_steps(run_dir.checkpoints)] == [step]
    if fault != "raises":
        return
    (tmp_path / "mended").touch()
    train(run, resume=run_dir)
    whole = train(small_policy(tmp_path, "grpo", *more, "grpo.global_batch=8", "name=whole"))
    assert iterations(run_dir) == iterations(whole)
    seen = [
        {r["step"]: r["reward_mean"] for r in read_metrics(one.metrics) if r["kind"] == "evaluation"}
        for one in (run_dir, whole)
    ]
    assert seen[0] == seen[1]
