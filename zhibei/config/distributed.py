"""Section distributed of the run file: how several GPUs hold one model. Knows names of old, and no process.

The string under a field is its documentation, as in `zhibei.config.run`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from zhibei.config.training import Section

Sharding = Literal["no_shard", "shard_grad_op", "full_shard", "hybrid"]
"""How a model can be divided among ranks; what each means stands at the field."""

OLD_NAMES: dict[str, tuple[str, str | None]] = {
    # torchrun scripts of Alpaca, FastChat and transformers: --fsdp "full_shard auto_wrap"
    "full_shard auto_wrap": ("full_shard", None),
    "full_shard auto_wrap offload": ("full_shard", "all"),
    "full_shard offload auto_wrap": ("full_shard", "all"),
    "shard_grad_op auto_wrap": ("shard_grad_op", None),
    "hybrid_shard": ("hybrid", None),
    "hybrid_shard auto_wrap": ("hybrid", None),
    "fsdp": ("full_shard", None),
    "fsdp2": ("full_shard", None),
    # DeepSpeed
    "zero1": ("shard_grad_op", None),
    "zero2": ("shard_grad_op", None),
    "zero3": ("full_shard", None),
    "stage_2": ("shard_grad_op", None),
    "stage_3": ("full_shard", None),
    "zero3_offload": ("full_shard", "all"),
    # ColossalChat's --strategy
    "naive": ("no_shard", None),
    "ddp": ("no_shard", None),
    "colossalai_zero2": ("shard_grad_op", None),
    "colossalai_zero2_cpu": ("shard_grad_op", "all"),
    "colossalai_gemini": ("full_shard", None),
    "colossalai_gemini_cpu": ("full_shard", "all"),
    "gemini": ("full_shard", None),
}
"""What other tools call it, and the offloading that goes with it."""


def meant_by(name: str) -> tuple[str, str | None] | None:
    """(sharding, offload) that another tool's name stands for; None for a name of ours or of nobody."""
    return OLD_NAMES.get(" ".join(name.replace("-", "_").lower().split()))


class DistributedSection(Section):
    """How several processes (one for each GPU) hold one model; read when there are several, as `zhibei launch` and
    torchrun start them. Steps, rows and rates do not depend on it."""

    sharding: Literal["auto", "no_shard", "shard_grad_op", "full_shard", "hybrid"] = "auto"
    """no_shard: every GPU has the whole model. shard_grad_op: gradients and optimiser are divided, weights are gathered
    once per pass. full_shard: weights are divided too and gathered layer by layer. hybrid: full_shard within a node,
    copies across nodes. auto: the fastest that fits. What FSDP, DeepSpeed and ColossalChat call these is understood
    (`full_shard auto_wrap`, `zero2`, `colossalai_gemini`, `ddp`, ...); layers to wrap are found in the model."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """optimizer: masters and moments lie in host memory. all: with divided weights, these too between uses."""
    patience_seconds: Annotated[float, Field(gt=0)] = 600
    """How long a rank waits for the others before it says which one is missing."""

    @model_validator(mode="before")
    @classmethod
    def _known_by_another_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("sharding"), str):
            return given
        meant = meant_by(given["sharding"])
        if meant is None:
            return given
        sharding, offload = meant
        return {**({"offload": offload} if offload else {}), **given, "sharding": sharding}
