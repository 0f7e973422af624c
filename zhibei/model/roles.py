"""Policy, critic and reference of learning from rewards: adapters on one frozen base, or models of their own.

Knows models, not rewards or loops. Dimensions: N positions of a batch, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model.language_model import BatchLike, LanguageModel
from zhibei.model.load import Need, load_for_training
from zhibei.model.lora import read_adapter_beside

POLICY, CRITIC, REFERENCE = "default", "critic", "reference"
"""Names of the adapters. PEFT's own name for the only one is the policy's, so that its folder is like any other."""


@dataclass(frozen=True)
class Critic:
    """A body (its own, or the policy's under another adapter) and a linear head in fp32 that gives a value per token.

    The head begins at zero: before anything is learned every state is worth 0.
    """

    model: LanguageModel
    head: torch.nn.Linear
    parameters: dict[str, torch.nn.Parameter]

    def values(self, batch: BatchLike) -> torch.Tensor:
        """The value of the state at every position, fp32 [N]; gradients flow into head and body."""
        hidden_ND = self.model.hidden(batch)
        return torch.nn.functional.linear(hidden_ND.float(), self.head.weight, self.head.bias)[:, 0]


@dataclass(frozen=True)
class Roles:
    """The models of one run. In shared mode all of them are `policy.hf` under different adapters."""

    policy: LanguageModel
    critic: Critic | None
    reference: LanguageModel | None
    """A frozen model of its own; None where the reference is the policy's base or an adapter beside it."""
    has_reference: bool = True

    @property
    def own_models(self) -> list[LanguageModel]:
        """The models that learn, each once."""
        has_own = self.critic is not None and self.critic.model is not self.policy
        return [self.policy, self.critic.model] if has_own and self.critic else [self.policy]

    @contextmanager
    def as_critic(self) -> Iterator[Critic]:
        """The critic, ready to be run; afterwards the policy is active again."""
        if self.critic is None:
            raise RuntimeError("this method has no critic")
        with _active(self.policy, CRITIC if self.critic.model is self.policy else POLICY):
            yield self.critic

    @contextmanager
    def as_reference(self) -> Iterator[LanguageModel]:
        """The model that the policy started as; no gradients. Raises RuntimeError when the run keeps none."""
        if not self.has_reference:
            raise RuntimeError("this run keeps no reference")
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
            elif REFERENCE in self.policy.hf.peft_config:
                with _active(self.policy, REFERENCE):
                    yield self.policy
            else:
                with self.policy.without_adapters():
                    yield self.policy


def load_roles(
    section: ModelSection,
    lora: LoraSection,
    need: Need,
    *,
    with_critic: bool,
    with_reference: bool = True,
    shared: bool,
) -> Roles:
    """The models a run of these sections needs.

    shared: one frozen base; policy and critic are adapters on it, the reference is the base with adapters off (or, when
    the policy goes on from an adapter, that adapter frozen). Otherwise the critic is a second model, and the reference
    of a fully trained policy a third. Raises UserError as `load_for_training`.
    """
    if shared and section.method == "full":
        raise UserError(
            "shared models with model.method: full",
            expected="adapters, which policy and critic can each have on one base",
            fix="set model.method: lora, or ppo.models: separate",
            where="ppo.models",
        )
    policy = load_for_training(section, lora, need)
    has_adapters = policy.hf is not policy.inner
    reference = None
    if with_reference and not has_adapters:
        reference = _frozen(load_for_training(section, lora, need))
    elif with_reference and lora.adapter is not None:
        read_adapter_beside(policy.hf, lora.adapter, name=REFERENCE)
        _activate(policy, POLICY)
    critic = None
    if with_critic:
        critic = _shared_critic(policy, seed=need.seed) if shared else _own_critic(section, lora, need)
        _activate(policy, POLICY)
    return Roles(policy, critic, reference, has_reference=with_reference)


def _shared_critic(policy: LanguageModel, *, seed: int) -> Critic:
    """A second adapter like the policy's, freshly drawn."""
    config: Any = copy.deepcopy(policy.hf.peft_config[POLICY])
    config.modules_to_save = None
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        policy.hf.add_adapter(CRITIC, config, autocast_adapter_dtype=False)
    _activate(policy, CRITIC)
    body = {name: parameter for name, parameter in policy.hf.named_parameters() if f".{CRITIC}." in name}
    return _with_head(policy, body)


def _own_critic(section: ModelSection, lora: LoraSection, need: Need) -> Critic:
    model = load_for_training(section, lora, need)
    # The language-model head has no part in values; as a parameter it would never see a gradient.
    head_parameters = {id(parameter) for parameter in model.head.parameters()}
    is_tied = id(model.inner.get_input_embeddings().weight) in head_parameters
    body = {
        name: parameter
        for name, parameter in model.trainable().items()
        if is_tied or id(parameter) not in head_parameters
    }
    return _with_head(model, body)


def _with_head(model: LanguageModel, body: dict[str, torch.nn.Parameter]) -> Critic:
    width = model.config.get_text_config().hidden_size
    head = torch.nn.Linear(width, 1, device=model.device, dtype=torch.float32)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    parameters = {**body, "value_head.weight": head.weight, "value_head.bias": head.bias}
    return Critic(model, head, parameters)  # pyright: ignore[reportArgumentType] (Linear's are Parameters)


def _frozen(model: LanguageModel) -> LanguageModel:
    model.hf.requires_grad_(False)
    model.hf.eval()
    return model


@contextmanager
def _active(model: LanguageModel, name: str) -> Iterator[None]:
    _activate(model, name)
    try:
        yield
    finally:
        _activate(model, POLICY)


def _activate(model: LanguageModel, name: str) -> None:
    """Make one adapter the active one; only its parameters require gradients then."""
    if model.hf is not model.inner and model.hf.active_adapter != name:
        model.hf.set_adapter(name)
