"""What spoils rollouts in the loops of other programs. Knows their messages, no facts."""

from __future__ import annotations

from zhibei.doctor.pitfall import pitfall


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="The penalty is taken off wherever the sampler itself says that an answer was cut off.",
    proof=["tests/train/test_health.py::test_rewards_are_penalised_then_scaled_then_bounded"],
    sources=[
        "https://github.com/huggingface/trl/issues/6805",
        "https://github.com/huggingface/trl/pull/6813",
        "https://github.com/huggingface/trl/pull/5338",
    ],
)
def missing_eos_penalty_never_applies() -> None:
    """Answers run to the length limit although a penalty for a missing end is set.

    Why: The end was looked for in prompt and answer together (a chat prompt holds one already), or a stop token
    other than EOS ends the answers, so the penalty hits all or none.

    Fix: Look for the stop ids in the answer only, and use one list of ids for stopping and for the penalty; score
    one crafted answer with and one without an end.

    设置了缺少结尾的惩罚，回答仍跑满长度。

    为何：程序在提示加回答里一起找结尾（聊天提示里本来就有），或回答以 EOS 以外的停止词元结束，于是惩罚全有或全无。

    办法：只在回答里找停止编号，停止与惩罚用同一份列表；用一条有结尾、一条无结尾的样例验证得分之差。
    """


