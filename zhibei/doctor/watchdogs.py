"""The watchdogs: what goes wrong in a run that is under way, found in its own records. Knows records and no loop.

Each watchdog is a function of the history of a run that says what it saw, or None. `Watchdogs` is the `watch` of a
loop: it remembers records, asks every watchdog that section `watch` of the run file leaves on, and answers with an
alarm. Everything is judged against the run's own past; no loss is too high by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zhibei.config.run import PolicyAnswer, RunFile, WatchSection
from zhibei.doctor.history import NOW, WINDOW, History, Samples, StepLoss
from zhibei.doctor.policy_watchdogs import endless_answers, length_hacking, no_signal, policy_drift, repetition
from zhibei.doctor.sighting import Sighting
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.alarms import Alarm
from zhibei.train.record import Watch, ignore

GIB = 2.0**30
REPEAT_AFTER_STEPS = 500
SEVERITY = ("stop", "roll_back", "save", "warn")

SKIPS_IN_ROW = 8
SKIPPED_SHARE = 0.05
LOOKED_AFTER_STEPS = 3
PINNED_STEPS = 50
PINNED_WITHIN = 0.02
MOST_WAITING = 0.5
WAITING_SECONDS = 10.0
GROWTH_GIB = {"GPU": 0.5, "host": 1.0}
SLOW_FACTOR = 1.5
SLOW_SECONDS = 0.05
"""Steps of a few milliseconds differ by more than the factor for no reason."""


def exploding_loss(past: History) -> Sighting | None:
    """Most of the newest losses are far above the lowest level and above where the run began.

    Far: six times the usual scatter, and twice that level or clearly worse than guessing. The first loss was computed
    before any update.
    """
    losses = [one.loss for one in past.losses]
    if past.first_loss is None or len(losses) < NOW:
        return None
    now = float(np.median(losses[-NOW:]))
    low = past.first_loss if past.lowest is None else min(past.first_loss, past.lowest)
    scatter = max(_scatter(losses[:-NOW]), 0.05 * abs(low))
    worse_than_guessing = 1.3 * math.log(past.vocabulary) if past.vocabulary else math.inf
    if now <= max(1.2 * past.first_loss, low + 6 * scatter, min(2 * low, worse_than_guessing)):
        return None
    return Sighting(
        f"the loss is {now:.3g}, and was down at {low:.3g}",
        "start a new run with a lower learning rate or a longer warm-up; resuming repeats these steps",
        (*_newest(past), f"scatter of the steps before {scatter:.3g}"),
        is_worth_saving=False,
    )


def loss_spike(past: History) -> Sighting | None:
    """The newest step alone stands far outside of the steps before it, in loss and in gradient."""
    steps = list(past.losses)
    if len(steps) < WINDOW // 2:
        return None
    *before, newest = steps
    losses = [one.loss for one in before]
    usual, usual_norm = float(np.median(losses)), float(np.median([one.grad_norm for one in before]))
    bound = max(1.5 * usual, usual + 12 * _scatter(losses))
    if newest.loss <= bound or newest.grad_norm <= 5 * usual_norm:
        return None
    return Sighting(
        f"step {newest.step} has a loss of {newest.loss:.3g} (usual: {usual:.3g})",
        "look at the rows of that step with zhibei data show; if it comes again, lower the learning rate",
        (f"gradient norm {newest.grad_norm:.3g}, usual {usual_norm:.3g}",),
    )


def pinned_loss(past: History) -> Sighting | None:
    """After many steps at a full rate the loss is no better than guessing among all tokens, and does not fall."""
    if not past.vocabulary or past.steps_at_full_rate < PINNED_STEPS or len(past.losses) < PINNED_STEPS:
        return None
    losses = [one.loss for one in past.losses][-PINNED_STEPS:]
    chance = math.log(past.vocabulary)
    first, last = float(np.median(losses[: PINNED_STEPS // 2])), float(np.median(losses[PINNED_STEPS // 2 :]))
    if last < (1 - PINNED_WITHIN) * chance or first - last > 0.005 * chance:
        return None
    return Sighting(
        f"the loss stays at {last:.3f}; guessing among all tokens has ln({past.vocabulary}) = {chance:.3f}",
        "check that the weights belong to this config.json and tokenizer (zhibei rehearse), and the learning rate",
        _newest(past),
        is_worth_saving=False,
    )


def dead_gradient(past: History) -> Sighting | None:
    """Parameters that should learn and were never reached by a gradient."""
    look = past.look
    if int(look.get("effective_steps", 0)) < LOOKED_AFTER_STEPS or not look.get("without_gradient"):
        return None
    count, names = int(look["without_gradient"]), list(look.get("without_gradient_names", ()))
    return Sighting(
        f"{count:,} of {int(look['parameters']):,} parameters that should learn have had no gradient, "
        f"e.g. {names[0] if names else '?'}",
        "set model.activation_checkpointing: none, or train without these layers (lora.targets, lora.modules_to_save)",
        (f"after {look['effective_steps']} steps", *names),
        is_worth_saving=False,
    )


def unchanged_weights(past: History) -> Sighting | None:
    """Updates were applied, and no parameter differs in any bit."""
    look = past.look
    num_steps = int(look.get("effective_steps", 0))
    if num_steps < LOOKED_AFTER_STEPS or look.get("unchanged") != look.get("parameters"):
        return None
    return Sighting(
        f"after {num_steps} steps at a rate above 0 not one of {int(look['parameters']):,} parameters has changed",
        "raise sft.learning_rate (updates may be lost in rounding), or set sft.optimizer: adamw",
        tuple(f"step {one.step}: learning rate {one.learning_rate:.3g}" for one in list(past.losses)[-3:]),
        is_worth_saving=False,
    )


def skipped_steps(past: History) -> Sighting | None:
    """fp16: gradients overflow again and again. The first twenty steps, in which the scale is found, do not count."""
    later, num_later = past.skipped_steps - past.skipped_at_start, past.step - 20
    in_row = past.skipped_in_row > SKIPS_IN_ROW
    if not in_row and not (past.step >= WINDOW and later > SKIPPED_SHARE * num_later):
        return None
    what = (
        f"{past.skipped_in_row} steps in a row were skipped"
        if in_row
        else f"{later} of {num_later} steps were skipped ({100 * later / num_later:.0f} %)"
    )
    return Sighting(
        f"{what} because fp16 gradients overflowed",
        "set model.precision: bf16 where the GPU has it, else fp32; or lower sft.learning_rate",
        (f"{past.step - past.skipped_steps} of {past.step} optimiser steps were applied",),
    )


def heldout_diverging(past: History) -> Sighting | None:
    """The held-out loss has risen three times running while training improved, or is far above its best."""
    if len(past.heldout) < 2:
        return None
    best_step, best, _ = min(past.heldout, key=lambda one: one[1])
    _, now, _ = past.heldout[-1]
    evidence = tuple(f"step {step}: {loss:.4f}" for step, loss, _ in past.heldout[-4:])
    to_do = "stop here or sooner (sft.early_stop_patience), train fewer epochs or at a lower rate"
    if now > max(2 * best, best + 0.5) and now > 1.2 * past.heldout[0][1]:
        return Sighting(f"the held-out loss is {now:.4f}, and was {best:.4f} at step {best_step}", to_do, evidence)
    last = past.heldout[-4:]
    rises = len(last) == 4 and all(a[1] < b[1] for a, b in itertools.pairwise(last))
    trained = [one[2] for one in last[1:] if one[2] is not None]
    if not rises or now <= 1.05 * best or len(trained) < 2 or trained[-1] >= trained[0]:
        return None
    return Sighting(
        f"the held-out loss rises ({best:.4f} at step {best_step}, {now:.4f} now) while the training loss falls",
        to_do,
        evidence,
    )


def stalled_data(past: History) -> Sighting | None:
    """Most of the time of the last steps went into waiting for rows."""
    waited, worked = sum(one[0] for one in past.waits), sum(one[1] for one in past.waits)
    if len(past.waits) < 10 or waited < WAITING_SECONDS or waited < MOST_WAITING * (waited + worked):
        return None
    return Sighting(
        f"{100 * waited / (waited + worked):.0f} % of the last {len(past.waits)} steps was waiting for rows",
        "put data.cache on a local disk, and look what else uses the disk or the cores (zhibei doctor)",
        (f"{waited:.1f} s waited, {worked:.1f} s computed",),
    )


def memory_growth(past: History) -> Sighting | None:
    """Memory is higher in each quarter of the run than in the one before."""
    for where, samples in (("GPU", past.gpu_gib), ("host", past.host_gib)):
        levels = quarter_lows(samples)
        if not levels or levels[3] - levels[0] < max(GROWTH_GIB[where], 0.05 * levels[0]):
            continue
        steady = 0.1 * (levels[3] - levels[0])
        if all(b - a > steady for a, b in itertools.pairwise(levels)):
            return Sighting(
                f"memory of the {where} grows: {levels[0]:.2f} GiB at the beginning, {levels[3]:.2f} GiB now",
                "save and resume to start with empty memory; report it with the run directory",
                tuple(f"quarter {number}: at least {level:.2f} GiB" for number, level in enumerate(levels, start=1)),
            )
    return None


def quarter_lows(samples: Samples) -> list[float]:
    """The least value of each quarter of the series; empty while it is short."""
    if len(samples.values) < 64:
        return []
    return [float(part.min()) for part in np.array_split(np.asarray(samples.values), 4)]


def slow_rank(past: History) -> Sighting | None:
    """One rank takes much longer than the others over the last steps."""
    found = slow_ranks(list(past.rank_seconds)) if len(past.rank_seconds) >= 10 else []
    if not found:
        return None
    rank, factor = found[0]
    return Sighting(
        f"rank {rank} takes {factor:.1f} times as long as the others",
        "look at that card (zhibei doctor): heat, power limit, errors, another job on it; or leave it out",
        tuple(f"rank {rank}: {factor:.2f} times the median" for rank, factor in found),
    )


def slow_ranks(seconds: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """(rank, factor over the median of the others), slowest first. `seconds`: per step, the seconds of each rank."""
    table = np.asarray(seconds, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        return []
    usual = np.median(table, axis=0)
    others = np.array([np.median(np.delete(usual, rank)) for rank in range(table.shape[1])])
    is_slow = (usual > SLOW_FACTOR * others) & (usual - others > SLOW_SECONDS)
    return sorted(
        ((int(rank), float(usual[rank] / others[rank])) for rank in np.flatnonzero(is_slow)), key=lambda pair: -pair[1]
    )


def disk_filling(past: History) -> Sighting | None:
    """There is no room left for the next checkpoint and the finished model together."""
    look = past.look
    if "free_bytes" not in look:
        return None
    free, checkpoint, model = (int(look[name]) for name in ("free_bytes", "checkpoint_bytes", "model_bytes"))
    if free >= checkpoint + model:
        return None
    return Sighting(
        f"{free / GIB:.2f} GiB are free; the next checkpoint takes {checkpoint / GIB:.2f}, the model {model / GIB:.2f}",
        "free some space, or lower sft.keep_checkpoints in the next run; what is saved stays as it is",
        is_worth_saving=free > 1.05 * checkpoint,  # with a margin for state.json and its kin
    )


WATCHDOGS: dict[str, Callable[[History], Sighting | None]] = {
    function.__name__: function
    for function in (
        exploding_loss, pinned_loss, dead_gradient, unchanged_weights, skipped_steps, heldout_diverging, loss_spike,
        stalled_data, memory_growth, slow_rank, disk_filling, length_hacking, policy_drift, repetition,
        endless_answers, no_signal,
    )
}  # fmt: skip
"""By the names of the run file's section `watch`."""


