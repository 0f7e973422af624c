"""Pits of pairs that the window, their making or their columns spoil. Knows counts, not pairs."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.counts import counted, found_in_rows, level_of_share, noun_of, share
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.pitfall import Finding, pitfall

CUT_SHARE, WINDOW_SHARE = 0.01, 0.01
CONTRADICTION_SHARE, CONTRADICTION_LEAST = 0.02, 2


@pitfall(
    "preference",
    cost="hours",
    sources=["https://github.com/OpenRLHF/OpenRLHF/issues/1311", "https://github.com/natolambert/rlhf-book/issues/503"],
)
def pref_pair_identical_after_truncation(facts: Facts) -> Iterable[Finding]:
    """Two answers differ only behind data.max_tokens.

    Why: After the cut both rows are the same ids. Their loss stays at ln 2, their gradient is zero, and they dilute
    every batch. Here they are dropped and listed; many of them mean that the window is too small for these data.

    Fix: Raise data.max_tokens.

    两个回答只在 data.max_tokens 之后才有差别。

    为何：截断后两行的编号完全一样。损失停在 ln 2，梯度为零，还会冲淡每个批次。这里会丢弃并列出它们；
    数量多说明窗口对这些数据太小。

    办法：增大 data.max_tokens。
    """
    pairs = facts.pairs
    if pairs is None or not pairs.identical_after_cut.count:
        return
    total = pairs.num_pairs + pairs.identical_after_cut.count
    if share(pairs.identical_after_cut.count, total) >= CUT_SHARE:
        yield found_in_rows(
            pairs.identical_after_cut,
            what=f"{counted(pairs.identical_after_cut.count, total, 'pairs')} are equal within data.max_tokens: "
            f"{facts.run.data.max_tokens} and teach nothing",
            to_do="raise data.max_tokens",
            place=facts.origin("data.max_tokens"),
            level=level_of_share(pairs.identical_after_cut.count, total),
        )


@pitfall(
    "preference",
    cost="hours",
    errors=[r"max_prompt_length.{0,60}(?:larger|greater|>=|==|equal|exceed|must be|should be).{0,40}max_length"],
    sources=["https://github.com/huggingface/trl/issues/3339"],
)
def simpo_max_prompt_ge_max_length(facts: Facts) -> Iterable[Finding]:
    """Prompts fill the whole window, so that no token of an answer is left.

    Why: A mean over no token is NaN, hours after the start; where such rows are skipped the run learns from the short
    prompts only. Here they are dropped and listed.

    Fix: Raise data.max_tokens, or shorten the prompts.

    提示占满了整个窗口，回答一个词元也不剩。

    为何：对零个词元求平均得到 NaN，而且要几小时后才出现；若跳过这些行，就只从短提示里学习。这里会丢弃并列出它们。

    办法：增大 data.max_tokens，或缩短提示。
    """
    pairs = facts.pairs
    if pairs is None or not pairs.prompt_fills_window.count:
        return
    total = pairs.num_pairs + pairs.prompt_fills_window.count
    if share(pairs.prompt_fills_window.count, total) >= WINDOW_SHARE:
        yield found_in_rows(
            pairs.prompt_fills_window,
            what=f"in {counted(pairs.prompt_fills_window.count, total, noun_of(facts))} the prompt leaves no room for "
            f"an answer (data.max_tokens: {facts.run.data.max_tokens})",
            to_do="raise data.max_tokens, or shorten the prompts",
            place=facts.origin("data.max_tokens"),
            level=level_of_share(pairs.prompt_fills_window.count, total),
        )


@pitfall("preference", cost="run")
def pairs_contradict(facts: Facts) -> Iterable[Finding]:
    """The same two answers are preferred both ways round.

    Why: What one record teaches another unteaches; the accuracy cannot exceed the share of agreement. It happens when
    votes of several people were joined, or when a file was joined with its own exchanged copy.

    Fix: Keep the majority of the votes, one record per pair of answers.

    同样的两个回答，有的记录偏好这个，有的偏好那个。

    为何：一条记录教的被另一条抵消，准确率不可能高于意见一致的比例。多人投票合并，或文件与自己的对调副本拼在一起时会这样。

    办法：按多数票保留，每对回答只留一条记录。
    """
    pairs = facts.pairs
    if pairs is None or pairs.kind == "prompts":
        return
    seen = pairs.contradictions
    if seen.count >= CONTRADICTION_LEAST and share(seen.count, pairs.num_pairs) >= CONTRADICTION_SHARE:
        yield found_in_rows(
            seen,
            what=f"{counted(seen.count, pairs.num_pairs, noun_of(facts))} say the opposite of an earlier one",
            to_do="keep one record per pair of answers, the one that most people gave",
        )


@pitfall("preference", cost="run")
def pairs_look_exchanged(facts: Facts) -> Iterable[Finding]:
    """Chosen and rejected look exchanged.

    Why: With the columns exchanged a model learns to prefer what people disliked. The loss falls as it should and the
    accuracy rises; only the finished model shows it. A negative margin says it outright; rejected answers that are
    several times longer in nearly every pair suggest it.

    Fix: Look at some pairs with `zhibei data inspect FILE`; exchange the fields with
    columns: {chosen: rejected, rejected: chosen} if they are.

    chosen 与 rejected 看起来对调了。

    为何：列对调后，模型会学着偏好人们不喜欢的回答。损失照样下降，准确率照样上升，最后才看得出来。负的 margin 是明证；
    几乎每一对里被拒绝的回答都长好几倍则是迹象。

    办法：用 `zhibei data inspect 文件` 看几对；若确实对调，用 columns: {chosen: rejected, rejected: chosen} 换回来。
    """
    pairs = facts.pairs
    if pairs is None or pairs.kind != "pairs":
        return
    negative = pairs.negative_margin
    if negative.count:
        given = int(pairs.audit.get("margins_given", pairs.num_pairs)) or pairs.num_pairs
        some = counted(negative.count, given, "margins")
        yield found_in_rows(
            negative,
            what=f"{some} are negative: by them the rejected answer is the better one",
            to_do="exchange chosen and rejected there, or leave the records out",
            level=level_of_share(negative.count, given),
        )
    if pairs.looks_swapped:
        yield Finding(
            what=f"chosen and rejected may be exchanged: {pairs.looks_swapped}",
            where=facts.origin("data.sources"),
            to_do="look at some pairs with `zhibei data inspect FILE`; if they are exchanged: "
            "columns: {chosen: rejected, rejected: chosen}",
            level="warning",
        )
