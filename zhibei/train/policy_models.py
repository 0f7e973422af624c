"""The models of a run that learns from rewards: loaded, divided among ranks, with their optimisers. No loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from zhibei.config.policy import PolicySection, PpoSection, RatioSection
from zhibei.config.run import RunFile
from zhibei.model.dropout import without_dropout
from zhibei.model.load import Need
from zhibei.model.ranks import current
from zhibei.model.roles import Cast, Roles, load_roles
from zhibei.model.savings import checkpoint_activations, compile_layers
from zhibei.train.materials import divide, divides
from zhibei.train.optimizer import make_optimizer
from zhibei.train.policy_loss import head_of, policy_loss, shape_of, value_loss
from zhibei.train.step import Stepper
from zhibei.train.token_loss import token_loss

KL_IN_LOSS = ("grpo", "dr_grpo")
"""Methods whose KL to the reference is part of the loss; the others take it off the reward."""


def roles_of(
    run: RunFile, section: PolicySection, judge: Path | None, *, device: torch.device, precision: str
) -> Roles:
    """The models that a stage needs. Without a weight on the KL there is no reference to keep. `judge`: the adapter
    folder of a reward model that lies on the policy's base."""
    need = Need(
        device=device,
        precision=precision,
        packing=run.data.packing,
        longest_row=run.data.max_tokens + section.max_new_tokens,
        seed=run.seed,
        is_skeleton=divides(run) and not current().is_first,
        loaded_on=torch.device("cpu") if divides(run) else None,
    )
    is_ppo = isinstance(section, PpoSection)
    cast = Cast(
        has_critic=is_ppo,
        has_reference=is_ppo or getattr(section, "kl_coefficient", 0.0) > 0,
        is_shared=is_ppo and section.models == "shared",
        judge=judge,
        critic_from=section.reward_model if is_ppo and section.critic_from == "reward_model" else None,
    )
    roles = load_roles(run.model, run.lora, need, cast)
    for model in roles.own_models:
        without_dropout(model)
    return roles


def steppers(run: RunFile, section: PolicySection, roles: Roles) -> tuple[Stepper, Stepper | None]:
    """Optimisers of policy and critic, with their losses."""
    ranks, on_host = current(), run.distributed.offload != "none"
    in_loss = run.grpo.kl_coefficient if run.stage == "grpo" and run.grpo.method in KL_IN_LOSS else 0.0
    make_ready(run, roles)
    learning = roles.policy.trainable()
    optimizer = make_optimizer(learning, section, on_host=on_host)
    if isinstance(section, RatioSection):
        loss = policy_loss(shape_of(section, roles.policy, kl_in_loss=in_loss))
    else:
        loss = token_loss(head_of(roles.policy))
    stepper = Stepper(
        roles.policy, optimizer, loss, max_grad_norm=section.max_grad_norm, parameters=learning, ranks=ranks
    )
    if roles.critic is None:
        return stepper, None
    with roles.as_critic() as critic:
        learning = critic.parameters
        optimizer = make_optimizer(learning, section, on_host=on_host)
        loss = value_loss(critic, clip=run.ppo.value_clip)
        return stepper, Stepper(
            critic.model, optimizer, loss, max_grad_norm=section.max_grad_norm, parameters=learning, ranks=ranks
        )


def make_ready(run: RunFile, roles: Roles) -> None:
    """Divide the models among ranks and recompute activations where asked for. Layers are compiled only when the run
    file says so: prompts and answers have other lengths in every pass."""
    if divides(run):
        roles.divide(partial(divide, run), current())
    how = run.model.activation_checkpointing
    for model in roles.own_models:
        compiled = compile_layers(model, run.model.compile is True)
        checkpoint_activations(model, "none" if how == "auto" else how, compiled=compiled)
