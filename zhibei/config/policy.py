"""Sections of the stages that learn from a reward on the model's own answers: ppo, grpo, raft. Knows no loop.

The string under a field is its documentation, as in `zhibei.config.run`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from zhibei.config.training import AnsweringSection, Positive

NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class PolicySection(AnsweringSection):
    """What these stages share. One step of a run is one iteration: answers are written, scored and learned from."""

    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the training prompts. Ignored when max_steps is given."""
    max_steps: Positive | None = None
    """Stop after so many iterations, whatever epochs says."""
    global_batch: Positive = 128
    """Answers per optimiser step on all GPUs together."""
    minibatches: Positive = 2
    """Optimiser steps per pass over an iteration's answers; an iteration writes global_batch * minibatches answers."""
    inner_epochs: Positive = 1
    """Passes over an iteration's answers before new ones are written."""
    evaluate_every: Annotated[int, Field(ge=0)] | None = None
    """Iterations between evaluations (the mean reward of held-out prompts); by default ten per run; 0 only at the
    end."""
    evaluate_rows: Positive = 64
    """At most so many held-out prompts are answered per evaluation."""
    early_stop_patience: Positive | None = None
    """Stop after so many evaluations without a better held-out reward."""
    save_every: Annotated[int, Field(ge=0)] | None = None
    """Iterations between checkpoints; by default as often as evaluations; 0 only at the end."""
    keep_best: bool = True
    """Write the model of the best held-out reward as the final model, instead of the last one. With a reward_model the
    last one is written unless this is set: a learned reward goes on rising where the true one falls
    (arXiv:2210.10760, section 3), so its best is where it is exploited most."""
    reward: str | None = None
    """What scores answers, beside or instead of reward_model: `number` (the last number equals the reference's, as in
    GSM8K), `exact`, `contains` (the reference), `regex:PATTERN`, `python:MODULE_OR_FILE:FUNCTION`, or an http
    address."""
    reward_model: str | None = None
    """A run directory of stage reward, or a folder with a reward model."""
    min_reward_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.55
    """A reward model that puts fewer of its own held-out pairs in order is refused: what it cannot tell apart, a policy
    learns to exploit. 0 takes any."""
    reward_seconds: Annotated[float, Field(gt=0)] = 60
    """A reward function that takes longer for one batch of answers ends the run (saved, to be resumed). A server is
    asked three more times before that."""
    reward_clip: NotNegative = 0
    """Rewards are bounded to +- this; 0 is off."""
    normalize_rewards: bool = False
    """Divide rewards by their running standard deviation after taking off their running mean."""
    missing_terminator_penalty: NotNegative = 0
    """Taken off the reward of an answer that was cut off at max_new_tokens."""
    rollout_batch: Positive = 32
    """Answers written at the same time on one GPU: memory and speed, never the answers."""
    engine: Literal["ours", "vllm"] = "ours"
    """What writes answers. ours: the policy's own weights, no copy. vllm: vLLM, where it is installed (CUDA), with a
    copy of the weights that is brought up to date before each writing."""
    vllm_memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the GPU's memory that vLLM may take, its weights included."""
    max_new_tokens: Positive = 128
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling and of the log-probabilities alike."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens only; 0 is off. Anything but pure sampling biases the ratio."""
    top_p: Share = 1.0
    """Sample from the likeliest tokens of this total probability only; 1 is off."""


class RatioSection(PolicySection):
    """What the stages share that weigh tokens by how much likelier they have become since they were written."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The probability ratio counts down to 1 - clip_low (arXiv:1707.06347)."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """The probability ratio counts up to 1 + clip_high; more than clip_low keeps rare tokens (arXiv:2503.14476)."""
    dual_clip: Annotated[float, Field(ge=0)] = 0
    """With a negative advantage the loss is bounded by this times the advantage (arXiv:1912.09729); 3 is common, 0
    off."""
    entropy_coefficient: NotNegative = 0
    """Weight of the entropy (nats per token) that is added to what is maximised."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL to the reference per token (Schulman 2020): k1 unbiased, k2 the square, k3 never negative."""
    importance_clip: NotNegative = 0
    """Weigh each token's loss by how much likelier the learning policy finds it than the engine that drew it, at most
    this (truncated importance sampling, as in arXiv:1802.01561); 2 is common with engine: vllm, 0 is off."""
    stop_at_kl: NotNegative = 0
    """End the passes over an iteration's answers once the policy is this far (nats per token, k3) from the one that
    wrote them; 0 is off."""


