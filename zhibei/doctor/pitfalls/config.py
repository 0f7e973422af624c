"""Pits of the run file's numbers: rates, lengths, intervals, caps and what they mean together. Knows facts only."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.config.resolve import LEARNING_RATES, RATE_FACTORS, value_of
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

REFERENCE_WIDTH = 4096
"""Hidden size of the 7B models whose published rates the bounds below come from."""
# Peaks of pre-training from nothing: 3e-4 for LLaMA-7B (arXiv:2302.13971, table 2). Fine-tuning needs a tenth.
FULL_WARN, FULL_STOP = 3e-4, 2e-3
# 1e-4 to 3e-4 in the QLoRA paper (arXiv:2305.14314, table 9) and Alpaca-LoRA; up to 1e-3 for small ranks.
ADAPTER_WARN, ADAPTER_STOP = 1e-3, 1e-2
STOP_WHATEVER_WIDTH = 0.1
# AdamW moves a weight by at most about the rate; a weight of 0.02 in fp32 has steps of 2e-9 and rounds less away.
ROUNDED_AWAY = 1e-9
# Below the lowest published rates: 1e-6 and up for full fine-tuning; full fine-tuning's 1e-5 is too low for adapters.
FULL_LOW, ADAPTER_LOW = 5e-7, 2e-5
# Preference learning moves a finished model: a tenth of the rates above and far less (arXiv:2305.18290 uses 1e-6).
STAGE_FACTORS = {
    "sft": (1.0, 1.0), "reward": (1.0, 0.2), "dpo": (0.2, 0.02), "ppo": (0.2, 0.02), "grpo": (0.2, 0.02),
    "raft": (1.0, 1.0),
}  # fmt: skip
# The size of an update to a layer grows as rate x alpha / sqrt(rank) (arXiv:2312.03732, section 3). LLaVA's rank 128
# with alpha 256 at 2e-4 (4.5e-3) is where people report divergence; QLoRA's rank 64 with alpha 16 is 4e-4.
MOST_ADAPTER_STEP = 3.2e-3
RANK_OF_PUBLISHED_RATES, MOST_RATE_AT_IT = 32, 4e-4
LARGE_RANK = 64
MANY_PASSES, MANY_PASSES_WATCHED, MANY_ROWS = 5, 10, 1000
CAP_SHARE = 0.95
LEAST_SHARE_SEEN, ROWS_WORTH_SEEING = 0.02, 5000


def is_published(facts: Facts, key: str) -> bool:
    """Whether the value is that of a shipped recipe, i.e. one that somebody trained with and published."""
    return facts.origin(key).startswith("recipe ")


def is_chosen(facts: Facts, key: str) -> bool:
    """Whether the user set it, in the file or on the command line."""
    return facts.origin(key) not in ("default", "planned") and not is_published(facts, key)


def width_of(facts: Facts) -> int | None:
    """Hidden size of the model; None when its config is not here."""
    config = facts.model.config if facts.model is not None else {}
    inner = config.get("text_config")
    for source in (inner if isinstance(inner, dict) else {}, config):
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(source.get(name), int) and source[name] > 0:
                return source[name]
    return None


def num_training_rows(facts: Facts) -> int | None:
    """Rows (or pairs) that are learned; None when they could not be read."""
    if facts.rows is not None:
        return facts.rows.audit.get("rows_train")
    return facts.pairs.num_pairs if facts.pairs is not None and facts.pairs.num_pairs else None


def passes_of(facts: Facts) -> float:
    """How often a training row is seen: epochs, or what max_steps makes of them."""
    training, rows = facts.run.training, num_training_rows(facts)
    if training.max_steps is None:
        return training.epochs
    return training.max_steps * training.global_batch / rows if rows else 0.0


@pitfall(
    "config",
    cost="hours",
    errors=[r"gradient norm.{0,40}(?:exploded|is inf)"],
    sources=["https://arxiv.org/abs/2302.13971", "https://arxiv.org/abs/2305.14314"],
)
def learning_rate_too_high(facts: Facts) -> Iterable[Finding]:
    """The learning rate is far above anything that was ever published for such a model.

    Why: A rate above the peak of pre-training destroys in a few steps what the weights knew. The loss falls for a
    moment, then rises and stays high, or becomes NaN; the hours until somebody looks are lost. The bounds grow as
    models get narrower: a hidden size of 128 takes what would ruin one of 4096.

    Fix: For a 7B model take 1e-5 to 5e-5 with method full and 1e-4 to 3e-4 with adapters; smaller models take more,
    preference learning a tenth. Remove the field to get the default.

    学习率远高于同类模型的任何公开取值。

    为何：高于预训练峰值的学习率几步之内就会毁掉权重里已有的知识：损失先降后升、居高不下或变成 NaN，发现之前的时间全部
    白费。模型越窄，可承受的学习率越大，因此界限随隐藏维度变化。

    办法：7B 模型全量微调取 1e-5 到 5e-5，适配器取 1e-4 到 3e-4；小模型可更大，偏好学习取十分之一。删除该字段即用默认
    值。
    """
    training, key = facts.run.training, f"{facts.run.stage}.learning_rate"
    rate, width = training.learning_rate, width_of(facts)
    if rate is None or is_published(facts, key):
        return
    warn, stop = (FULL_WARN, FULL_STOP) if facts.run.model.method == "full" else (ADAPTER_WARN, ADAPTER_STOP)
    factor = STAGE_FACTORS[facts.run.stage][0] * RATE_FACTORS.get(training.optimizer, 1)
    scale = factor * REFERENCE_WIDTH / width if width else 0.0
    is_ruinous = rate >= STOP_WHATEVER_WIDTH * RATE_FACTORS.get(training.optimizer, 1)
    is_ruinous = is_ruinous or (bool(scale) and rate > stop * scale)
    if is_ruinous or (scale and rate > warn * scale):
        usual = f"up to {warn * scale:.2g} for a hidden size of {width}" if scale else "far below 0.1"
        yield Finding(
            what=f"{key}: {rate:g}; published runs of method {facts.run.model.method} use {usual}",
            where=facts.origin(key),
            to_do=f"set {key} to about {_usual_rate(facts):g}, or remove it for the default",
            level="stop" if is_ruinous else "warning",
            changes={key: _usual_rate(facts)},
        )


def _usual_rate(facts: Facts) -> float:
    run = facts.run
    return LEARNING_RATES[run.stage][run.model.method != "full"] * RATE_FACTORS.get(run.training.optimizer, 1)


@pitfall("config", cost="run", sources=["https://thinkingmachines.ai/blog/lora/"])
def learning_rate_too_low(facts: Facts) -> Iterable[Finding]:
    """The learning rate is so low that nothing, or nearly nothing, is learned.

    Why: AdamW moves a weight by about the rate in each step. Below 1e-9 the change is rounded away even in fp32; below
    the published ranges a run ends with the model it began with, and the log looks calm. A rate of full fine-tuning
    used for adapters does the same: they need about ten times as much. Adafactor multiplies the rate by the size of
    the weights (about 0.02) and so needs fifty times the number of AdamW.

    Fix: Take 1e-5 to 5e-5 with method full, 1e-4 to 3e-4 with adapters, 1e-3 with adafactor; or remove the field.

    学习率太低，什么也学不到。

    为何：AdamW 每步改变权重的幅度约等于学习率；低于 1e-9 时改变量连 fp32 都会舍去，低于公开范围时训练结束仍是原来的模
    型，而日志看上去一切正常。把全量微调的学习率用于适配器也是如此：适配器约需十倍。Adafactor 会再乘以权重大小（约
    0.02），约需五十倍。

    办法：全量微调取 1e-5 到 5e-5，适配器取 1e-4 到 3e-4，adafactor 取 1e-3；或删除该字段。
    """
    training, key = facts.run.training, f"{facts.run.stage}.learning_rate"
    rate = training.learning_rate
    if rate is None or is_published(facts, key):
        return
    is_full = facts.run.model.method == "full"
    factor = RATE_FACTORS.get(training.optimizer, 1)
    low = (FULL_LOW if is_full else ADAPTER_LOW) * STAGE_FACTORS[facts.run.stage][1] * factor
    is_nothing = rate < ROUNDED_AWAY * factor
    if is_nothing or rate < low:
        reason = "smaller than what fp32 can add to a weight" if is_nothing else f"published runs use {low:g} and more"
        yield Finding(
            what=f"{key}: {rate:g} with method {facts.run.model.method} and {training.optimizer}: {reason}",
            where=facts.origin(key),
            to_do=f"set {key} to about {_usual_rate(facts):g}, or remove it for the default",
            level="stop" if is_nothing else "warning",
            changes={key: _usual_rate(facts)},
        )


@pitfall(
    "config",
    cost="hours",
    sources=[
        "https://github.com/haotian-liu/LLaVA/issues/1301",
        "https://github.com/haotian-liu/LLaVA/issues/918",
        "https://github.com/haotian-liu/LLaVA/issues/1375",
        "https://github.com/ssbuild/chatglm_finetuning/issues/28",
        "https://github.com/paiml/aprender/pull/2258",
    ],
)
def lora_rank_with_fixed_lr_diverges(facts: Facts) -> Iterable[Finding]:
    """A large adapter rank is trained with the learning rate of a small one.

    Why: With the usual scale alpha / rank an update grows as rate x alpha / sqrt(rank). Published rates are for ranks
    of 8 to 64; raising rank and alpha together at the same rate makes the loss fall, then jump, after hours.

    Fix: Lower the rate as the rank grows (rank 128: 1e-4, rank 256: 5e-5), or set lora.rslora: true with an alpha of
    about sqrt(rank), whose scale does not grow.

    用小秩的学习率训练大秩的适配器。

    为何：通常缩放为 alpha / rank，更新幅度约为 学习率 × alpha / sqrt(rank)。公开的学习率针对 8 到 64 的秩；秩与 alpha
    一起放大而学习率不变，损失会先降后突然上跳，往往几小时后才显现。

    办法：秩越大学习率越低（128 取 1e-4，256 取 5e-5），或设 lora.rslora: true 且 alpha 约为 sqrt(rank)。
    """
    run, key = facts.run, f"{facts.run.stage}.learning_rate"
    rate, width = run.training.learning_rate, width_of(facts)
    if run.model.method == "full" or run.lora.adapter is not None or rate is None or is_published(facts, key):
        return
    scale = REFERENCE_WIDTH / width if width else 1.0
    rank, alpha = run.lora.rank, run.lora.alpha
    step = rate * alpha / rank**0.5 if not run.lora.rslora else rate * alpha
    most = MOST_RATE_AT_IT * RANK_OF_PUBLISHED_RATES / rank * scale
    is_high_for_rank = rank > LARGE_RANK and not run.lora.rslora and rate > most
    if step > MOST_ADAPTER_STEP * scale or is_high_for_rank:
        good = float(f"{min(rate, most, MOST_ADAPTER_STEP * scale * rate / step):.1g}")
        yield Finding(
            what=f"{key}: {rate:g} with lora.rank: {rank} and lora.alpha: {alpha:g}: an update of rate x scale "
            f"= {step:.2g}, where published runs stay below {MOST_ADAPTER_STEP * scale:.2g}",
            where=facts.origin(key) if is_chosen(facts, key) else facts.origin("lora.rank"),
            to_do=f"set {key}: {good:g}, or lower lora.rank and lora.alpha together",
            level="warning",
            changes={key: good},
        )


@pitfall("config", cost="hours", sources=["https://github.com/hiyouga/LlamaFactory/issues/5145"])
def overtrained_30_epochs(facts: Facts) -> Iterable[Finding]:
    """Every row is seen so often that the model learns the rows by heart.

    Why: One to three passes teach a model to answer; after many it repeats its training rows or a single phrase. More
    than a thousand rows never need more than about five passes. Where held-out rows choose the best weights, ten are
    harmless, but most of the time is still wasted.

    Fix: Set epochs: 3 (or 1 for large data), and keep data.validation so that the best weights are kept.

    每行数据被看的次数太多，模型只是背下了数据。

    为何：一到三遍足以学会回答；遍数过多，模型会复述训练数据或重复同一句话。超过一千行的数据从不需要五遍以上。若由留出
    集挑选最佳权重，十遍以内无害，但大部分时间仍是浪费。

    办法：设 epochs: 3（数据很多时设 1），并保留 data.validation 以保存最佳权重。
    """
    run, rows = facts.run, num_training_rows(facts)
    key = f"{run.stage}.epochs" if run.training.max_steps is None else f"{run.stage}.max_steps"
    if rows is None or rows <= MANY_ROWS or is_published(facts, key):
        return
    weights = [source.weight for source in run.data.sources if not isinstance(source, str)]
    heaviest = max([1.0, *weights])
    passes = passes_of(facts) * heaviest
    is_watched = run.training.keep_best and bool(facts.rows and facts.rows.audit.get("rows_heldout"))
    if passes > (MANY_PASSES_WATCHED if is_watched else MANY_PASSES):
        repeats = f" (weight {heaviest:g} repeats rows within an epoch)" if heaviest > 1 else ""
        yield Finding(
            what=f"{key}: {value_of(run, key)} shows each of {rows:,} rows {passes:.3g} times{repeats}",
            where=facts.origin(key),
            to_do=f"set {run.stage}.epochs: 3, or fewer for large data",
            level="warning",
            changes={f"{run.stage}.epochs": 3} if run.training.max_steps is None else {},
        )


@pitfall(
    "config",
    cost="run",
    sources=[
        "https://github.com/hpcaitech/ColossalAI/issues/4198",
        "https://github.com/binmakeswell/ColossalChat/issues/5",
        "https://github.com/hiyouga/LlamaFactory/issues/6320",
    ],
)
def example_row_cap_left_on(facts: Facts) -> Iterable[Finding]:
    """A cap that was meant for a first try leaves most of the data unused.

    Why: Published commands carry a cap for smoke tests (512 rows, a few steps) and are copied for the real run. The
    run ends after minutes with a good-looking log, and its result is read as "fine-tuning does not work".

    Fix: Remove the cap; if it is wanted, name this pitfall in `accept`.

    为试跑设的上限忘了去掉，大部分数据没有用到。

    为何：公开的命令里常带着试跑用的上限（512 行、几步），被原样复制去正式训练。训练几分钟就结束，日志也好看，结果却被
    误读为“微调没有用”。

    办法：去掉上限；若确有意为之，把本条写入 `accept`。
    """
    run, rows = facts.run, facts.rows
    for number, source in enumerate(run.data.sources):
        if isinstance(source, str) or source.limit is None or rows is None:
            continue
        read, held = rows.audit.get("rows_read", 0), rows.records_in_files
        if read < CAP_SHARE * held:
            yield Finding(
                what=f"data.sources[{number}].limit: {source.limit}: {read:,} of {held:,} records are used "
                f"({read / held:.1%})",
                where=facts.origin("data.sources"),
                to_do=f"remove the limit of {source.path}, or add example-row-cap-left-on to accept",
                level="warning",
                changes={f"data.sources[{number}].limit": None},
            )
            return
    key, trained = f"{run.stage}.max_steps", num_training_rows(facts) or 0
    passes = passes_of(facts)
    if run.training.max_steps is not None and trained >= ROWS_WORTH_SEEING and passes < LEAST_SHARE_SEEN:
        yield Finding(
            what=f"{key}: {run.training.max_steps} ends the run when {passes:.2%} of {trained:,} rows were seen",
            where=facts.origin(key),
            to_do=f"remove {key}, or add example-row-cap-left-on to accept",
            level="warning",
            changes={key: None},
        )


@pitfall("config", cost="run")
def less_than_one_step(facts: Facts) -> Iterable[Finding]:
    """The run ends before its first whole optimiser step.

    Why: A small fraction of an epoch times few rows is less than one global batch. Other programs report success after
    zero steps and save the model they were given.

    Fix: Raise epochs, lower global_batch, or set max_steps.

    训练在第一个完整的优化步之前就结束了。

    为何：很小的 epochs 乘以很少的行数不足一个全局批次。其他程序会在零步之后报告成功，并原样保存给它的模型。

    办法：增大 epochs、减小 global_batch，或设置 max_steps。
    """
    training, rows, stage = facts.run.training, num_training_rows(facts), facts.run.stage
    if rows is None or training.max_steps is not None or rows < training.global_batch:
        return
    seen = training.epochs * rows
    if seen < training.global_batch:
        yield Finding(
            what=f"{stage}.epochs: {training.epochs:g} of {rows:,} rows are {seen:.3g} rows, fewer than one step of "
            f"{stage}.global_batch: {training.global_batch}",
            where=facts.origin(f"{stage}.epochs"),
            to_do=f"set {stage}.epochs: 1 or more, or lower {stage}.global_batch",
            changes={f"{stage}.epochs": 1},
        )
