"""PPO as one writes it with transformers and PEFT alone: `generate`, padded batches, whole logits. Knows no zhibei.

One frozen base with three adapters (policy, critic, reward), the reference is the base with adapters off. The sizes are
those of `benchmarks/ppo.py`; what differs is only how the work is done.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """What both sides do in one iteration."""

    answers: int
    minibatches: int
    prompt_tokens: int
    new_tokens: int
    rank: int = 16
    learning_rate: float = 1e-5
    kl: float = 0.05
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95


class PlainPpo:
    """The models, and one iteration of learning from a reward."""

    def __init__(self, folder: str, sizes: Sizes, *, micro_rows: int, generate_rows: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.sizes, self.micro_rows, self.generate_rows = sizes, micro_rows, generate_rows
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        base: Any = loaded.to(self.device)
        adapter = LoraConfig(
            r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(base, adapter)
        self.model.add_adapter("critic", adapter)
        self.model.add_adapter("reward", adapter)
        width = base.config.hidden_size
        self.value_head = torch.nn.Linear(width, 1, device=self.device)
        self.reward_head = torch.nn.Linear(width, 1, device=self.device)
        critic = [p for name, p in self.model.named_parameters() if ".critic." in name]
        policy = [p for name, p in self.model.named_parameters() if ".default." in name]
        self.policy_optimizer = torch.optim.AdamW(policy, lr=sizes.learning_rate)
        self.critic_optimizer = torch.optim.AdamW([*critic, *self.value_head.parameters()], lr=10 * sizes.learning_rate)
        self.trained = {"default": policy, "critic": critic}

    def activate(self, name: str) -> None:
        self.model.set_adapter(name)

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.model.base_model.model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state

    def logps(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Log-probability of each answer token [B, new_tokens]."""
        logits = self.model(input_ids=tokens_BT, use_cache=False).logits[:, self.sizes.prompt_tokens - 1 : -1].float()
        targets = tokens_BT[:, self.sizes.prompt_tokens :, None]
        return logits.log_softmax(-1).gather(-1, targets)[..., 0]

    def values(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(tokens_BT)[:, self.sizes.prompt_tokens - 1 : -1]
        return self.value_head(hidden.float())[..., 0]

    def over_rows(self, tokens_BT: torch.Tensor, compute: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([compute(rows) for rows in tokens_BT.split(self.micro_rows)])

    def iteration(self, prompts_BT: torch.Tensor) -> dict[str, float]:
        """Write, score, learn; seconds of each."""
        started = clock(self.device)
        self.model.eval()
        self.activate("default")
        with torch.no_grad():
            written = [
                self.model.generate(
                    input_ids=rows,
                    attention_mask=torch.ones_like(rows),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=self.sizes.new_tokens,
                    max_new_tokens=self.sizes.new_tokens,
                    pad_token_id=0,
                )
                for rows in prompts_BT.to(self.device).split(self.generate_rows)
            ]
        tokens = torch.cat(written)
        after_writing = clock(self.device)
        self.activate("reward")
        rewards = self.over_rows(tokens, lambda rows: self.reward_head(self.hidden(rows)[:, -1].float())[:, 0])
        self.activate("critic")
        values = self.over_rows(tokens, self.values)
        self.activate("default")
        old = self.over_rows(tokens, self.logps)
        with self.model.disable_adapter():
            reference = self.over_rows(tokens, self.logps)
        after_scoring = clock(self.device)
        advantages, returns = self.advantages(rewards, values, old - reference)
        self.learn(tokens, old, values, advantages, returns)
        ended = clock(self.device)
        return {
            "writing_seconds": after_writing - started,
            "scoring_seconds": after_scoring - after_writing,
            "learning_seconds": ended - after_scoring,
            "seconds": ended - started,
        }

    def advantages(
        self, rewards: torch.Tensor, values: torch.Tensor, kl: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        per_token = -self.sizes.kl * kl
        per_token[:, -1] += rewards
        advantages, last = torch.zeros_like(values), torch.zeros_like(rewards)
        for t in reversed(range(values.shape[1])):
            following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
            delta = per_token[:, t] + self.sizes.gamma * following - values[:, t]
            last = delta + self.sizes.gamma * self.sizes.lam * last
            advantages[:, t] = last
        returns = advantages + values
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns

    def learn(self, tokens: torch.Tensor, *figures: torch.Tensor) -> None:
        self.model.train()
        order = torch.randperm(len(tokens), device=tokens.device)
        for chosen in order.chunk(self.sizes.minibatches):
            self.step("critic", chosen, self.critic_optimizer, tokens, figures)
            self.step("default", chosen, self.policy_optimizer, tokens, figures)

    def step(self, role: str, chosen: torch.Tensor, optimizer: Any, tokens: torch.Tensor, figures: Any) -> None:
        self.activate(role)
        loss_of = {"critic": self.critic_loss, "default": self.policy_loss}[role]
        for rows in chosen.split(self.micro_rows):
            loss = loss_of(tokens[rows], *(figure[rows] for figure in figures))
            (loss * len(rows) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(self.trained[role], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def policy_loss(self, tokens: torch.Tensor, old: torch.Tensor, _values: Any, advantages: Any, _returns: Any) -> Any:
        ratio = (self.logps(tokens) - old).exp()
        bounded = ratio.clamp(1 - self.sizes.clip, 1 + self.sizes.clip)
        return -torch.minimum(ratio * advantages, bounded * advantages).mean()

    def critic_loss(self, tokens: torch.Tensor, _old: Any, values: torch.Tensor, _advantages: Any, returns: Any) -> Any:
        found = self.values(tokens)
        near = values + (found - values).clamp(-self.sizes.clip, self.sizes.clip)
        return 0.5 * torch.maximum((found - returns) ** 2, (near - returns) ** 2).mean()


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
