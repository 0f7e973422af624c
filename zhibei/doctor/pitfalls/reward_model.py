"""Pits of training and reading reward models: where the score is read, and what the model is built on.

The rows that checks see are those that stage reward learns from, and their last tokens those it reads.
"""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

LAST_TOKEN = "tests/data/test_pairs.py::test_the_last_token_of_a_row_is_known_by_its_border_not_by_a_padding_id"
ROW_ONLY = "tests/train/test_pair_identities.py::test_a_score_depends_on_its_row_only"
BORDERS = "rows carry their borders, so the last token of an answer is known without looking for a padding id"


@pitfall("reward_model", cost="run", sources=["https://github.com/huggingface/trl/issues/492"])
def rm_base_is_adapter_path(facts: Facts) -> Iterable[Finding]:
    """A stage starts from an adapter folder as if it were a whole model.

    Why: Given a folder that holds an adapter only, loaders ignore it and take the raw base, or stack a second adapter
    on it that no later stage finds. The reward model or policy then grew on another base than was meant.

    Fix: Merge the adapter first and start from the merged folder, or name base and adapter apart: model.path for the
    base, lora.adapter for the adapter.

    某个阶段把适配器文件夹当成完整模型来起步。

    为何：文件夹里只有适配器时，加载程序要么忽略它只用原始基座，要么再叠一个后续阶段找不到的适配器。奖励模型或策略于是建在了另一个
    基座上。

    办法：先合并适配器并从合并后的文件夹开始，或分开写：model.path 写基座，lora.adapter 写适配器。
    """
    if facts.resolved is None or facts.adapter is None:
        return
    run = facts.run
    base = facts.adapter.config.get("base_model_name_or_path") or "the base it names"
    kind = facts.adapter.config.get("task_type")
    if run.stage == "reward" and run.lora.adapter is not None and kind not in (None, "SEQ_CLS"):
        yield Finding(
            what=f"lora.adapter: {run.lora.adapter} is the adapter of a language model (task_type {kind}); a reward "
            "model cannot continue it",
            where=facts.origin("lora.adapter"),
            to_do="remove lora.adapter for a fresh one on the base; or set model.path to it and model.method: full, "
            "which merges it first",
        )
        return
    is_stacked = run.model.method != "full" and run.lora.adapter is None
    if not is_stacked:
        return
    apart = {"model.path": str(base), "lora.adapter": str(facts.adapter.path)}
    # The adapter of a language model cannot become that of a reward model; merged into its base it can be built on.
    changes = {"model.method": "full"} if run.stage == "reward" else apart
    yield Finding(
        what=f"model.path: {run.model.path} holds an adapter on {base}, and model.method: {run.model.method} would "
        "put another one on top",
        where=facts.origin("model.path"),
        to_do="set model.method: full, which merges the adapter first; or train a fresh one on its base: "
        f"model.path: {base}"
        if run.stage == "reward"
        else f"set model.path: {base} and lora.adapter: {facts.adapter.path} to continue that adapter, or merge "
        "it first and start from the merged folder",
        changes=changes,
    )


@pitfall(
    "reward_model",
    cost="run",
    kind="construction",
    because="rows of stage reward end with the template's terminator exactly once, and the template travels in the "
    "manifest that later stages compare",
    proof=[
        "tests/data/test_pairs.py::test_one_bos_one_terminator_and_a_shared_prompt",
        "tests/serve/test_judge.py::test_a_judge_prefers_what_was_preferred_and_neighbours_change_nothing",
    ],
    sources=["https://github.com/huggingface/trl/pull/5813"],
)
def rm_eval_without_eos() -> None:
    """A reward model that was trained to score at the terminator is asked to score text without one.

    Why: The score at the last word is another number than the one at the end of the turn; a good reward model looks
    weak, and PPO climbs a wrong hill.

    Fix: Score exactly what was trained: the same template, with the terminator.

    奖励模型训练时在结束符处打分，使用时却没有结束符。

    为何：最后一个词处的分数与一轮结束处的分数不是一回事；好的奖励模型显得很差，PPO 则爬错了山。

    办法：打分的文本要与训练时完全一致：同样的模板，带结束符。
    """


