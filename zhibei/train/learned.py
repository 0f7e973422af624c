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

    def figures(self) -> dict[str, Any]:
        """Means over the steps; the distance to the policy that wrote the answers is that of the last step."""
        found: dict[str, Any] = {"policy_steps": len(self.policy), "stopped_early": self.stopped_early}
        if self.policy:
            found |= {
                "policy_loss": mean([record.loss for record in self.policy]),
                "grad_norm": mean([record.grad_norm for record in self.policy]),
                "clip_share": mean([record.figures["clip_share"] for record in self.policy]),
                "entropy": mean([record.figures["entropy"] for record in self.policy]),
                "kl_to_writer": self.policy[-1].figures["kl_to_writer"],
                "skipped": sum(record.was_skipped for record in self.policy),
            }
        if self.critic:
            found |= {
                "critic_loss": mean([record.loss for record in self.critic]),
                "critic_grad_norm": mean([record.grad_norm for record in self.critic]),
            }
        return found
