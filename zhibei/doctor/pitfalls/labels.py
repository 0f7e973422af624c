"""Pitfalls of what is learned: cut answers, dropped rows, implausible shares. Rests on the audit of all rows."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, Level, pitfall
from zhibei.doctor.pitfalls.template import setting

MOST_CUT_SHARE, STOP_CUT_SHARE = 0.05, 0.20
MOST_DROPPED_SHARE, STOP_DROPPED_SHARE = 0.02, 0.50
LEAST_LEARNED, MOST_LEARNED = 0.005, 0.98
MOST_NAMED = 8


def examples(facts: Facts, reason: str) -> tuple[str, ...]:
    """The first places of the ledger with a reason, with what happened there."""
    entries = [entry for entry in (facts.rows.ledger if facts.rows else ()) if entry.get("reason") == reason]
    return tuple(f"{entry.get('where') or entry.get('row')}: {entry.get('detail')}" for entry in entries[:MOST_NAMED])


def data_place(facts: Facts, reason: str) -> str:
    """The first record with this reason, else where the data are named."""
    found = examples(facts, reason)
    return found[0].rpartition(": ")[0] if found else setting(facts, "data.sources")


@pitfall(
    "labels",
    kind="construction",
    cost="run",
    because="a row is cut at its end only, so what remains is the beginning of the rendered conversation, header and "
    "all; there is no proportional cut of prompt and answer",
    proof=["tests/data/test_label_promises.py::test_a_cut_row_is_the_beginning_of_the_whole_row"],
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/3143",
        "https://github.com/hiyouga/LlamaFactory/issues/5759",
    ],
)
def cutoff_damages_template() -> None:
    """Cutting a long row takes the template's own headers away.

    Why: Where prompt and answer are each cut to a share of the limit, the system prompt or a turn's header is what is
    lost, and the model learns conversations that no prompt will ever look like.

    Fix: Cut at the end only, or drop long rows (`data.too_long: drop`).

    截断过长的数据时，丢掉了模板自身的标头。

    为何：按比例截断提示与回答时，丢的正是系统提示或某一轮的标头，模型学到的对话与任何提示都不相像。

    办法：只从末尾截断，或丢弃过长的数据（`data.too_long: drop`）。
    """


@pitfall(
    "labels",
    cost="run",
    sources=[
        "https://github.com/hiyouga/LlamaFactory/issues/3945",
        "https://github.com/hiyouga/LlamaFactory/issues/1665",
        "https://github.com/hiyouga/LlamaFactory/issues/3995",
        "https://github.com/hiyouga/LlamaFactory/issues/1136",
    ],
)
def cutoff_drops_eos(facts: Facts) -> Iterable[Finding]:
    """Many answers are cut before their end, so the model is taught to break off.

    Why: A row that is cut at `data.max_tokens` loses the terminator of its last answer. When many rows are cut, going
    on without an end is what the data say, and the fine-tune does not stop.

    Fix: Raise `data.max_tokens`, or drop such rows (`data.too_long: drop`). Never append a terminator to a cut
    answer.

    许多回答在结束前被截断，模型因此学会了半途而止。

    为何：在 `data.max_tokens` 处截断的数据，最后一个回答失去结束标记。被截断的多了，数据所教的就是说个没完，微调后停
    不下来。

    办法：调高 `data.max_tokens`，或丢弃这样的数据（`data.too_long: drop`）。不要给截断的回答补上结束标记。
    """
    if facts.rows is None:
        return
    audit = facts.rows.audit
    lost = (audit.get("terminators") or 0) - (audit.get("terminators_supervised") or 0)
    # A cut row breaks off inside of one answer at most; the answers behind it are gone and teach nothing.
    cut = min(audit.get("rows_cut") or 0, lost)
    learned = (audit.get("terminators_supervised") or 0) + cut
    if not learned or cut <= MOST_CUT_SHARE * learned:
        return
    yield Finding(
        what=f"{cut:,} of {learned:,} answers ({cut / learned:.0%}) are cut at data.max_tokens "
        f"{facts.run.data.max_tokens} and never end",
        where=setting(facts, "data.max_tokens"),
        to_do="raise data.max_tokens, or set data.too_long: drop",
        level=_level(cut / learned, STOP_CUT_SHARE),
        changes={"data.too_long": "drop"},
        evidence=examples(facts, "too_long"),
    )


def _level(share: float, stop: float) -> Level:
    return "stop" if share > stop else "warning"


@pitfall(
    "labels",
    cost="run",
    sources=["https://github.com/huggingface/trl/pull/6025", "https://github.com/huggingface/trl/issues/6668"],
)
def max_length_drop_not_counted(facts: Facts) -> Iterable[Finding]:
    """A good part of the rows is dropped because they are longer than the limit.

    Why: Trainers filter long rows in passing and count nothing, so a limit set for another data set, or a template
    that doubles every text, trains on a remainder that looks like a small data set. Here each dropped row is in the
    ledger, and the share is judged.

    Fix: Raise `data.max_tokens`; the longest rows are in the audit. `data.too_long: cut` keeps them without their
    end.

    相当一部分数据因超过长度上限被丢弃。

    为何：训练器顺手滤掉过长的数据，却不计数。为别的数据集设的上限，或让文本成倍变长的模板，会使训练只剩一部分数据，
    看上去只是数据集较小。这里每条被丢弃的数据都记在账本里，并检查其比例。

    办法：调高 `data.max_tokens`，最长的数据见审计。`data.too_long: cut` 会保留它们，但没有结尾。
    """
    if facts.rows is None:
        return
    audit = facts.rows.audit
    read, dropped = audit.get("rows_read") or 0, (audit.get("dropped") or {}).get("too_long", 0)
    if not read or dropped <= MOST_DROPPED_SHARE * read:
        return
    yield Finding(
        what=f"{dropped:,} of {read:,} rows ({dropped / read:.0%}) have more than data.max_tokens "
        f"{facts.run.data.max_tokens} and are left out",
        where=setting(facts, "data.max_tokens"),
        to_do="raise data.max_tokens (the ledger says how long each dropped row is)",
        level=_level(dropped / read, STOP_DROPPED_SHARE),
        evidence=examples(facts, "too_long"),
    )


@pitfall(
    "labels",
    cost="run",
    errors=[
        r"\bloss'?\s*[:=]\s*'?0(?:\.0+)?'?[,} ].{0,40}grad_norm'?\s*[:= ]\s*'?nan",
        r"all (?:the )?(?:labels|tokens) (?:in your dataset )?are (?:masked|-100)",
    ],
    sources=[
        "https://github.com/huggingface/trl/issues/6668",
        "https://github.com/MakazhanAlpamys/Soup/issues/532",
        "https://github.com/huggingface/trl/issues/3927",
        "https://github.com/huggingface/trl/issues/1053",
        "https://github.com/huggingface/trl/pull/5826",
    ],
)
def truncation_removes_all_targets(facts: Facts) -> Iterable[Finding]:
    """Rows have nothing to learn, because the limit cuts them before their answer begins.

    Why: The mean over no tokens is NaN; one such row is enough to ruin the weights in trainers that average per row,
    while the log shows a loss of zero. Here such rows are dropped into the ledger, from training and held-out rows
    alike, and the count is told.

    Fix: Raise `data.max_tokens` above the length of these prompts, or shorten the prompts.

    有些数据没有可学的内容：上限在回答开始之前就把它们截断了。

    为何：对零个符号求平均得到 NaN；在按条平均的训练器里，一条这样的数据就能毁掉权重，而日志显示损失为零。这里无论训练
    集还是验证集，这样的数据都被移入账本，并报告数量。

    办法：把 `data.max_tokens` 调到超过这些提示的长度，或缩短提示。
    """
    if facts.rows is None:
        return
    audit = facts.rows.audit
    lost, read = audit.get("rows_without_supervision") or 0, audit.get("rows_read") or 0
    if not lost:
        return
    yield Finding(
        what=f"{lost:,} of {read:,} rows have no learned token within data.max_tokens {facts.run.data.max_tokens} and "
        "are left out",
        where=data_place(facts, "nothing_learned"),
        to_do=f"raise data.max_tokens ({setting(facts, 'data.max_tokens')}) above the length of these prompts, "
        "or shorten them",
        level="warning" if lost > 0.01 * read else "note",
        evidence=examples(facts, "nothing_learned"),
    )


@pitfall(
    "labels",
    cost="run",
    sources=[
        "https://github.com/NVIDIA-NeMo/Automodel/pull/3024",
        "https://github.com/huggingface/trl/issues/6361",
        "https://github.com/modelscope/ms-swift/pull/4857",
    ],
)
def mask_by_prefix_length_on_non_prefix_template(facts: Facts) -> Iterable[Finding]:
    """Several answers of a row are learned, and the template writes earlier turns differently from the last.

    Why: Masks found by rendering ever longer prefixes cover the next question or a tool's output with such
    templates. zhibei's spans do not, but the earlier answers still stand in a form that the model will never be
    asked for: without their thoughts, or without what opens an answer.

    Fix: `data.supervise: last_answer` learns the last answer alone, which is written as it will be generated.

    一条数据中有多个回答被学习，而模板对较早的轮次与最后一轮的写法不同。

    为何：靠逐次加长前缀来求掩码的做法，遇到这类模板会把下一个问题或工具输出也算进去。zhibei 的区间不会，
    但较早的回答仍以模型从不会被要求的形式出现：去掉了思考，或没有回答的开头。

    办法：`data.supervise: last_answer` 只学最后一个回答，它的写法与生成时一致。
    """
    template, rows = facts.template, facts.rows
    if template is None or rows is None or not template.rewrites_earlier_turns:
        return
    several = (rows.audit.get("answers") or 0) > (rows.audit.get("rows_kept") or 0)
    if several and facts.run.data.supervise in ("answers", "turns"):
        yield Finding(
            what=f"template {template.name} writes earlier turns differently from the last one, and "
            f"data.supervise: {facts.run.data.supervise} learns all of them ({rows.audit['answers']:,} answers in "
            f"{rows.audit['rows_kept']:,} rows)",
            where=setting(facts, "data.supervise"),
            to_do="set data.supervise: last_answer",
            level="warning",
            changes={"data.supervise": "last_answer"},
        )


@pitfall("labels", cost="run")
def supervised_share_implausible(facts: Facts) -> Iterable[Finding]:
    """Hardly any token is learned, or nearly every one.

    Why: A share near zero means that answers were taken for prompts, or are lost among long contexts; a share near
    one under `supervise: answers` means that whole dialogues stand in the answer field. Both train without
    complaint.

    Fix: Look at some rows with their mask (`zhibei data show`), and correct `columns`, the format or the template.

    几乎没有符号被学习，或者几乎全部都被学习。

    为何：比例接近零，说明回答被当成了提示，或淹没在很长的上下文里；在 `supervise: answers` 下比例接近一，
    说明整段对话都放在回答字段里。两种情况训练都不会报错。

    办法：查看几条数据及其掩码（`zhibei data show`），改正 `columns`、格式或模板。
    """
    if facts.rows is None:
        return
    audit = facts.rows.audit
    share, answers = audit.get("supervised_share"), audit.get("answers") or 0
    if share is None or not answers or not audit.get("tokens"):
        return
    is_high = share > MOST_LEARNED and facts.run.data.supervise in ("answers", "last_answer")
    if share >= LEAST_LEARNED and not is_high:
        return
    yield Finding(
        what=f"{share:.2%} of {audit['tokens']:,} tokens are learned (data.supervise: {facts.run.data.supervise})",
        where=setting(facts, "data.sources"),
        to_do="look at rows with their mask (zhibei data show), and correct data.sources[].columns or data.template",
        level="warning",
    )
