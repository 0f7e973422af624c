"""When a run evaluates and saves. Knows step numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from zhibei.config.run import TrainingSection

EVALUATIONS_PER_RUN = 10


@dataclass(frozen=True)
class Cadence:
    """Steps between evaluations and saves; 0 means only at the end."""

    evaluate_every: int
    save_every: int
    num_steps: int

    @staticmethod
    def of(section: TrainingSection, num_steps: int) -> Cadence:
        """The run file's numbers, or about ten evaluations per run and a save with each."""
        tenth = max(1, -(-num_steps // EVALUATIONS_PER_RUN))
        evaluate = tenth if section.evaluate_every is None else section.evaluate_every
        save = (evaluate or tenth) if section.save_every is None else section.save_every
        return Cadence(evaluate, save, num_steps)

    def evaluates_after(self, step: int) -> bool:
        """`step` optimiser steps are done."""
        return step == self.num_steps or bool(self.evaluate_every and step % self.evaluate_every == 0)

    def saves_after(self, step: int) -> bool:
        return step == self.num_steps or bool(self.save_every and step % self.save_every == 0)
