"""Learning rates equal transformers' schedules, and their own formulas where transformers has none."""

import pytest
import torch
from transformers import get_scheduler

from zhibei.config.run import TrainingSection
from zhibei.train.schedule import learning_rate, warmup_steps_of

PEAK, STEPS = 1e-3, 50


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_equal_transformers(name, warmup):
    section = TrainingSection(schedule=name, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    for step in range(STEPS):
        ours = learning_rate(step, section=section, peak=PEAK, num_steps=STEPS)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_warmup_ratio_is_rounded_up_as_transformers_does():
    assert warmup_steps_of(TrainingSection(warmup_ratio=0.03), 101) == 4


def test_a_ratio_leaves_at_least_one_step_at_the_peak():
    for num_steps in (1, 2, 5):
        section = TrainingSection(warmup_ratio=1.0)
        rates = [learning_rate(step, section=section, peak=1.0, num_steps=num_steps) for step in range(num_steps)]
        assert max(rates) == 1.0


def test_wsd_is_flat_and_then_falls_over_the_last_share_of_all_steps():
    section = TrainingSection(schedule="wsd", warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(step, section=section, peak=1.0, num_steps=100) for step in range(100)]
    assert rates[5] == pytest.approx(0.5)
    assert all(rate == pytest.approx(1.0) for rate in rates[10:80])
    assert rates[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[80] > rates[81] > rates[99] > 0.1


def test_every_schedule_ends_at_its_floor():
    for name in ("cosine", "linear", "wsd"):
        section = TrainingSection(schedule=name, warmup_steps=0, min_lr_ratio=0.25)
        assert learning_rate(1000, section=section, peak=1.0, num_steps=1000) == pytest.approx(0.25)
