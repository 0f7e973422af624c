"""How many threads answer fastest on this processor: measured, since small models lose by each. Knows no server.

A step of a small model is hundreds of products, each over in microseconds, and handing each to several threads costs
more than it saves, the more where those threads share their cores with others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate

TRIAL_TOKENS, TRIALS = 6, 3
SLOW_SECONDS = 1.0
"""A model that takes longer over a trial has work for all threads, and trials of it would hold its user up."""
WORTH = 1.1
"""How much faster more threads must be: what they leave free, others on the machine use."""


def threads_for(model: Any, *, rows: int) -> int | None:
    """The fewest threads with which a causal model writes `rows` answers about as fast as with any other number; None
    where there is nothing to choose: not on a CPU, or OMP_NUM_THREADS says it. Takes a few trials; changes nothing.
    """
    most = torch.get_num_threads()
    if model.get_input_embeddings().weight.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most == 1:
        return None
    options = SamplingOptions(max_new_tokens=TRIAL_TOKENS, temperature=0, batch_rows=rows)

    def write() -> None:
        generate(model, [[0] * TRIAL_TOKENS] * rows, options=options, stop_ids=[])

    try:
        return chosen(most, lambda threads: _seconds(write, threads))
    finally:
        torch.set_num_threads(most)


def chosen(most: int, seconds_of: Callable[[int], float]) -> int:
    """The fewest of `most`, half of them, a quarter and so on, whose time is near the best."""
    seconds = {most: seconds_of(most)}
    if seconds[most] > SLOW_SECONDS:
        return most
    threads = most
    # Fewer than those that are too few are not tried: each half would take twice as long.
    while threads > 1 and seconds[threads] <= WORTH * min(seconds.values()):
        threads //= 2
        seconds[threads] = seconds_of(threads)
    best = min(seconds.values())
    return min(number for number, taken in seconds.items() if taken <= WORTH * best)


def _seconds(write: Callable[[], None], threads: int) -> float:
    """The shortest of some trials; one that is slow is not repeated."""
    torch.set_num_threads(threads)
    taken = []
    for _ in range(TRIALS):
        begun = time.perf_counter()
        write()
        taken.append(time.perf_counter() - begun)
        if taken[-1] > SLOW_SECONDS:
            break
    return min(taken)
