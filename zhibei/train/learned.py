"""What the optimiser steps of one iteration did, as figures of that iteration. Knows records of steps only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zhibei.train.health import mean
from zhibei.train.step import StepRecord


@dataclass
class Learned:
    """Records of the steps of policy and critic, in order."""

    policy: list[StepRecord] = field(default_factory=list)
    critic: list[StepRecord] = field(default_factory=list)
    stopped_early: bool = False
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Means over the steps; the distance to the policy that wrote the answers is that of the last step."""
        found: dict[str, Any] = {"policy_steps": len(self.policy), "stopped_early": self.stopped_early}
        if self.policy:
            names = self.policy[0].figures
            found |= {
                "policy_loss": mean([record.loss for record in self.policy]),
                "grad_norm": mean([record.grad_norm for record in self.policy]),
                **{name: mean([record.figures[name] for record in self.policy]) for name in names},
                "skipped": sum(record.was_skipped for record in self.policy),
            }
            if "kl_to_writer" in names:
                found["kl_to_writer"] = self.policy[-1].figures["kl_to_writer"]
        if self.critic:
            found |= {
                "critic_loss": mean([record.loss for record in self.critic]),
                "critic_grad_norm": mean([record.grad_norm for record in self.critic]),
            }
        return found