@pitfall(
    "reward_model",
    cost="run",
    kind="construction",
    because=BORDERS,
    proof=[LAST_TOKEN, ROW_ONLY],
    sources=[
        "https://github.com/huggingface/transformers/pull/35911",
        "https://github.com/allenai/reward-bench/issues/137",
        "https://github.com/vwxyzjn/lm-human-preference-details/issues/6",
    ],
)
def rm_left_padding_scored_wrong() -> None:
    """With padding on the left the score is read at the wrong token.

    Why: Heads that look for the first padding id and step back by one assume padding on the right; on the left they
    read the first token, or the last of all.

    Fix: In other tools set padding_side="right" for reward models, or use a transformers with the rightmost-token rule.

    左填充时，分数读自错误的词元。

    为何：“找到第一个填充、再退一步”的打分头默认右填充；遇到左填充就会读到第一个词元或整行的最后一个。

    办法：在别的工具里给奖励模型设 padding_side="right"，或使用按最右词元取值的 transformers 版本。
    """


@pitfall(
    "reward_model",
    cost="run",
    kind="construction",
    because="pairs are compared by one number per answer; no loss over the tokens of an answer exists here, and rows "
    "hold no padding",
    proof=[LAST_TOKEN, ROW_ONLY],
    sources=["https://github.com/deepspeedai/DeepSpeedExamples/issues/316"],
)
def rm_loss_includes_padding() -> None:
    """A per-token reward loss runs over the padding of the shorter answer.

    Why: Comparing two answers token by token up to the longer one counts padding as words; the model learns length.

    Fix: Compare one score per answer, read at its last token.

    逐词元的奖励损失把较短回答的填充也算进去了。

    为何：按较长的一方逐词元比较，会把填充当作词；模型学到的是长度。

    办法：每个回答只比较一个分数，在其最后一个词元处读取。
    """


@pitfall(
    "reward_model",
    cost="run",
    kind="construction",
    because=BORDERS,
    proof=[LAST_TOKEN, ROW_ONLY],
    sources=[
        "https://github.com/huggingface/transformers/issues/35352",
        "https://github.com/huggingface/transformers/pull/35911",
        "https://github.com/huggingface/trl/pull/6952",
    ],
)
def rm_pad_eq_eos_first_eos_scored() -> None:
    """Padding and EOS share an id, and the score is read before the first EOS, inside of the prompt.

    Why: In dialogues every earlier turn ends with that id, so both answers get the score of the same prompt token.

    Fix: In other tools give the tokenizer a padding token of its own, or use a transformers with the rightmost rule.

    填充与 EOS 编号相同，分数读在第一个 EOS 之前，也就是提示里。

    为何：多轮对话里前面每一轮都以该编号结束，两个回答于是得到同一个提示词元的分数。

    办法：在别的工具里给分词器设单独的填充词元，或使用按最右词元取值的 transformers 版本。
    """


@pitfall(
    "reward_model",
    cost="run",
    kind="construction",
    because=BORDERS,
    proof=[LAST_TOKEN, ROW_ONLY],
    sources=["https://github.com/huggingface/trl/issues/937", "https://github.com/allenai/reward-bench/issues/137"],
)
def rm_pad_token_none_last_pad_scored() -> None:
    """The model names no padding id, so the score of a short answer is read at its padding.

    Why: A sequence classification head without a padding id takes the last position of the batch. Scores then depend on
    which other answers were in the batch, and the accuracy stays near one half.

    Fix: In other tools set model.config.pad_token_id to the tokenizer's.

    模型没有填充编号，短回答的分数读在了填充处。

    为何：没有填充编号的序列分类头会取批次的最后一个位置。分数于是取决于同批的其他回答，准确率停在一半左右。

    办法：在别的工具里把 model.config.pad_token_id 设为分词器的填充编号。
    """
