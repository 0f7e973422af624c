"""Pits of held-out evaluation and of comparing models. Knows counts and settings, not rows."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.counts import noun_of, rows_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

MANY_ROWS, LEAST_HELDOUT = 2000, 20
"""Of so many rows fewer held-out ones than this are a slip: their loss moves by several percent from one row alone."""


def _is_chosen(facts: Facts, key: str) -> bool:
    """Whether somebody wrote the value; defaults and planned values are nobody's slip."""
    return facts.origin(key) not in ("default", "planned")


@pitfall("evaluation", cost="run", sources=["https://github.com/hiyouga/LlamaFactory/issues/5593"])
def val_split_too_small_eval_useless(facts: Facts) -> Iterable[Finding]:
    """The settings leave no usable evaluation.

    Why: A fraction such as 0.00001 holds out no row or one, and an interval longer than the run never comes. The run
    looks evaluated, and learning by heart is not seen.

    Fix: Hold out at least some dozens of rows (data.validation: 0.02, or a number of rows), and evaluate several times
    within the run; or say data.validation: 0.

    设置使评估形同虚设。

    为何：0.00001 这样的比例只留出零行或一行，比整个训练还长的间隔永远不会到。看上去有评估，其实看不到过拟合。

    办法：至少留出几十行（data.validation: 0.02，或写行数），并在训练中多评估几次；不想评估就写 data.validation: 0。
    """
    rows = rows_of(facts)
    if facts.resolved is None or rows is None:
        return
    run, stage, noun = facts.run, facts.run.stage, noun_of(facts)
    held, total = int(rows.audit.get("rows_heldout", 0)), int(rows.audit.get("rows_kept", 0))
    validation, where = run.data.validation, facts.origin("data.validation")
    wanted = not isinstance(validation, str) and validation > 0
    if wanted and held < LEAST_HELDOUT and (total >= MANY_ROWS or (not held and _is_chosen(facts, "data.validation"))):
        yield Finding(
            what=f"data.validation: {validation} holds out {held} of {total:,} {noun}",
            where=where,
            to_do="set data.validation: 0.02, or a number of rows, or 0 for no evaluation",
            level="warning",
            changes={"data.validation": 0.02 if total >= MANY_ROWS else 0},
        )
    every, key = run.training.evaluate_every, f"{stage}.evaluate_every"
    if held and every and rows.num_steps and every > rows.num_steps and _is_chosen(facts, key):
        yield Finding(
            what=f"{key}: {every} is longer than the run, which has {rows.num_steps:,} steps: it is evaluated only at "
            "the end",
            where=facts.origin(key),
            to_do=f"set {key}: {max(1, rows.num_steps // 10)}, or 0 to say that the end is enough",
            level="warning",
            changes={key: max(1, rows.num_steps // 10)},
        )


@pitfall(
    "evaluation",
    cost="run",
    kind="construction",
    because="a row that keeps no learned token, held out or not, is dropped into the ledger before it is batched, and "
    "the held-out loss is one sum divided by one count",
    proof=[
        "tests/data/test_prepare.py::test_rows_in_which_nothing_is_learned_go_into_the_ledger",
        "tests/evaluate/test_row_losses.py::test_each_row_has_the_loss_it_has_alone",
    ],
    errors=[r"eval_loss\S{0,3}[:=]? ?nan"],
    sources=["https://github.com/huggingface/trl/issues/1053"],
)
def eval_nan_response_template_truncated() -> None:
    """The evaluation loss is NaN while the training loss is finite.

    Why: A few held-out rows are longer than the limit; cut, they hold no token of the answer. One batch of such rows is
    a mean over nothing, and the mean over batches becomes NaN, so the best checkpoint can no longer be chosen.

    Fix: In other tools drop rows without learned tokens from the evaluation set too. Nothing to do here.

    训练损失正常，评估损失却是 NaN。

    为何：少数留出行超过长度上限，截断后一个答案词元都不剩。一整批这样的行就是对空集求平均，
    总平均随之变成 NaN，再也选不出最佳检查点。

    办法：在别的工具里，评估集也要去掉没有可学词元的行。这里无须处理。
    """


@pitfall(
    "evaluation",
    cost="hours",
    kind="construction",
    because="the one figure by which the best checkpoint is chosen is the held-out loss, which every evaluation makes",
    proof=["tests/train/test_sft.py::test_the_best_evaluation_is_the_final_model"],
    errors=[r"metric_for_best_model.{0,120}not found", r"KeyError: .?eval_\w+"],
    sources=[
        "https://github.com/huggingface/transformers/issues/40217",
        "https://github.com/huggingface/sentence-transformers/issues/2749",
        "https://github.com/huggingface/trl/pull/5811",
        "https://github.com/huggingface/transformers/issues/19957",
    ],
)
def metric_for_best_model_not_produced() -> None:
    """The metric that is to choose the best model is not among those that the evaluation makes.

    Why: With several evaluation sets the names get prefixes, and some trainers make none of their own; the error comes
    at the first evaluation, hours after the start.

    Fix: In transformers run one evaluation on two rows first and copy the name from its result. Here there is one
    figure, the held-out loss.

    用来挑选最佳模型的指标，评估并没有产出。

    为何：评估集有多个时名字会带前缀，有的训练器自己不产出指标；报错要到第一次评估，即开始几小时之后才出现。

    办法：在 transformers 中先用两行做一次评估，照抄其结果里的名字。这里只有一个指标：留出损失。
    """


@pitfall(
    "evaluation",
    cost="minutes",
    kind="construction",
    because="training, held-out figures and row losses come from one function, which is compared with the loss that "
    "transformers computes",
    proof=[
        "tests/evaluate/test_row_losses.py::test_each_row_has_the_loss_it_has_alone",
        "tests/parity/test_packing.py::test_packed_padded_single_and_transformers_agree",
    ],
    sources=["https://github.com/hiyouga/LlamaFactory/issues/1447"],
)
def dpo_offline_reward_check_wrong() -> None:
    """Rewards that are recomputed by hand are hundreds away from those of training.

    Why: Logits at one position speak of the next token. A script that compares them with the same position sums the
    log-probabilities of unlikely words.

    Fix: Shift logits and labels against one another by one; or use the figures that training itself writes.

    手工重算的奖励与训练时的相差几百。

    为何：某一位置的 logits 说的是下一个词元。若与同一位置比较，累加的就是不可能出现的词的对数概率。

    办法：让 logits 与标签错开一位；或直接使用训练写出的数值。
    """


@pitfall(
    "evaluation",
    cost="run",
    kind="construction",
    because="every sampling option has a value that is stated with the answer; a generation_config.json changes none",
    proof=[
        "tests/generate/test_limits.py::test_a_generation_config_of_the_model_changes_no_option",
        "tests/generate/test_filters.py::test_all_filters_together_in_the_order_of_transformers",
    ],
    sources=[
        "https://github.com/EleutherAI/lm-evaluation-harness/issues/3154",
        "https://github.com/EleutherAI/lm-evaluation-harness/issues/1841",
        "https://github.com/vllm-project/vllm/issues/706",
    ],
)
def eval_backend_sampling_defaults_differ() -> None:
    """One checkpoint gets different scores from two engines.

    Why: One of them applies generation_config.json (a repetition penalty, a top_k), the other does not; or one wraps
    the question in the chat template. The better engine is then taken for the better model.

    Fix: Give every sampling option explicitly, and compare the prompt texts that the engines really used.

    同一个检查点在两种引擎上得分不同。

    为何：一个引擎采用了 generation_config.json（重复惩罚、top_k 等），另一个没有；或一个把问题套进了聊天模板。
    于是误把引擎的差别当成模型的差别。

    办法：显式给出每个采样选项，并比较引擎实际使用的提示文本。
    """