@pitfall(
    "ppo",
    cost="hours",
    kind="construction",
    because="The KL that is shown and the one that is taken off the reward come from the same numbers.",
    proof=["tests/train/test_policy_runs.py::test_ppo_learns_from_gae_of_rewards_less_the_kl"],
    errors=[
        r"kl[_ ]penalty.{0,60}(?:abs|full).{0,80}negative",
        r"negative kl.{0,80}kl_penalty",
    ],
    sources=[
        "https://github.com/huggingface/trl/issues/1161",
        "https://github.com/huggingface/trl/pull/1180",
    ],
)
def ppo_kl_reported_not_trained() -> None:
    """A warning about negative KL comes from an estimate that is not trained on.

    Why: TRL before 0.7.9 logged log-ratio means whatever kl_penalty said, so runs were stopped or retuned for
    nothing.

    Fix: Upgrade; log the estimator's name beside its value. A log-ratio mean may dip below zero, k2 and k3 never
    do.

    负 KL 的警告来自一个并未参与训练的估计。

    为何：0.7.9 之前的 TRL 不管 kl_penalty 怎么设都记录对数比均值，于是有人白白停掉或重调训练。

    办法：升级，并把估计量的名字与数值一起记录。对数比均值可能略小于零，k2 与 k3 不会。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="The KL is taken off token by token, and advantages are those of each token.",
    proof=["tests/train/test_policy_runs.py::test_ppo_learns_from_gae_of_rewards_less_the_kl"],
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/3374",
    ],
)
def ppo_policy_quality_collapse_coarse_reward() -> None:
    """The policy's quality collapses within the first updates.

    Why: A reward per whole answer without a KL penalty per token, or default rates of a demo, move the policy away
    from all it had learned.

    Fix: A KL penalty per token with a target, a smaller rate, whitened advantages; stop when a held-out score falls
    by a fifth.

    策略在最初几次更新中就崩坏。

    为何：只有整句奖励而没有逐词元 KL 惩罚，或照搬示例的学习率，会把策略推离它学过的一切。

    办法：使用带目标的逐词元 KL 惩罚、更小的学习率、标准化的优势；留出集得分下降五分之一就停止。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="Supervised rows are forward passes of their own with their own targets.",
    proof=["tests/train/test_policy_runs.py::test_supervised_rows_add_their_weighted_mean_loss"],
    errors=[
        r"expected input batch_size \(\d+\) to match target batch_size \(\d+\)[\s\S]{0,6000}ptx",
        r"ptx[\s\S]{0,6000}expected input batch_size \(\d+\) to match target batch_size",
    ],
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/3443",
    ],
)
def ppo_ptx_iterator_misaligned() -> None:
    """Ids, labels and mask of the pre-training loss come from different batches.

    Why: An iterator is asked three times, once for each; when sizes agree by chance nothing fails and the gradient
    is nonsense.

    Fix: Take one batch and read its three fields.

    预训练损失的编号、标签和掩码来自不同批次。

    为何：对迭代器各取一次共取了三次；大小碰巧一致时不会报错，梯度却毫无意义。

    办法：只取一个批次，从中读三个字段。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="Rewards can be scaled by their running deviation and bounded, and the critic moves by a bounded step.",
    proof=["tests/train/test_health.py::test_rewards_are_penalised_then_scaled_then_bounded"],
    sources=[
        "https://github.com/deepspeedai/DeepSpeedExamples/issues/556",
        "https://github.com/huggingface/trl/pull/560",
        "https://github.com/HarderThenHarder/transformers_tasks/issues/3",
    ],
)
def ppo_reward_scale_critic_diverges() -> None:
    """The critic's loss grows because rewards are large or drift.

    Why: Scores of 10 to 30 with gamma 1 and no scaling make returns that the critic cannot follow; advantages are
    then noise.

    Fix: Score some answers of the starting policy first; scale by running mean and deviation, clip, and give the
    critic a smaller rate.

    奖励过大或漂移，价值网络的损失不断增大。

    为何：奖励在 10 到 30 之间、gamma 为 1 又不缩放时，价值网络跟不上回报，优势就成了噪声。

    办法：先给初始策略的回答打分；按滑动均值与标准差缩放并截断，价值网络用更小的学习率。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="watchdog",
    by="length_hacking",
    sources=[
        "https://github.com/rllm-org/rllm/issues/143",
        "https://github.com/OpenRLHF/OpenRLHF/issues/1263",
        "https://github.com/yifan123/flow_grpo/issues/233",
    ],
)
def reward_hacking_train_up_eval_down() -> None:
    """The training reward rises while answers get worse.

    Why: The policy finds what the reward overlooks: length, repetition, copies of the prompt. The best checkpoint
    may be deleted before anyone looks.

    Fix: Score held-out prompts with another judge every few updates, try trivial answers on the reward beforehand,
    keep KL in bounds and checkpoints dense.

    训练奖励上升，回答却变差。

    为何：策略会钻奖励的空子：长度、重复、照抄提示。等人发现时最好的检查点可能已被删除。

    办法：每隔几次更新用另一个评判者给留出提示打分，事先用平凡回答试探奖励，控制 KL，并密集保存检查点。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="Rows never see one another, so how they are cut into passes changes no log-probability.",
    proof=["tests/train/test_experience.py::test_log_probabilities_come_back_to_their_tokens"],
    sources=[
        "https://github.com/verl-project/verl/issues/2996",
    ],
)
def rl_logprob_microbatch_mismatch() -> None:
    """Old and new log-probabilities differ although nothing was trained in between.

    Why: They were computed in micro-batches of different size, so padding, packing and rounding differ and the
    ratio is not 1.

    Fix: Use the same micro-batch for both, and measure the ratio once with a learning rate of 0.

    中间没有训练，新旧对数概率却不同。

    为何：两次用了不同大小的微批，填充、打包和舍入都不同，比值就不是 1。

    办法：两处使用相同的微批，并在学习率为 0 时测一次比值。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="explained",
    because="It concerns a second engine beside the trainer; here answers are written by the weights that learn.",
    errors=[
        r"no available memory for the cache blocks",
        r"free memory on device .{0,120}less than desired GPU memory utilization",
        r"larger than the maximum number of tokens that can be stored in (?:the )?KV cache",
        r"KV cache is needed, which is larger than the available KV cache memory",
    ],
    sources=[
        "https://github.com/verl-project/verl/issues/12",
    ],
)
def rl_rollout_hang_oom_silent() -> None:
    """The rollout engine has no memory left for its key/value cache and hangs or dies.

    Why: Policy, reference, critic and the engine share the cards; what the engine may take is set as a fraction of
    the card, whatever the others hold.

    Fix: Lower gpu_memory_utilization, max_model_len or the number of sequences; offload what rests while rollouts
    run.

    生成引擎没有显存放键值缓存，于是挂起或退出。

    为何：策略、参考、价值网络与引擎共用显卡，而引擎按整卡比例占用，不管别人占了多少。

    办法：降低 gpu_memory_utilization、max_model_len 或并发序列数；生成时把闲置的部分卸载到内存。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="gate",
    proof=[
        "tests/train/test_policy_runs.py::test_what_is_wrong_before_learning_stops_the_run",
        "tests/train/test_policy_runs.py::test_an_engine_that_keeps_the_old_weights_stops_the_run",
        "tests/train/test_policy_runs.py::test_the_importance_correction_weighs_each_token",
    ],
    errors=[
        r"vllm_vs_local_logprob_diff",
    ],
    sources=[
        "https://github.com/verl-project/verl/pull/2953",
        "https://github.com/verl-project/verl/issues/6780",
        "https://github.com/allenai/open-instruct/issues/1473",
    ],
)
def rl_train_inference_logprob_gap() -> None:
    """The sampler and the trainer give different probabilities to the same tokens.

    Why: Other kernels, formats or a stale copy of the weights; the ratio is biased from the start, and the reward
    collapses after hundreds of steps.

    Fix: Score the same sequences in both at step 0 and log the gap every step; take old log-probabilities from the
    trainer, or correct by truncated importance sampling.

    采样引擎与训练器对同样的词元给出不同概率。

    为何：内核、数值格式不同或权重副本过期；比值从一开始就有偏，几百步后奖励崩溃。

    办法：第 0 步用同样的序列比较两边并每步记录差距；旧对数概率取自训练器，或用截断重要性采样修正。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="The score is laid on the last token that the mask names, wherever the padding is.",
    proof=["tests/losses/test_policy.py::test_the_score_lands_on_the_true_last_token"],
    sources=[
        "https://github.com/huggingface/trl/issues/3750",
        "https://github.com/EleutherAI/gpt-neox/pull/1285",
        "https://github.com/huggingface/trl/pull/5338",
    ],
)
def rm_reward_at_pad_not_eos_ppo() -> None:
    """The score lands on padding instead of the answer's last token.

    Why: Off by one in the length, or padding and EOS share an id: the reward falls outside of the mask and is lost,
    or the wrong token is praised.

    Fix: Find the last token from the answer's mask, never by searching for an id; test with one padded and one full
    row.

    得分落在填充上，而不是回答的最后一个词元。

    为何：长度差一，或填充与 EOS 同号：奖励落在掩码之外而丢失，或奖励了错误的词元。

    办法：由回答掩码确定最后一个词元，绝不按编号查找；用一条有填充、一条填满的样例测试。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="gate",
    proof=["tests/train/test_policy_runs.py::test_an_update_that_changes_nothing_stops_the_run"],
    sources=[
        "https://github.com/verl-project/verl/issues/7495",
        "https://github.com/huggingface/trl/issues/5312",
        "https://github.com/OpenRLHF/OpenRLHF/issues/1349",
    ],
)
def rollout_engine_never_updated() -> None:
    """The rollout engine goes on with the first weights.

    Why: Names of adapters do not match, or sleep mode brings the old copy back; the policy loss moves and the
    reward does not.

    Fix: After the first update, score a fixed text in the engine: it must change, and equal the trainer's.

    生成引擎一直在用最初的权重。

    为何：适配器名字对不上，或休眠模式恢复了旧副本；策略损失在变，奖励不动。

    办法：第一次更新后在引擎里给固定文本打分：必须变化，并与训练器相等。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="construction",
    because="The sampler takes nothing but its own options; generation_config.json is not read for sampling.",
    proof=["tests/doctor/test_constructions_serving.py::test_generation_config_does_not_change_how_answers_are_drawn"],
    errors=[
        r"default sampling parameters (?:have been )?(?:overridden|from) .{0,40}(?:by the model"
        r"|generation_config|Hugging ?Face)",
        r"using default (?:chat |completion )?sampling params from model",
    ],
    sources=[
        "https://github.com/NVIDIA-NeMo/RL/issues/3497",
        "https://github.com/OpenPipe/ART/pull/140",
    ],
)
def rollout_sampling_params_from_generation_config() -> None:
    """Rollouts are sampled with settings of the model's generation_config.json.

    Why: vLLM fills unset options from that file (repetition_penalty, top_k, top_p), so answers come from another
    distribution than the one that is scored, and the ratio is wrong from step 0.

    Fix: Pass neutral values explicitly, or generation_config="vllm".

    生成时悄悄用了模型 generation_config.json 的采样设置。

    为何：vLLM 会用该文件填补未设的选项（repetition_penalty、top_k、top_p），回答就来自另一个分布，
    比值从第 0 步就不对。

    办法：显式传入中性值，或设 generation_config="vllm"。
    """


@pitfall(
    "ppo",
    cost="run",
    kind="explained",
    because="An answer that was cut off counts as ended; how many are is on the health board, and has a penalty.",
    sources=[
        "https://github.com/huggingface/trl/pull/1536",
        "https://github.com/areal-project/AReaL/pull/1637",
    ],
)
def truncated_rollout_treated_as_terminal() -> None:
    """Answers that were cut count as if they had ended.

    Why: The return after the cut is taken as 0, or the cut is guessed from the padded width; the policy learns from
    ends that never were.

    Fix: Carry the reason of each stop with the answer; mask or bootstrap those that were cut.

    被截断的回答被当作已经结束。

    为何：截断之后的回报被当成 0，或从填充宽度猜测截断；策略从并不存在的结尾中学习。

    办法：让每条回答带着停止原因；对被截断的做遮蔽或自举。
    """
