"""Policy, critic, reference and reward model: adapters on one frozen base, or models of their own.

Knows models, not rewards or loops. Dimensions: N positions of a batch, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model.language_model import BatchLike, LanguageModel
from zhibei.model.load import Need, load_for_training
from zhibei.model.lora import add_adapters, read_adapter_beside
from zhibei.model.ranks import Ranks
from zhibei.model.score_adapter import put_on, read_score_adapter
from zhibei.model.score_model import load_whole_score_model, wrapped

POLICY, CRITIC, REFERENCE, JUDGE = "default", "critic", "reference", "judge"
"""Names of the adapters. PEFT's own name for the only one is the policy's, so that its folder is like any other."""


@dataclass(frozen=True)
class Critic:
    """A body (its own, or the policy's under another adapter) and a linear head in fp32 that gives a value per token.

    The head begins at zero, so that every state is worth 0 before anything is learned, or as that of a reward model.
    """

    model: LanguageModel
    head: torch.nn.Linear
    parameters: dict[str, torch.nn.Parameter]

    def values(self, batch: BatchLike) -> torch.Tensor:
        """The value of the state at every position, fp32 [N]; gradients flow into head and body."""
        hidden_ND = self.model.hidden(batch)
        return torch.nn.functional.linear(hidden_ND.float(), self.head.weight, self.head.bias)[:, 0]


@dataclass(frozen=True)
class Cast:
    """Which roles a run has. `judge`: the adapter folder of a reward model that lies on the run's base; `critic_from`:
    the reward model that the critic begins as."""

    has_critic: bool = False
    has_reference: bool = True
    is_shared: bool = False
    judge: Path | None = None
    critic_from: str | None = None


@dataclass(frozen=True)
class Roles:
    """The models of one run. In shared mode all of them are `policy.hf` under different adapters."""

    policy: LanguageModel
    critic: Critic | None
    reference: LanguageModel | None
    """A frozen model of its own; None where the reference is the policy's base or an adapter beside it."""
    has_reference: bool = True
    judge: LanguageModel | None = None
    """The reward model on the policy's base: the same body, and a head of its own."""

    @property
    def own_models(self) -> list[LanguageModel]:
        """The models that learn, each once."""
        has_own = self.critic is not None and self.critic.model is not self.policy
        return [self.policy, self.critic.model] if has_own and self.critic else [self.policy]

    def divide(self, divide: Callable[[LanguageModel], None], ranks: Ranks) -> None:
        """Have every model divided among ranks. The critic's parameters are others afterwards, and what every rank
        keeps whole (its head) is rank 0's."""
        if self.critic is not None:
            for parameter in self.critic.parameters.values():
                parameter.requires_grad_(True)  # also those of an adapter that is not in use now
        for model in [*self.own_models, *filter(None, [self.reference])]:
            divide(model)
        if self.critic is not None:
            now = dict(self.critic.model.hf.named_parameters())
            self.critic.parameters.update({name: now[name] for name in self.critic.parameters if name in now})
            for parameter in self.critic.head.parameters():
                ranks.same_as_first(parameter.data)
        if self.judge is not None:
            self.judge.place, self.judge.learning_adapters = self.policy.place, self.policy.learning_adapters
            ranks.same_as_first(self.judge.head.weight.data)

    @contextmanager
    def as_critic(self) -> Iterator[Critic]:
        """The critic, ready to be run; afterwards the policy is active again."""
        if self.critic is None:
            raise RuntimeError("this method has no critic")
        with _active(self.policy, CRITIC if self.critic.model is self.policy else POLICY):
            yield self.critic

    @contextmanager
    def as_judge(self) -> Iterator[LanguageModel]:
        """The reward model on the policy's base, ready to score; no gradients. RuntimeError where it is not there."""
        if self.judge is None:
            raise RuntimeError("no reward model lies on the policy's base")
        with torch.no_grad(), _active(self.policy, JUDGE):
            yield self.judge

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


def load_roles(section: ModelSection, lora: LoraSection, need: Need, cast: Cast) -> Roles:
    """The models a run of these sections needs.

    shared: one frozen base; policy and critic are adapters on it, the reference is the base with adapters off (or, when
    the policy goes on from an adapter, that adapter frozen). Otherwise the critic is a second model, and the reference
    of a fully trained policy a third. Raises UserError as `load_for_training`.
    """
    if cast.is_shared and section.method == "full":
        raise UserError(
            "shared models with model.method: full",
            expected="adapters, which policy and critic can each have on one base",
            fix="set model.method: lora, or ppo.models: separate",
            where="ppo.models",
        )
    policy = load_for_training(section, lora, need)
    has_adapters = policy.hf is not policy.inner
    reference = critic = judge = None
    if cast.has_reference and not has_adapters:
        reference = _frozen(load_for_training(section, lora, need))
    elif cast.has_reference and lora.adapter is not None:
        read_adapter_beside(policy.hf, lora.adapter, name=REFERENCE)
        policy.activate(POLICY)
    if cast.has_critic:
        make = _shared_critic if cast.is_shared else _own_critic
        critic = make(policy, section, lora, need, cast)
        policy.activate(POLICY)
    if cast.judge is not None:
        judge = _judge_on(policy, cast.judge, need.device)
    return Roles(policy, critic, reference, has_reference=cast.has_reference, judge=judge)


def _judge_on(policy: LanguageModel, folder: Path, device: torch.device) -> LanguageModel:
    head = put_on(policy, read_score_adapter(folder), name=JUDGE, device=device)
    # Which adapter learns follows from which is active.
    policy.activate(JUDGE)
    policy.activate(POLICY)
    return LanguageModel(policy.hf, attention_name=policy.attention_name, longest_row=policy.longest_row, head=head)


def _shared_critic(policy: LanguageModel, _section: ModelSection, _lora: LoraSection, need: Need, cast: Cast) -> Critic:
    """A second adapter like the policy's, freshly drawn, or that of the reward model."""
    start = None
    if cast.critic_from is not None:
        if cast.judge is None:
            raise _no_adapter_here(cast.critic_from)
        start = put_on(policy, read_score_adapter(cast.judge), name=CRITIC, device=need.device)
    else:
        config: Any = copy.deepcopy(policy.hf.peft_config[POLICY])
        config.modules_to_save = None
        config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(need.seed + 1)
            policy.hf.add_adapter(CRITIC, config, autocast_adapter_dtype=False)
    policy.activate(CRITIC)
    body = {name: parameter for name, parameter in policy.hf.named_parameters() if f".{CRITIC}." in name}
    return _with_head(policy, body, start, need.device)


def _own_critic(_policy: LanguageModel, section: ModelSection, lora: LoraSection, need: Need, cast: Cast) -> Critic:
    """A model of its own: like the policy's, or the reward model as it is, with an adapter of it merged."""
    if cast.critic_from is not None:
        model = load_whole_score_model(cast.critic_from, section, need)
        if section.method != "full":
            fresh = lora.model_copy(update={"adapter": None})
            hf = add_adapters(model.hf, fresh, seed=need.seed + 1, task="SEQ_CLS")
            model = wrapped(hf, model.attention_name, longest_row=need.longest_row)
        return _with_head(model, _without_head(model), model.head, need.device)
    model = load_for_training(section, lora, need)
    return _with_head(model, _without_head(model), None, need.device)


def _without_head(model: LanguageModel) -> dict[str, torch.nn.Parameter]:
    """What learns but for the model's own head, which has no part in values: it would never see a gradient. A head that
    is tied to the embeddings is a part of the body."""
    own = {id(parameter) for parameter in model.head.parameters()}
    is_tied = id(model.inner.get_input_embeddings().weight) in own
    return {name: parameter for name, parameter in model.trainable().items() if is_tied or id(parameter) not in own}


def _no_adapter_here(path: str) -> UserError:
    return UserError(
        f"the reward model {path} is no adapter on this run's base, and the critic shares that base",
        expected="a run of stage reward with model.method: lora on the same base (by its weights)",
        fix="train such a reward model, or set ppo.models: separate, or ppo.critic_from: zero",
        where="ppo.critic_from",
    )


def _with_head(
    model: LanguageModel, body: dict[str, torch.nn.Parameter], start: torch.nn.Linear | None, device: torch.device
) -> Critic:
    width = model.config.get_text_config().hidden_size
    head = torch.nn.Linear(width, 1, device=device, dtype=torch.float32)
    torch.nn.init.zeros_(head.bias)
    if start is None:
        torch.nn.init.zeros_(head.weight)
    elif not start.weight.is_meta:  # where it is, rank 0 has the values
        with torch.no_grad():
            head.weight.copy_(start.weight)
    parameters = {**body, "value_head.weight": head.weight, "value_head.bias": head.bias}
    return Critic(model, head, parameters)  # pyright: ignore[reportArgumentType] (Linear's are Parameters)


def _frozen(model: LanguageModel) -> LanguageModel:
    model.hf.requires_grad_(False)
    model.hf.eval()
    return model


@contextmanager
def _active(model: LanguageModel, name: str) -> Iterator[None]:
    model.activate(name)
    try:
        yield
    finally:
        model.activate(POLICY)
