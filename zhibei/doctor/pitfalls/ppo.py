"""What spoils learning from a reward. Knows facts and messages, no loop."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zhibei.config.policy import PolicySection
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

POLICY_STAGES = ("dpo", "ppo", "grpo", "raft")
DROPOUT = re.compile(r"(?:^|_)(?:dropout|dropout_p|dropout_prob|drop(?:out)?_rate|pdrop|dropout_ratio)$")
HEAD = re.compile(r"(?:^|\.)(?:score|v_head|value_head|reward_head|rm_head|classifier|regression_head)(?:\.|$)")


@pitfall(
    "ppo",
    cost="run",
    sources=[
        "https://github.com/huggingface/trl/issues/2042",
        "https://github.com/huggingface/trl/pull/3234",
        "https://github.com/hiyouga/LlamaFactory/pull/10779",
    ],
)
def dropout_on_in_policy_logprobs(facts: Facts) -> Iterable[Finding]:
    """Dropout is on where log-probabilities are compared.

    Why: DPO and PPO learn from differences between log-probabilities of the same tokens. With dropout each pass gives
    others: a ratio that should be 1 is far from it, half of the tokens are clipped, margins are noise. Nothing fails.
    The stages of zhibei therefore switch it off whatever the files say; the model that was meant to have it has none.

    Fix: lora.dropout: 0, and 0 for every dropout in the model's config.json.

    在比较对数概率的阶段开着 dropout。

    为何：DPO 和 PPO 从同样词元的对数概率之差中学习。开着 dropout 时每次前向都不同：
    本应为 1 的比值偏离很远，一半词元被裁剪，间隔全是噪声，却不会报错。
    因此 zhibei 的这些阶段一律关闭 dropout，不管文件里怎么写；原本想要的 dropout 也就没有了。

    办法：lora.dropout: 0，并把模型 config.json 里所有 dropout 设为 0。
    """
    if facts.resolved is None or facts.run.stage not in POLICY_STAGES:
        return
    run = facts.run
    if run.model.method != "full" and run.lora.adapter is None and run.lora.dropout > 0:
        yield Finding(
            what=f"lora.dropout: {run.lora.dropout:g} with stage: {run.stage}, which goes without",
            where=facts.origin("lora.dropout"),
            to_do="lora.dropout: 0",
            level="warning",
            changes={"lora.dropout": 0.0},
        )
    if facts.adapter is not None and (rate := _number(facts.adapter.config.get("lora_dropout"))) > 0:
        yield Finding(
            what=f"the adapter brings lora_dropout {rate:g} with stage: {run.stage}",
            where=f"{facts.adapter.path}/adapter_config.json, field lora_dropout",
            to_do="set lora_dropout to 0 there",
            level="warning",
        )
    rates = {key: _number(value) for key, value in (facts.model.config if facts.model else {}).items()}
    active = {key: rate for key, rate in rates.items() if DROPOUT.search(key) and 0 < rate < 1}
    active.pop("classifier_dropout", None)
    if active and facts.model is not None:
        named = ", ".join(f"{key} {rate:g}" for key, rate in active.items())
        yield Finding(
            what=f"the model's config switches dropout on ({named}) with stage: {run.stage}",
            where=f"{facts.model.folder or facts.model.path}/config.json, field {next(iter(active))}",
            to_do="set " + ", ".join(f"{key} to 0" for key in active) + " there",
            level="warning",
        )


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


@pitfall(
    "ppo",
    cost="run",
    errors=[
        r"KL divergence is starting to become negative",
        r"negative KL|\bKL\b.{0,40}\bis negative",
    ],
    sources=[
        "https://github.com/huggingface/trl/issues/235",
        "https://github.com/huggingface/trl/issues/1857",
        "https://github.com/shibing624/MedicalGPT/issues/374",
    ],
)
def ppo_negative_kl_generation_kwargs(facts: Facts) -> Iterable[Finding]:
    """Answers are sampled from another distribution than the one that is scored.

    Why: top_k, top_p and their kin take tokens away before the draw, but log-probabilities are those of the whole
    distribution. The ratio and the KL are then wrong from step 0: the KL goes negative, and the policy drifts to empty
    or endless answers.

    Fix: Pure sampling for rollouts: ppo.top_k: 0 and ppo.top_p: 1. Use filters when talking to the model, not when
    training it.

    采样的分布与打分的分布不是同一个。

    为何：top_k、top_p 等在抽样前去掉了一部分词元，而对数概率属于完整分布。
    比值和 KL 从第 0 步就是错的：KL 变负，策略滑向空回答或停不下来的回答。

    办法：训练时纯采样：ppo.top_k: 0，ppo.top_p: 1。过滤只用于对话，不用于训练。
    """
    if facts.resolved is None or not isinstance(facts.run.training, PolicySection):
        return
    neutral = {"top_k": 0, "top_p": 1.0}
    for name, wanted in neutral.items():
        value, field = getattr(facts.run.training, name), f"{facts.run.stage}.{name}"
        if value != wanted:
            yield Finding(
                what=f"{field}: {value:g} takes tokens away before the draw",
                where=facts.origin(field),
                to_do=f"{field}: {wanted:g}",
                changes={field: wanted},
            )


@pitfall(
    "ppo",
    cost="run",
    errors=[
        r"no v_head weight is found",
        r"newly initialized: \[?.{0,300}(?:v_head|value_head|'score\.weight).{0,3000}(?:ppo|reward)",
        r"value_head\.(?:bin|safetensors).{0,80}(?:not found|no such file|does not exist|missing)",
        r"(?:provided path|checkpoint).{0,120}does not contain value head weights",
    ],
    sources=[
        "https://github.com/huggingface/trl/issues/1650",
        "https://github.com/hiyouga/LlamaFactory/issues/4379",
        "https://github.com/OpenRLHF/OpenRLHF/issues/209",
    ],
)
def value_head_not_loaded(facts: Facts) -> Iterable[Finding]:
    """The reward model has no head that gives a score.

    Why: A reward model saved without its head, or a plain language model named in its place, loads with a random one
    and only a warning. Every answer then gets a random reward, and the whole run follows it.

    Fix: Name the folder that the reward training wrote; its weights hold a tensor called score, v_head or value_head.

    奖励模型里没有打分头。

    为何：保存时丢了打分头的奖励模型，或误写成普通语言模型，加载时会得到随机的头而只有一条警告。
    此后每个回答得到的都是随机奖励，整个训练跟着它走。

    办法：写奖励训练保存的目录；它的权重文件里有名为 score、v_head 或 value_head 的张量。
    """
    if facts.reward is None or not facts.reward.tensors:
        return
    if not any(HEAD.search(name) for name in facts.reward.tensors):
        field = f"{facts.run.stage}.reward_model"
        kinds = ", ".join(map(str, facts.reward.config.get("architectures") or ["unknown"]))
        yield Finding(
            what=f"none of the {len(facts.reward.tensors):,} tensors of {field} is a scoring head ({kinds})",
            where=f"{facts.reward.path} ({field} at {facts.origin(field)})",
            to_do="name the run directory of a reward stage, or a folder whose weights hold score.weight or v_head",
        )


@pitfall("ppo", cost="run", errors=[r"reward model.{0,80}(?:tokenizer|vocab\w*).{0,60}(?:differ|mismatch|not match)"])
def reward_model_of_another_vocabulary(facts: Facts) -> Iterable[Finding]:
    """The reward model counts tokens differently from the policy.

    Why: The same ids mean other words to a model of another vocabulary, so its scores are those of a random text; ids
    beyond its table end the run with an index error in the middle of a rollout.

    Fix: Train the reward model from the same base family and with the same tokenizer as the policy.

    奖励模型的词表与策略不同。

    为何：同样的编号在另一种词表里是别的词，得分就成了随机文本的得分；
    超出词表的编号会在生成途中以越界错误中断训练。

    办法：用与策略相同的基座系列和分词器训练奖励模型。
    """
    reward, model = facts.reward, facts.model
    if reward is None or model is None:
        return
    ours, theirs = model.embedding_rows, reward.embedding_rows
    field = f"{facts.run.stage}.reward_model"
    if ours and theirs and ours != theirs:
        yield Finding(
            what=f"the policy has {ours:,} embedding rows and the reward model {theirs:,}",
            where=f"{reward.path} ({field} at {facts.origin(field)})",
            to_do=f"train a reward model on {facts.run.model.path}, or choose a policy of the reward model's family",
        )


@pitfall("ppo", cost="launch", errors=[r"max_new_tokens.{0,80}exceeds? .{0,40}(?:position|context|max_length)"])
def rollouts_longer_than_the_model(facts: Facts) -> Iterable[Finding]:
    """The longest prompt and the longest answer together are longer than the model's positions.

    Why: A rollout is one sequence of prompt and answer. Beyond the positions that the model was trained with it writes
    nonsense, which the reward then scores, or the run ends with an index error at the first long prompt.

    Fix: Lower data.max_tokens or ppo.max_new_tokens until their sum fits.

    最长的提示加最长的回答超过了模型的位置数。

    为何：一次生成是提示与回答连成的一个序列。超出训练过的位置后模型会胡言乱语而照样被打分，
    或在第一个长提示处以越界错误结束。

    办法：减小 data.max_tokens 或 ppo.max_new_tokens，使两者之和放得下。
    """
    if facts.resolved is None or not isinstance(facts.run.training, PolicySection) or facts.model is None:
        return
    run, section, stage = facts.run, facts.run.training, facts.run.stage
    positions = facts.model.config.get("max_position_embeddings") or facts.model.config.get("n_positions")
    if not isinstance(positions, int) or positions <= 0:
        return
    positions = int(positions * (run.model.rope_scaling_factor or 1))
    longest = run.data.max_tokens + section.max_new_tokens
    if longest > positions:
        left = positions - section.max_new_tokens
        is_enough = left >= positions // 4
        limit = f"{stage}.max_new_tokens: at most {positions // 2}, and data.max_tokens at most what it leaves"
        yield Finding(
            what=f"data.max_tokens {run.data.max_tokens:,} + {stage}.max_new_tokens {section.max_new_tokens:,} = "
            f"{longest:,}, and the model has {positions:,} positions",
            where=facts.origin("data.max_tokens"),
            to_do=f"data.max_tokens: {left}, or a lower {stage}.max_new_tokens" if is_enough else limit,
            changes={"data.max_tokens": left} if is_enough else {},
        )
