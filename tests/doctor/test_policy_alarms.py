"""A reward that loves length, from end to end: the alarm comes, and the policy goes back to where it was healthy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import EOS, tiny_tokenizer
from tests.train.small_policy import small_policy
from zhibei.config.errors import RunStopped
from zhibei.config.resolve import ResolvedRun
from zhibei.doctor.watchdogs import watch_over
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.loops import train

LENGTH = "def length(prompts, answers, references):\n    return [float(len(answer)) for answer in answers]\n"


def length_run(folder: Path, *more: str) -> ResolvedRun:
    """A model that ends its answers after a few tokens, and a reward that is the length of the answer."""
    settings = [
        "grpo.max_steps=14", "grpo.max_new_tokens=24", "grpo.learning_rate=2e-3", "grpo.global_batch=32",
        "grpo.evaluate_every=0", f"grpo.reward=python:{folder / 'length.py'}:length", "grpo.micro_batch_tokens=1024",
        "grpo.kl_coefficient=0",
    ]  # fmt: skip
    run = small_policy(folder, "grpo", *settings, *more)
    (folder / "length.py").write_text(LENGTH)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-llama")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 300, (64, 40), generator=generator)
    with torch.no_grad():
        mean_D = model.model(tokens).last_hidden_state.mean(dim=(0, 1))
        model.lm_head.weight[tiny_tokenizer().convert_tokens_to_ids(EOS)] = 6.0 * mean_D / mean_D.square().sum()
    model.save_pretrained(folder / "tiny-llama")
    return run


def events(run_dir: RunDir, name: str) -> list[dict]:
    return [record for record in read_metrics(run_dir.metrics) if record.get("event") == name]


def test_a_length_loving_reward_trips_the_alarm_and_is_rolled_back(tmp_path: Path) -> None:
    run = length_run(tmp_path, "watch.length_hacking=roll_back", "grpo.save_every=1", "grpo.keep_checkpoints=2")
    run_dir = train(run, watch=watch_over(run.run))
    (warning,) = events(run_dir, "warning")
    (back,) = events(run_dir, "rolled back")
    assert warning["watchdog"] == "length_hacking"
    lengths = {r["step"]: r["length_mean"] for r in read_metrics(run_dir.metrics) if r["kind"] == "iteration"}
    rates = {r["step"]: r["learning_rate"] for r in read_metrics(run_dir.metrics) if r["kind"] == "iteration"}
    assert lengths[back["step"]] > 1.3 * lengths[1]
    assert lengths[back["step"] + 1] < lengths[back["step"]]
    assert rates[back["step"] + 1] == pytest.approx(rates[back["step"]] / 2)


def test_a_length_loving_reward_can_stop_the_run(tmp_path: Path) -> None:
    run = length_run(tmp_path, "watch.length_hacking=stop")
    with pytest.raises(RunStopped, match="the reward goes with length"):
        train(run, watch=watch_over(run.run))


def test_a_roll_back_without_anything_to_go_back_to_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zhibei.train.policy_run.wants_roll_back", lambda _run: False)
    run = length_run(tmp_path, "watch.length_hacking=roll_back", "grpo.save_every=0")
    with pytest.raises(RunStopped, match="nothing is saved from before it"):
        train(run, watch=watch_over(run.run))