def answers(section: WatchSection) -> dict[str, PolicyAnswer]:
    """What the run file wants done, by the name of the watchdog."""
    return {
        "exploding_loss": section.exploding_loss,
        "pinned_loss": section.pinned_loss,
        "dead_gradient": section.dead_gradient,
        "unchanged_weights": section.unchanged_weights,
        "skipped_steps": section.skipped_steps,
        "heldout_diverging": section.heldout_diverging,
        "loss_spike": section.loss_spike,
        "stalled_data": section.stalled_data,
        "memory_growth": section.memory_growth,
        "slow_rank": section.slow_rank,
        "disk_filling": section.disk_filling,
        "length_hacking": section.length_hacking,
        "policy_drift": section.policy_drift,
        "repetition": section.repetition,
        "endless_answers": section.endless_answers,
        "no_signal": section.no_signal,
    }


def watch_over(run: RunFile, *, also: Watch = ignore, resumed: RunDir | None = None) -> Watchdogs:
    """The watchdogs of a run, to be given to its loop; with what is known of it already when it is `resumed`."""
    past = read_metrics(resumed.metrics) if resumed is not None else []
    return Watchdogs(run.watch, also=also, past=past)


class Watchdogs:
    """The `watch` of a loop: hands each record on to `also`, and answers with the gravest alarm.

    `past`: the records of a run that is resumed. Those up to the resumed step are gone through again when the loop
    says where it starts, so that a resumed run is judged by the same history as one that never stopped.
    """

    def __init__(self, section: WatchSection, *, also: Watch = ignore, past: Iterable[Mapping[str, Any]] = ()) -> None:
        self.actions = answers(section)
        self.also, self.past = also, list(past)
        self.history = History()
        self._fired: dict[str, int] = {}
        self._waiting: list[Alarm] = []

    def __call__(self, record: dict[str, Any]) -> Alarm | None:
        further = self.also(record)
        if record.get("event") == "resumed":
            self._recall(int(record["step"]))
        self._waiting += self._alarms_of(record)
        if further is not None:
            self._waiting.append(further)
        self._waiting.sort(key=lambda alarm: SEVERITY.index(alarm.action))
        return self._waiting.pop(0) if self._waiting else None

    def _recall(self, step: int) -> None:
        for record in self.past:
            if int(record.get("step", 0)) <= step:
                self._alarms_of(record)
        self.past = []

    def _alarms_of(self, record: Mapping[str, Any]) -> list[Alarm]:
        """Take a record in. Each watchdog speaks once, and again only long after."""
        self.history.add(record)
        if record.get("kind") not in ("train", "heldout", "look", "iteration"):
            return []
        alarms = []
        for name, action in self.actions.items():
            if action == "off" or self.history.step < self._fired.get(name, -1):
                continue
            seen = WATCHDOGS[name](self.history)
            if seen is not None:
                self._fired[name] = self.history.step + REPEAT_AFTER_STEPS
                alarms.append(Alarm(name, action, **vars(seen)))
        return alarms


def _scatter(values: Sequence[float]) -> float:
    """1.4826 times the median distance from the median: the standard deviation of normal noise, deaf to outliers."""
    if not values:
        return 0.0
    centre = np.median(values)
    return 1.4826 * float(np.median(np.abs(np.asarray(values) - centre)))


def _newest(past: History) -> tuple[str, ...]:
    newest: list[StepLoss] = list(past.losses)[-NOW:]
    return tuple(
        f"step {one.step}: loss {one.loss:.4g}, gradient norm {one.grad_norm:.3g}, rate {one.learning_rate:.2e}"
        for one in newest
    )