class PpoSection(RatioSection):
    """Proximal policy optimisation with a critic (arXiv:1707.06347, arXiv:2203.02155; stage: ppo)."""

    models: Literal["shared", "separate"] = "shared"
    """shared: policy and critic are adapters on one frozen base, and the reference is the base with adapters off (or
    the adapter that the policy goes on from). separate: the critic is a model of its own, and with model.method: full,
    which means this unless you say otherwise, the reference too. A reward model that is an adapter on the same base is
    one more adapter with shared; any other is loaded beside them."""
    critic_from: Literal["zero", "reward_model"] = "zero"
    """zero: the critic begins as the policy's base with a head of zeros: every state is worth 0. reward_model: body
    and head of reward_model (arXiv:2203.02155, appendix C.4); with models: shared that must be an adapter on the same
    base."""
    critic_learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak rate of the critic; by default ten times learning_rate. It follows the same schedule."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """In so many first iterations only the critic learns."""
    kl_coefficient: NotNegative = 0.05
    """Weight of the KL to the reference, taken off the reward of every token."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Steer kl_coefficient so that the KL of an answer (nats, summed over its tokens) comes near this
    (arXiv:1909.08593); off by default."""
    kl_horizon: Positive = 10_000
    """Answers over which the steering works; more is slower."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Trade of bias for variance in the advantages (arXiv:1506.02438)."""
    truncated: Literal["ended", "bootstrap"] = "ended"
    """What an answer is that was cut off at max_new_tokens. ended: an answer like others, with its score: the limit is
    part of the task (case i of arXiv:1712.00378). bootstrap: one that would have gone on: in the place of its score,
    which was given to something unfinished, stands what the critic expects after its last token (case ii there)."""
    value_clip: NotNegative = 0.2
    """The critic moves at most so far per iteration; 0 is off."""
    whiten_advantages: bool = True
    """Advantages get mean 0 and variance 1 over all tokens of an iteration."""
    whiten_rewards: bool = False
    """Token rewards get variance 1 over an iteration."""
    ptx_sources: list[str] = []
    """Files of supervised rows or plain text whose loss is added to every optimiser step (arXiv:2203.02155, the ptx
    of PPO-ptx)."""
    ptx_coefficient: NotNegative = 0.9
    """Weight of that loss, as a mean per token."""


class GrpoSection(RatioSection):
    """Learning from groups of answers to one prompt, without a critic (stage: grpo)."""

    method: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"
    """How an answer's advantage follows from its group: grpo (arXiv:2402.03300), dr_grpo without its two biases
    (arXiv:2503.20783), rloo (arXiv:2402.14740), reinforce++ (arXiv:2501.03262)."""
    answers_per_prompt: Annotated[int, Field(ge=1)] = 8
    """Answers in one group."""
    kl_coefficient: NotNegative = 0.04
    """Weight of the KL to the reference: in the loss with grpo and dr_grpo (as k3), taken off the reward with rloo and
    reinforce++. 0 keeps no reference."""


class RaftSection(PolicySection):
    """Supervised steps on the model's own best answers, again and again (RAFT, arXiv:2304.06767; stage: raft)."""

    global_batch: Positive = 128
    """Kept answers per optimiser step on all GPUs together."""
    minibatches: Positive = 2
    """Optimiser steps per pass over an iteration's kept answers; an iteration keeps global_batch * minibatches of those
    it writes."""
    answers_per_prompt: Positive = 8
    """Answers written to one prompt."""
    keep_share: Share = 0.125
    """Share of an iteration's answers that is learned from; 0.125 of 8 is the best of each prompt."""
    compare: Literal["prompt", "iteration"] = "prompt"
    """Whom an answer must beat to be kept: the others to its prompt (LMFlow's local), or all of the iteration (LMFlow's
    top), which learns most from the prompts that are easy."""
    least_reward: float | None = None
    """Answers with less reward are never kept: with a reward that says right or wrong, 1 learns from right ones only
    (rejection sampling)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling. What is kept is learned as rows are in stage sft."""
    kl_coefficient: NotNegative = 0
    """Weight of the KL to the reference, taken off the reward before answers are compared, as arXiv:2304.06767 does
    in its variant with a KL. 0 keeps no reference."""
