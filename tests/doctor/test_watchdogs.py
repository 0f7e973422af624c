"""Each watchdog fires on the sequence it is for and stays quiet on healthy ones; the loop acts on what it is told."""

import math
import random

import pytest
import torch

from tests.train.small_run import small_run
from zhibei.config.errors import RunStopped
from zhibei.config.run import WatchSection
from zhibei.doctor.history import History
from zhibei.doctor.watchdogs import WATCHDOGS, Watchdogs, slow_ranks, watch_over
from zhibei.store.checkpoint import list_steps, newest_sound
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.alarms import Alarm
from zhibei.train.offline import train
from zhibei.train.step import NonFiniteStep

STARTED = {"kind": "event", "event": "started", "step": 0, "vocabulary": 32000, "peak_rate": 2e-5}
LOOK = {
    "kind": "look", "effective_steps": 5, "parameters": 28, "without_gradient": 0, "without_gradient_names": [],
    "unchanged": 0, "free_bytes": 10**12, "checkpoint_bytes": 10**9, "model_bytes": 10**9,
}  # fmt: skip


def steps(losses, first=1, **figures):
    return [
        {
            "kind": "train", "step": number, "loss": loss, "grad_norm": 1.0, "learning_rate": 2e-5, "seconds": 1.0,
            "data_seconds": 0.0, "skipped": 0, "skipped_steps": 0, "skipped_in_row": 0, "host_held_gib": 2.0,
            "gpu_held_gib": 30.0,
            **{name: value(number) if callable(value) else value for name, value in figures.items()},
        }
        for number, loss in enumerate(losses, start=first)
    ]  # fmt: skip


def falling(num_steps=300, start=1.6, end=0.9, noise=0.05, seed=0):
    draw = random.Random(seed)
    return [end + (start - end) * math.exp(-i / 60) + draw.gauss(0, noise) for i in range(num_steps)]


def fired(records, **actions):
    dogs = Watchdogs(WatchSection(**actions))
    alarms = [dogs(dict(record)) for record in [STARTED, *records]]
    return {alarm.name for alarm in alarms if alarm is not None}


def heldout(*curve):
    """An evaluation every 20 steps while the training loss falls."""
    records = []
    for number, loss in enumerate(curve):
        records += [{"kind": "heldout", "step": 20 * number, "loss": loss}]
        records += steps([1.6 - 0.05 * number] * 20, first=20 * number + 1)
    return records


def iterations(count, **figures):
    plain = {
        "kind": "iteration", "reward_mean": lambda n: 0.3 + 0.03 * n, "reward_min": 0.0, "reward_max": 1.0,
        "answers": 32, "length_mean": 20.0, "length_correlation": 0.1, "repeated_share": 0.05, "ended_share": 0.95,
        "kl": 0.05, "kl_coefficient": 0.05, "entropy": 2.0,
    }  # fmt: skip
    return [
        {"step": n} | {name: value(n) if callable(value) else value for name, value in {**plain, **figures}.items()}
        for n in range(1, count + 1)
    ]


HEALTHY = {
    "a policy that learns": iterations(30),
    "longer answers, whatever their reward": iterations(30, length_mean=lambda n: 20 + n, length_correlation=0.2),
    "longer answers are better, as they were": iterations(30, length_correlation=0.8),
    "no weight on the KL": iterations(30, kl=lambda n: 0.3 * n, kl_coefficient=0.0),
    "answers were always cut off": iterations(30, ended_share=0.0),
    "equal rewards now and then": iterations(30, reward_min=lambda n: float(n % 3 == 0)),
    "falls": steps(falling()),
    "noisy, one row a step": steps(falling(noise=0.5, end=1.2, start=2.0)),
    "from scratch": steps(falling(start=10.45, end=3.0)),
    "an epoch border": steps([*falling(100), *[loss - 0.3 for loss in falling(100)]]),
    "overfit to almost nothing": steps([*falling(100, end=0.02, noise=0.01), *[0.01, 0.04, 0.02, 0.06, 0.03] * 10]),
    "a hard row": steps([*falling(100), 2.4, *falling(100)]),
    "fp16 finds its scale": steps(
        falling(200), skipped_steps=lambda step: min(step, 7), skipped_in_row=lambda step: step if step <= 7 else 0
    ),
    "memory settles": steps(
        falling(300), host_held_gib=lambda step: 4 - 2 / step, gpu_held_gib=lambda step: 30 + (step > 5)
    ),
    "a slow save between": steps(falling(50), data_seconds=lambda step: 20.0 if step == 30 else 0.0, seconds=5.0),
    "looks": [*steps(falling(3)), {**LOOK, "step": 3}],
    "lora's first step": [*steps(falling(3)), {**LOOK, "step": 3, "effective_steps": 1, "without_gradient": 14}],
    "held-out falls, then stays": heldout(1.6, 1.2, 1.1, 1.09, 1.1, 1.09, 1.1),
    "one rank": steps(falling(50), rank_seconds=[1.0]),
    "ranks alike": steps(falling(50), rank_seconds=[1.0, 1.1, 1.05, 0.98]),
}

