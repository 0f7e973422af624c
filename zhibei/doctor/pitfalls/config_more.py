"""Pits of the run file's schedule, intervals and batch. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall
from zhibei.doctor.pitfalls.config import is_chosen, is_published, num_training_rows
from zhibei.train.schedule import warmup_steps_of

LONG_RUN_STEPS = 100
"""Shorter runs lose little when nothing is saved or evaluated on the way."""
# Low and high ends of what published runs use; 0 switches off where that is a value of its own.
PUBLISHED: Mapping[str, tuple[float, float, str]] = {
    "beta1": (0.5, 0.99, "Adam's first-moment decay is 0.9 almost everywhere"),
    "beta2": (0.9, 0.9999, "0.95 to 0.999"),
    "epsilon": (1e-16, 1e-4, "1e-8 almost everywhere; a large one turns Adam into plain gradient descent"),
    "weight_decay": (0.0, 0.5, "0 to 0.1; the decay of a step is rate x weight_decay"),
    "max_grad_norm": (0.01, 1000.0, "0.3 to 1; 0 switches clipping off"),
    "warmup_ratio": (0.0, 0.5, "0.03 to 0.1; the rest of the run trains at the rate that was asked for"),
    "neftune_alpha": (0.0, 30.0, "5 to 15 (arXiv:2310.05914)"),
    "label_smoothing": (0.0, 0.3, "0 to 0.1"),
    "z_loss": (0.0, 1e-2, "1e-4 (arXiv:2204.02311)"),
}


def num_steps_of_run(facts: Facts) -> int | None:
    """Optimiser steps of the whole run; None when the rows could not be read."""
    if facts.rows is not None and facts.rows.num_steps:
        return facts.rows.num_steps
    return facts.run.training.max_steps


@pitfall("config", cost="hours")
def warmup_never_ends(facts: Facts) -> Iterable[Finding]:
    """The warm-up is as long as the run, so the learning rate that was asked for is never reached.

    Why: The rate rises from 0 over the warm-up. A fixed number of warm-up steps taken from a recipe for large data
    covers the whole of a small run, which then trains at a fraction of its rate and seems unable to learn. The wsd
    schedule also needs room for its final decay.

    Fix: Set warmup_ratio: 0.03, or fewer warmup_steps than a tenth of the run.

    预热与整个训练一样长，设定的学习率从未达到。

    为何：学习率在预热中从 0 升起。照搬大数据配方里的固定预热步数，会占满一个小训练，使其始终以很小的学习率运行，看上
    去学不动。 wsd 还需要为最后的衰减留出步数。

    办法：设 warmup_ratio: 0.03，或让 warmup_steps 少于总步数的十分之一。
    """
    training, stage, steps = facts.run.training, facts.run.stage, num_steps_of_run(facts)
    if steps is None:
        return
    warmup = warmup_steps_of(training, steps)
    key = f"{stage}.warmup_steps" if training.warmup_steps is not None else f"{stage}.warmup_ratio"
    decay = training.decay_ratio * steps if training.schedule == "wsd" else 0
    if training.warmup_steps is not None and warmup >= steps:
        yield Finding(
            what=f"{key}: {warmup} in a run of {steps} steps: the learning rate is never reached",
            where=facts.origin(key),
            to_do=f"set {key}: {steps // 10}, train longer, or lower {stage}.global_batch",
            changes={key: steps // 10},
        )
    elif training.warmup_steps is not None and warmup > steps / 2 and not is_published(facts, key):
        yield Finding(
            what=f"{key}: {warmup} is more than half of the {steps} steps of this run",
            where=facts.origin(key),
            to_do=f"set {key}: {steps // 10}, or train longer",
            level="warning",
            changes={key: steps // 10},
        )
    elif decay and warmup + decay > steps:
        yield Finding(
            what=f"a warm-up of {warmup} and a final decay of {decay:.0f} steps do not fit into {steps} steps",
            where=facts.origin(f"{stage}.decay_ratio"),
            to_do=f"lower {stage}.decay_ratio or {key}",
            level="warning",
        )


@pitfall("config", cost="hours")
def setting_far_from_published(facts: Facts) -> Iterable[Finding]:
    """A hyper-parameter lies far outside of what any published run uses.

    Why: Such values are accepted by every program and are mostly slips: a percentage for a ratio, a rate in the field
    of a decay, two numbers exchanged. The run works and learns badly.

    Fix: Take the usual value, which the finding names; a wanted experiment goes into `accept`.

    某个超参数远在公开取值之外。

    为何：这样的值任何程序都会接受，而多半是笔误：比例写成百分数，学习率填进了衰减的字段，两个数互换。训练照常进行，只
    是学得很差。

    办法：改用结果中给出的常用值；若是有意的实验，写入 `accept`。
    """
    training, stage = facts.run.training, facts.run.stage
    for name, (low, high, usual) in PUBLISHED.items():
        key, value = f"{stage}.{name}", getattr(training, name, None)
        if value is None or not is_chosen(facts, key) or (value == 0 and name != "beta2"):
            continue
        if not low <= value <= high:
            yield _unusual(facts, key, value, usual)
    if PUBLISHED["beta2"][0] <= training.beta2 < training.beta1 and is_chosen(facts, f"{stage}.beta2"):
        yield _unusual(facts, f"{stage}.beta2", training.beta2, f"above beta1, which is {training.beta1:g}")
    if facts.run.model.method != "full" and facts.run.lora.dropout > 0.5:
        yield _unusual(facts, "lora.dropout", facts.run.lora.dropout, "0 to 0.1")


def _unusual(facts: Facts, key: str, value: float, usual: str) -> Finding:
    return Finding(
        what=f"{key}: {value:g}; usual: {usual}",
        where=facts.origin(key),
        to_do=f"remove {key} for the default, or add setting-far-from-published to accept",
        level="warning",
    )


@pitfall("config", cost="hours")
def interval_longer_than_run(facts: Facts) -> Iterable[Finding]:
    """Checkpoints or log lines are further apart than the run is long, or an early stop can never come.

    Why: An interval copied from a longer run never comes due. The run shows nothing until it ends, and a crash in its
    last hour loses all of it because no checkpoint was written. A patience as long as the number of evaluations is no
    early stop.

    Fix: Remove the interval (ten per run are then planned), or set 0 where only the end is wanted.

    检查点或日志的间隔比整个训练还长，或早停永远不会发生。

    为何：从更长的训练里抄来的间隔永远到不了。训练结束前什么也看不到，最后一小时崩溃就全部丢失，因为从未写过检查点。
    耐心值若不小于评估次数，早停也就不存在。

    办法：删除该间隔（默认每次训练十个），只想在末尾进行则设 0。
    """
    training, stage, steps = facts.run.training, facts.run.stage, num_steps_of_run(facts)
    if steps is None or steps < LONG_RUN_STEPS:
        return
    key, every = f"{stage}.save_every", training.save_every
    if every and every >= steps and is_chosen(facts, key):
        yield Finding(
            what=f"{key}: {every} in a run of {steps} steps: there is no checkpoint before the end",
            where=facts.origin(key),
            to_do=f"remove {key} (ten per run are then planned), or set 0 if that is wanted",
            level="warning",
            changes={key: max(1, steps // 10)},
        )
    if facts.run.log.every > steps and is_chosen(facts, "log.every"):
        yield Finding(
            what=f"log.every: {facts.run.log.every} in a run of {steps} steps: no step but the last is logged",
            where=facts.origin("log.every"),
            to_do="set log.every: 1",
            level="warning",
            changes={"log.every": 1},
            is_safe=True,
        )
    patience, every = training.early_stop_patience, training.evaluate_every
    if (
        patience is not None
        and every
        and patience >= steps // every
        and is_chosen(facts, f"{stage}.early_stop_patience")
    ):
        yield Finding(
            what=f"{key}: {patience} with {steps // every} evaluations in the whole run: it can never stop early",
            where=facts.origin(key),
            to_do=f"lower it, or lower {stage}.evaluate_every",
            level="warning",
        )


@pitfall(
    "config",
    cost="run",
    sources=[
        "https://github.com/axolotl-ai-cloud/axolotl/pull/130",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/134",
        "https://github.com/allenai/open-instruct/issues/464",
        "https://github.com/cvlab-columbia/zero123/issues/44",
    ],
)
def effective_batch_changes_with_oom_fix(facts: Facts) -> Iterable[Finding]:
    """The batch of a published recipe was changed, and its learning rate was kept.

    Why: A rate, a warm-up and a number of steps belong to a batch. Elsewhere the batch shrinks unnoticed when memory
    runs out or cards are missing, because it is the product of three settings. Here the batch is one number that
    memory has nothing to do with; lowering it to save memory changes the recipe and saves nothing.

    Fix: Keep the recipe's global_batch and lower micro_batch_tokens, or name this pitfall in `accept`.

    改了公开配方的批次大小，却保留了它的学习率。

    为何：学习率、预热和步数都与批次相配。在别处，批次是三个设置的乘积，显存不足或显卡数不同时会悄悄变小。在这里批次是
    单独一个数，与显存无关；为省显存而调小它只会改变配方，什么也省不下。

    办法：保留配方的 global_batch，改小 micro_batch_tokens；或把本条写入 `accept`。
    """
    stage, training = facts.run.stage, facts.run.training
    rate_key, key = f"{stage}.learning_rate", f"{stage}.global_batch"
    rows = num_training_rows(facts)
    if not is_published(facts, rate_key) or not is_chosen(facts, key):
        return
    recipe = facts.origin(rate_key).removeprefix("recipe ")
    try:
        published = read_run(recipe).run.training.global_batch
    except UserError:
        return
    ratio = training.global_batch / published
    # A few hundred rows hardly fill one published batch; then a smaller one is no slip.
    if not 0.5 < ratio < 2 and (ratio > 1 or (rows or 0) >= 20 * published):
        yield Finding(
            what=f"{key}: {training.global_batch}, but the learning rate {training.learning_rate:g} of recipe {recipe} "
            f"belongs to {published} rows per step",
            where=facts.origin(key),
            to_do=f"set {key}: {published}; to save memory lower {stage}.micro_batch_tokens",
            level="warning",
            changes={key: published},
        )
