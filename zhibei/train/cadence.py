"""When a run evaluates and saves. Knows step numbers only."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_LOOKS = (3, 5, 10)
LOOK_EVERY = 50


@dataclass(frozen=True)
class Cadence:
    """Steps between evaluations and saves (config.resolve plans them); 0 means only at the end."""

    evaluate_every: int
    save_every: int
    num_steps: int

    def evaluates_after(self, step: int) -> bool:
        """`step` optimiser steps are done."""
        return step == self.num_steps or bool(self.evaluate_every and step % self.evaluate_every == 0)

    def saves_after(self, step: int) -> bool:
        return step == self.num_steps or bool(self.save_every and step % self.save_every == 0)


def looks_after(step: int) -> bool:
    """Whether gradients, weights and the disk are looked at after `step`: early, when most faults show, then seldom
    (a look waits for the device)."""
    return step in FIRST_LOOKS or step % LOOK_EVERY == 0
