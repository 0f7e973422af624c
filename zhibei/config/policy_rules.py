"""Which settings of ppo, grpo and raft need one another. Knows values, not loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zhibei.config.rules import Rule, conflict, no_effect

if TYPE_CHECKING:
    from zhibei.config.run import RunFile

WHOLE = 1e-6
"""A product of a share and a number of answers that is this near to a whole number is one."""

POLICY_RULES: list[Rule] = [
    conflict(
        lambda run: (
            run.stage == "ppo"
            and run.ppo.models == "shared"
            and "models" in run.ppo.model_fields_set
            and run.model.method == "full"
        ),
        "ppo.models",
        "model.method",
        "shared models are adapters on one frozen base, and with model.method: full there are none",
        "set model.method: lora, or ppo.models: separate",
    ),
    *(
        no_effect(
            lambda run, stage=stage: run.stage == stage and getattr(run, stage).engine == "ours",
            f"{stage}.vllm_memory_share",
            f"{stage}.engine",
            "without engine: vllm nothing of vLLM is loaded",
            f"remove it, or set {stage}.engine: vllm",
        )
        for stage in ("ppo", "raft", "grpo")
    ),
    no_effect(
        lambda run: run.stage == "ppo" and run.ppo.kl_target is None,
        "ppo.kl_horizon",
        "ppo.kl_target",
        "without ppo.kl_target the KL coefficient is fixed",
        "remove ppo.kl_horizon, or set ppo.kl_target",
    ),
    no_effect(
        lambda run: run.stage == "ppo" and not run.ppo.ptx_sources,
        "ppo.ptx_coefficient",
        "ppo.ptx_sources",
        "without ppo.ptx_sources there are no rows for that loss",
        "remove ppo.ptx_coefficient, or name files in ppo.ptx_sources",
    ),
    conflict(
        lambda run: (
            run.stage == "grpo" and bool(run.grpo.global_batch * run.grpo.minibatches % run.grpo.answers_per_prompt)
        ),
        "grpo.answers_per_prompt",
        "grpo.global_batch",
        "an iteration has grpo.global_batch * grpo.minibatches answers, which must be whole groups",
        "choose a grpo.global_batch that is a multiple of grpo.answers_per_prompt",
    ),
    conflict(
        lambda run: run.stage == "grpo" and run.grpo.answers_per_prompt == 1 and run.grpo.method != "reinforce++",
        "grpo.answers_per_prompt",
        "grpo.method",
        "this method compares the answers of one prompt, and one answer has nothing to be compared with",
        "set grpo.answers_per_prompt to 2 or more, or grpo.method: reinforce++",
    ),
    conflict(
        lambda run: run.stage == "ppo" and run.ppo.critic_from == "reward_model" and run.ppo.reward_model is None,
        "ppo.critic_from",
        "ppo.reward_model",
        "there is no reward model that the critic could begin as",
        "name one in ppo.reward_model, or set ppo.critic_from: zero",
    ),
    no_effect(
        lambda run: run.stage == "ppo" and run.ppo.truncated == "bootstrap",
        "ppo.missing_terminator_penalty",
        "ppo.truncated",
        "with ppo.truncated: bootstrap the score of a cut answer is not used, nor what is taken off it",
        "remove it, or set ppo.truncated: ended",
    ),
    conflict(
        lambda run: run.stage == "raft" and not is_whole(kept_of_prompt(run)) and run.raft.compare == "prompt",
        "raft.keep_share",
        "raft.answers_per_prompt",
        "raft.keep_share of the answers to one prompt must be a whole number of answers",
        "set raft.keep_share to 1 / raft.answers_per_prompt, or raft.compare: iteration",
    ),
    conflict(
        lambda run: run.stage == "raft" and not is_whole(prompts_of_iteration(run)),
        "raft.answers_per_prompt",
        "raft.global_batch",
        "raft.global_batch * raft.minibatches answers are kept, raft.keep_share of those written to "
        "raft.answers_per_prompt of each prompt: that must come out as a whole number of prompts",
        "choose raft.global_batch as a multiple of raft.keep_share * raft.answers_per_prompt",
    ),
]


def kept_of_prompt(run: RunFile) -> float:
    return run.raft.answers_per_prompt * run.raft.keep_share


def prompts_of_iteration(run: RunFile) -> float:
    return run.raft.global_batch * run.raft.minibatches / kept_of_prompt(run)


def prompts_per_iteration(run: RunFile) -> int:
    """How many prompts an iteration of ppo, grpo or raft answers."""
    section = run.training
    written = section.global_batch * getattr(section, "minibatches", 1)
    if run.stage == "raft":
        return round(prompts_of_iteration(run))
    return written // (run.grpo.answers_per_prompt if run.stage == "grpo" else 1)


def is_whole(number: float) -> bool:
    return abs(number - round(number)) < WHOLE and round(number) >= 1
