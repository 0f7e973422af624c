"""The watchdogs of learning from rewards: what the health board shows before the reward does. Knows records, no loop.

Each is a function of the history of a run. They compare the newest iterations with the first ones of the same run, and
name the last iteration that was still like those: a roll-back goes there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from zhibei.doctor.history import History
from zhibei.doctor.sighting import Sighting

NOW = 3
"""Iterations that are looked at together; one alone may be an accident."""
FAR_NATS_PER_TOKEN = 1.0
NEGATIVE_NATS_PER_TOKEN = -0.1
LONGER = 1.5
LENGTH_CORRELATION = 0.5
REPEATED_SHARE = 0.5
CUT_SHARE = 0.9


def length_hacking(past: History) -> Sighting | None:
    """Answers grow, the reward grows, and within an iteration the longer answers have the higher rewards."""
    first, now = _ends(past)
    if not first:
        return None
    # A reward can be won within two iterations: the shortest of the first ones is where the run began.
    short, low = (min(record[name] for record in first) for name in ("length_mean", "reward_mean"))
    length, good = _mean(now, "length_mean"), _last(past, lambda record: record["length_mean"] < 1.2 * short)
    # Once all answers are as long as they may be, nothing correlates any more: what counts is how they came there.
    growing = [one for one in past.iterations if int(one["step"]) >= (good or 0)][: 2 * NOW]
    known = [record for record in growing if record.get("length_correlation") is not None]
    if length < LONGER * short or _mean(now, "reward_mean") <= low or not known:
        return None
    correlation = _mean(known, "length_correlation")
    if correlation < LENGTH_CORRELATION:
        return None
    return Sighting(
        f"answers are {length / short:.1f} times as long as at the beginning, and the reward goes with length "
        f"(correlation {correlation:.2f})",
        "look at the samples; take length out of the reward, raise kl_coefficient, or lower max_new_tokens",
        _shown(now, "length_mean", "reward_mean", "length_correlation"),
        good_until=good,
    )


def policy_drift(past: History) -> Sighting | None:
    """The policy is far from its reference although that costs reward, or the KL is negative, which it cannot be."""
    first, now = _ends(past)
    if not first or any("kl" not in record or not record.get("kl_coefficient") for record in now):
        return None
    drift = _mean(now, "kl")
    if NEGATIVE_NATS_PER_TOKEN <= drift <= FAR_NATS_PER_TOKEN:
        return None
    negative = drift < 0
    return Sighting(
        f"the KL to the reference is {drift:.2f} nats per token"
        + (": answers are drawn from another distribution than the one that is scored" if negative else ""),
        "draw from the whole distribution (top_k: 0, top_p: 1)"
        if negative
        else "raise kl_coefficient or set ppo.kl_target, or lower learning_rate",
        _shown(now, "kl", "kl_k3", "reward_mean"),
        good_until=_last(past, lambda record: abs(record.get("kl", 0.0)) < abs(drift) / 2),
    )


def repetition(past: History) -> Sighting | None:
    """Half of what the answers say, they have said before; at the beginning they did not."""
    first, now = _ends(past)
    if not first:
        return None
    before, share = _means(first, now, "repeated_share")
    if share < REPEATED_SHARE or share < before + 0.3:
        return None
    return Sighting(
        f"{100 * share:.0f} % of each answer is repetition ({100 * before:.0f} % at the beginning)",
        "look at the samples; raise kl_coefficient, or lower learning_rate",
        _shown(now, "repeated_share", "reward_mean", "entropy"),
        good_until=_last(past, lambda record: record["repeated_share"] < before + 0.1),
    )


def endless_answers(past: History) -> Sighting | None:
    """Answers used to end by themselves, and now nearly all are cut off."""
    first, now = _ends(past)
    if not first:
        return None
    before, share = (1 - value for value in _means(first, now, "ended_share"))
    if share < CUT_SHARE or before > 0.5:
        return None
    return Sighting(
        f"{100 * share:.0f} % of the answers are cut off at the longest length ({100 * before:.0f} % at the beginning)",
        "set missing_terminator_penalty, or raise kl_coefficient",
        _shown(now, "ended_share", "length_mean", "reward_mean"),
        good_until=_last(past, lambda record: record["ended_share"] > 0.5),
    )


def no_signal(past: History) -> Sighting | None:
    """Every answer of the last iterations had the same reward, so there was nothing to learn."""
    now = list(past.iterations)[-NOW:]
    if len(now) < NOW or any(record["reward_max"] - record["reward_min"] > 1e-8 for record in now):
        return None
    count = sum(int(record["answers"]) for record in now)
    return Sighting(
        f"all {count} answers of the last {NOW} iterations had the same reward, {now[-1]['reward_mean']:.3g}",
        "look at the samples and at the reward; easier or harder prompts, or a reward that tells answers apart",
        _shown(now, "reward_mean", "length_mean"),
    )


def _ends(past: History) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    """The first iterations and the newest; empty while they are not apart."""
    every = past.iterations
    return (every[:NOW], every[-NOW:]) if len(every) >= 2 * NOW else ((), ())


def _mean(records: Iterable[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([record[name] for record in records]))


def _means(first: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]], name: str) -> tuple[float, float]:
    return _mean(first, name), _mean(now, name)


def _last(past: History, is_good: Any) -> int | None:
    """The newest iteration before those of now that was still good."""
    good = [int(record["step"]) for record in past.iterations[:-NOW] if is_good(record)]
    return good[-1] if good else None


def _shown(records: Iterable[Mapping[str, Any]], *names: str) -> tuple[str, ...]:
    return tuple(
        f"iteration {record['step']}: "
        + ", ".join(f"{name.replace('_', ' ')} {record[name]:.3g}" for name in names if record.get(name) is not None)
        for record in records
    )
