"""Which prompts an iteration answers: a pure function of seed and iteration. Knows numbers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PromptCursor:
    """The stream of prompts, epoch after epoch, each in a new order; every iteration takes the next `per_iteration`.

    The stream runs over epoch borders, so an iteration may take more prompts than there are.
    """

    num_prompts: int
    per_iteration: int
    epochs: float
    max_steps: int | None
    seed: int
    shuffle: bool = True

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run; each is whole, so the last may begin another pass."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, -(-round(self.epochs * self.num_prompts) // self.per_iteration))

    def numbers(self, iteration: int) -> np.ndarray:
        """Prompt numbers of iteration `iteration` (from 0)."""
        positions = np.arange(iteration * self.per_iteration, (iteration + 1) * self.per_iteration)
        epochs = positions // self.num_prompts
        return np.concatenate(
            [self._order(int(e))[positions[epochs == e] % self.num_prompts] for e in np.unique(epochs)]
        )

    def epoch_at(self, iteration: int) -> float:
        """Passes over the prompts once so many iterations are done."""
        return iteration * self.per_iteration / self.num_prompts

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_prompts)