BROKEN = {
    "exploding_loss": {
        "after a while": steps([*falling(100), 2.0, 4.5, 7.9, 8.8, 9.1, 9.4, 9.0]),
        "from the beginning": steps([1.5, 6.0, 30.0, 25.0, 28.0, 27.0]),
        "from scratch, past guessing": steps([10.4, 12.0, 14.5, 15.0, 14.8, 14.9]),
        "from almost nothing": steps([*falling(100, end=0.02, noise=0.01), *[6.0] * 6]),
    },
    "pinned_loss": {
        "at ln(32000)": steps([10.37 + 0.01 * math.sin(i) for i in range(80)]),
        "above it": steps([11.9] * 80),
    },
    "dead_gradient": {
        "one": [{**LOOK, "step": 5, "without_gradient": 1, "without_gradient_names": ["lm_head.weight"]}],
        "all adapters": [{**LOOK, "step": 5, "without_gradient": 28, "without_gradient_names": ["a", "b"]}],
    },
    "unchanged_weights": {"none changed": [{**LOOK, "step": 5, "unchanged": 28}]},
    "skipped_steps": {
        "in a row": steps(falling(20), skipped_steps=lambda step: step, skipped_in_row=lambda step: step),
        "one in ten": steps(
            falling(200), skipped_steps=lambda step: step // 10, skipped_in_row=lambda step: int(step % 10 == 0)
        ),
    },
    "heldout_diverging": {
        "rises while training falls": heldout(1.6, 1.2, 1.1, 1.15, 1.22, 1.3),
        "far above its best": heldout(1.6, 1.2, 1.1, 3.4),
    },
    "loss_spike": {
        "one step": steps([*falling(100), 9.0, *falling(3)], grad_norm=lambda step: 50.0 if step == 101 else 1.0)
    },
    "stalled_data": {"a slow disk": steps(falling(30), data_seconds=3.0, seconds=1.0)},
    "memory_growth": {
        "host": steps(falling(300), host_held_gib=lambda step: 2 + 0.01 * step),
        "GPU": steps(falling(300), gpu_held_gib=lambda step: 30 + 0.02 * step),
        "slowly, over a long run": steps(falling(20000), host_held_gib=lambda step: 2 + 0.0002 * step),
    },
    "slow_rank": {
        "of four": steps(falling(30), rank_seconds=[1.0, 1.02, 1.9, 0.99]),
        "of two": steps(falling(30), rank_seconds=[1.0, 2.0]),
    },
    "disk_filling": {"no room": [{**LOOK, "step": 5, "free_bytes": 19 * 10**8}]},
    "length_hacking": {
        "longer is better": iterations(
            12, length_mean=lambda n: 20 + 5 * n, reward_mean=lambda n: 0.1 * n, length_correlation=0.8
        )
    },
    "policy_drift": {
        "far": iterations(9, kl=lambda n: 0.3 * n),
        "negative": iterations(9, kl=lambda n: -0.3),
    },
    "repetition": {"the same words": iterations(9, repeated_share=lambda n: min(0.9, 0.15 * n))},
    "endless_answers": {"cut off": iterations(9, ended_share=lambda n: 1.0 if n < 4 else 0.02)},
    "no_signal": {"all right": iterations(4, reward_min=1.0, reward_max=1.0, reward_mean=1.0)},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_records_trip_nothing(name):
    assert fired(HEALTHY[name]) == set()


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BROKEN.items() for case in cases])
def test_each_watchdog_fires_on_what_it_is_for_and_on_nothing_else(name, case):
    assert fired(BROKEN[name][case]) == {name}
    assert fired(BROKEN[name][case], **{name: "off"}) == set()


