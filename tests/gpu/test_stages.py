"""The stages after supervised training on a CUDA device: bf16, the varlen kernel, and the CPU's losses beside it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.train.pair_run import judged_rows, pair_run
from tests.train.small_policy import small_policy
from zhibei.config.errors import RunInterrupted
from zhibei.store.run_dir import RunDir
from zhibei.train.loops import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def records(run_dir: RunDir, kind: str) -> list[dict]:
    lines = (json.loads(line) for line in run_dir.metrics.read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def interrupt_after_the_first(record: dict) -> None:
    if record["kind"] == "iteration" and record["step"] == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def proofs_hold(run_dir: RunDir) -> bool:
    return all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reward_model_learns_and_is_read_back(tmp_path: Path, method: str, compiled: str):
    run_dir = train(pair_run(tmp_path, "reward", f"model.method={method}", f"model.compile={compiled}"))
    accuracies = [record["accuracy"] for record in records(run_dir, "heldout")]
    assert accuracies[-1] > max(0.8, accuracies[0])
    assert proofs_hold(run_dir)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_preference_losses_follow_the_cpu(tmp_path: Path, loss: str):
    """bf16 with the varlen kernel against fp32 on the CPU: the first steps, before rounding has grown."""
    rows = judged_rows() if loss == "kto" else None
    settings = [f"dpo.loss={loss}", "model.method=lora", "dpo.max_steps=3", "model.compile=false"]

    def curve(name: str, *more: str) -> list[float]:
        run_dir = train(pair_run(tmp_path, "dpo", *settings, f"name={name}", *more, rows=rows))
        return [record["loss"] for record in records(run_dir, "train")]

    there, here = curve("gpu"), curve("cpu", "device=cpu", "model.precision=fp32")
    assert len(there) == 3
    assert there == pytest.approx(here, rel=0.05, abs=0.02)


@pytest.mark.parametrize("reference", ["adapters_off", "precomputed"])
def test_dpo_starts_at_the_reference_on_a_gpu(tmp_path: Path, reference: str):
    settings = ["model.method=lora", f"dpo.reference={reference}", "dpo.max_steps=2"]
    first = records(train(pair_run(tmp_path, "dpo", *settings)), "train")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=2e-2)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("ppo", ["ppo.models=shared"]),
        ("ppo", ["ppo.models=separate", "model.method=full", "ppo.learning_rate=1e-3"]),
        ("grpo", ["grpo.answers_per_prompt=4"]),
    ],
    ids=["ppo-shared", "ppo-separate", "grpo"],
)
def test_policies_start_at_themselves_and_go_on_after_an_interruption(tmp_path: Path, stage: str, settings: list[str]):
    """The probes at update 0 and 1 pass on the card; a run that was cut off gives the rewards of the whole one."""
    settings = [*settings, "model.compile=false"]
    straight = train(small_policy(tmp_path, stage, *settings, "name=straight"))
    iterations = records(straight, "iteration")
    assert len(iterations) == 3
    assert abs(iterations[0]["kl"]) < 1e-3
    assert proofs_hold(straight)
    with pytest.raises(RunInterrupted):
        train(small_policy(tmp_path, stage, *settings, "name=cut"), watch=interrupt_after_the_first)
    cut = train(small_policy(tmp_path, stage, *settings, "name=cut"), resume=RunDir(tmp_path / "runs/cut"))
    rewards = [record["reward_mean"] for record in iterations]
    again = [record["reward_mean"] for record in records(cut, "iteration")]
    # Sampling follows the bits of the logits, and kernels may add in another order: close, not equal.
    assert again == pytest.approx(rewards, abs=0.1)