def test_every_watchdog_has_a_setting_and_a_broken_case():
    assert set(WATCHDOGS) == set(WatchSection.model_fields) == set(BROKEN)


def test_an_alarm_is_given_once_and_the_gravest_first():
    dogs = Watchdogs(WatchSection(disk_filling="warn", dead_gradient="stop"))
    both = {**LOOK, "step": 5, "free_bytes": 0, "without_gradient": 2, "without_gradient_names": ["a"]}
    given = [dogs(record) for record in (STARTED, both, {**both, "step": 10}, {**both, "step": 50})]
    assert [alarm and alarm.name for alarm in given] == [None, "dead_gradient", "disk_filling", None]
    assert given[1] is not None
    assert given[1].action == "stop"
    assert given[2] is not None
    assert not given[2].is_worth_saving, "there is no room to save"


def test_a_resumed_run_is_judged_by_the_same_history():
    records = [STARTED, *steps(falling(120)), *steps([4.0, 6.0, 8.0, 9.0, 9.5], first=121)]
    straight = Watchdogs(WatchSection())
    expected = [straight(dict(record)) for record in records]
    resumed = Watchdogs(WatchSection(), past=records)
    resumed({**STARTED, "event": "resumed", "step": 110})
    again = [resumed(dict(record)) for record in records if record["step"] > 110]
    assert again == expected[-len(again) :]
    assert any(isinstance(alarm, Alarm) for alarm in again)


def test_the_history_stays_small():
    past = History()
    for record in steps([1.0] * 5000):
        past.add(record)
    assert len(past.losses) <= 105
    assert len(past.host_gib.values) <= 256
    assert past.num_losses == 5000


def test_ranks_are_compared_with_the_others():
    assert slow_ranks([[1.0, 1.0, 1.0, 4.0]] * 3) == [(3, 4.0)]
    assert slow_ranks([[1.0]] * 3) == []
    assert slow_ranks([[0.01, 0.02]] * 3) == [], "steps of milliseconds"
    assert slow_ranks([]) == []


def run_watched(tmp_path, *overrides):
    resolved = small_run(tmp_path, *overrides)
    return train(resolved, watch=watch_over(resolved.run))


def events(tmp_path, name="small"):
    return [r for r in read_metrics(tmp_path / "runs" / name / "metrics.jsonl") if r["kind"] == "event"]


SETTINGS = {
    "full": [],
    "lora": ["model.method=lora"],
    "padded": ["data.packing=false"],
    "log seldom": ["log.every=5"],
    "bf16": ["model.precision=bf16"],
    "8 bit": ["sft.optimizer=adamw_8bit"],
    "adapters and layers": ["model.method=lora", "lora.targets=[q_proj]", "lora.modules_to_save=[lm_head]"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_healthy_run_hears_nothing(tmp_path, name):
    if name == "8 bit":
        pytest.importorskip("bitsandbytes")
    run_watched(tmp_path, *SETTINGS[name])
    assert [event for event in events(tmp_path) if event["event"] in ("warning", "stopped")] == []


HUGE = ["sft.learning_rate=0.9", "sft.warmup_steps=4", "sft.max_steps=40", "sft.save_every=3"]


def test_a_huge_learning_rate_stops_the_run_and_leaves_a_checkpoint_to_resume(tmp_path):
    with pytest.raises(RunStopped, match="exploding loss") as caught:
        run_watched(tmp_path, *HUGE)
    assert caught.value.exit_code == 3
    assert "loss" in caught.value.what
    assert "watch.exploding_loss" in caught.value.fix
    last = events(tmp_path)[-1]
    assert (last["event"], last["watchdog"]) == ("stopped", "exploding_loss")
    assert len(last["evidence"]) > 3
    run_dir = RunDir(tmp_path / "runs/small")
    stopped_at = last["step"]
    saved = [step for step, _ in list_steps(run_dir.checkpoints)]
    assert saved
    assert max(saved) < stopped_at, "exploded weights are not saved at the stop"
    assert newest_sound(run_dir.checkpoints) is not None
    resolved = small_run(tmp_path, *HUGE)
    seen = []

    def watch(record):
        seen.append(record)

    with pytest.raises(RunStopped, match="exploding loss"):
        train(resolved, resume=run_dir, watch=watch_over(resolved.run, also=watch, resumed=run_dir))
    assert next(r["step"] for r in seen if r.get("event") == "resumed") == max(saved)
    assert seen[-1]["step"] == stopped_at, "the same step as without the interruption"


def test_off_and_warn_let_the_same_run_end(tmp_path):
    run_watched(tmp_path, *HUGE, "watch.exploding_loss=off", "name=off")
    assert [event for event in events(tmp_path, "off") if event["event"] == "warning"] == []
    run_watched(tmp_path, *HUGE, "watch.exploding_loss=warn", "name=warn")
    warned = [event for event in events(tmp_path, "warn") if event["event"] == "warning"]
    assert [event["watchdog"] for event in warned] == ["exploding_loss"]


def test_save_saves_at_once(tmp_path):
    run_watched(tmp_path, *HUGE, "sft.save_every=0", "sft.keep_best=false", "watch.exploding_loss=save")
    alarm = next(event for event in events(tmp_path) if event["event"] == "warning")
    saves = [event["step"] for event in events(tmp_path) if event["event"] == "saved"]
    assert saves[0] == alarm["step"]


def test_parameters_that_are_cut_off_are_named(tmp_path, monkeypatch):
    from zhibei.model.language_model import LanguageModel

    trainable = LanguageModel.trainable

    def with_an_orphan(self):
        orphan = getattr(self, "orphan", None)
        if orphan is None:
            orphan = self.orphan = torch.nn.Parameter(torch.ones(3))
        return {**trainable(self), "orphan.weight": orphan}

    monkeypatch.setattr(LanguageModel, "trainable", with_an_orphan)
    with pytest.raises(RunStopped, match=r"1 of 22 parameters .* e\.g\. orphan\.weight"):
        run_watched(tmp_path)


def test_a_loss_that_reaches_no_parameter_stops_the_run(tmp_path, monkeypatch):
    from zhibei.model.language_model import LanguageModel

    hidden = LanguageModel.hidden
    monkeypatch.setattr(LanguageModel, "hidden", lambda self, batch: hidden(self, batch).detach())
    with pytest.raises(RunStopped, match="no gradient at all"):
        run_watched(tmp_path, "model.method=lora")


def test_an_optimiser_that_does_nothing_is_noticed(tmp_path, monkeypatch):
    from zhibei.train.optimizer import MasterOptimizer

    monkeypatch.setattr(MasterOptimizer, "step", lambda self, gradients, *, learning_rate, scale: None)
    with pytest.raises(RunStopped, match="not one of 21 parameters has changed"):
        run_watched(tmp_path)


def test_a_loss_that_is_not_finite_needs_no_watchdog(tmp_path):
    settings = ["sft.learning_rate=0.9", "sft.max_grad_norm=0", "sft.warmup_steps=0", "sft.weight_decay=1e9"]
    with pytest.raises(NonFiniteStep):
        run_watched(tmp_path, *settings, *[f"watch.{name}=off" for name in WATCHDOGS])


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    monkeypatch.setattr("zhibei.train.offline.free_bytes", lambda folder: 1000)
    run_watched(tmp_path, "sft.save_every=0", "sft.keep_best=false")
    warned = [event for event in events(tmp_path) if event["event"] == "warning"]
    assert [event["watchdog"] for event in warned] == ["disk_filling"]
