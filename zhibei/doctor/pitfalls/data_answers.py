"""Pits of answers: all alike, copies of the question, somebody else's phrases, cut off. Knows counts, not answers."""

from __future__ import annotations

from collections.abc import Iterable

from zhibei.doctor.counts import counted, found_in_rows, kept, noun_of, rows_of, share
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.rows import Seen
from zhibei.doctor.pitfall import Finding, pitfall

SAME_ANSWER_SHARE, SAME_ANSWER_LEAST = 0.8, 20
ECHO_SHARE = 0.2
# Conversations that people kept from ChatGPT hold such phrases in 2 to 8 % of their answers.
DISCLAIMER_SHARE, OTHER_NAME_SHARE, CUT_OFF_SHARE = 0.2, 0.05, 0.15
LEAST_HITS = 5


def _met(facts: Facts, rule: str, least_share: float) -> Seen | None:
    """What a rule of zhibei.data.clean found, where that is a share worth telling."""
    rows = rows_of(facts)
    seen = rows.suspicious.get(rule) if rows is not None else None
    if rows is None or seen is None or seen.count < LEAST_HITS:
        return None
    return seen if share(seen.count, kept(rows.audit)) >= least_share else None


def _some(facts: Facts, seen: Seen) -> str:
    rows = rows_of(facts)
    return counted(seen.count, kept(rows.audit) if rows is not None else 0, noun_of(facts))


@pitfall("data", cost="run")
def answers_all_the_same(facts: Facts) -> Iterable[Finding]:
    """Nearly every row gives the same answer.

    Why: A mapping that reads the wrong field, or a default that was filled in, makes one text the answer to everything.
    The loss falls quickly and looks like success; the model says that text whatever it is asked.

    Fix: Look at the rows (`zhibei data inspect FILE`) and name the field of the answer with `columns`.

    几乎每一行的回答都一样。

    为何：字段对应错了，或填入了默认值，就会让同一段文本成为一切问题的答案。损失很快下降，看似成功；模型则无论问什么都只说这句话。

    办法：查看这些行（`zhibei data inspect 文件`），并用 `columns` 指明答案所在的字段。
    """
    rows = facts.rows
    if rows is None:
        return
    same, total = rows.same_answer, int(rows.audit.get("rows_train", 0))
    if same.count >= SAME_ANSWER_LEAST and share(same.count, total) >= SAME_ANSWER_SHARE:
        yield found_in_rows(
            same,
            what=f"{counted(same.count, total, 'training rows')} have one and the same answer",
            to_do="name the field that holds the answers with columns: {output: ...}",
        )


@pitfall("data", cost="run")
def answers_repeat_the_question(facts: Facts) -> Iterable[Finding]:
    """Many answers are the question word for word.

    Why: The field of the question was read twice. The model learns to copy, and its loss becomes very low.

    Fix: Name the field of the answer with `columns`; where copying is the task, name this pitfall in `accept`.

    许多回答与问题一字不差。

    为何：问题所在的字段被读了两次。模型只学会照抄，损失会变得很低。

    办法：用 `columns` 指明答案所在的字段；若任务本来就是照抄，请把本条写入 `accept`。
    """
    echo = _met(facts, "answer_repeats_question", ECHO_SHARE)
    if echo is not None:
        yield found_in_rows(
            echo,
            what=f"in {_some(facts, echo)} the answer is the question, word for word",
            to_do="name the field that holds the answers with columns: {output: ...}",
        )


@pitfall("data", cost="run")
def answers_speak_as_another_model(facts: Facts) -> Iterable[Finding]:
    """Many answers refuse or speak in the name of another model.

    Why: Answers copied from a service say "As an AI language model, I cannot" or "I am ChatGPT". A model tuned on many
    of them refuses harmless requests and claims to be the other one.

    Fix: Remove such answers, or keep few; `zhibei data inspect FILE` shows them. Add rows that say who the model is.

    许多回答在拒绝，或以另一个模型的名义说话。

    为何：从某个服务复制来的回答会说“作为一个 AI 语言模型，我不能……”或“我是 ChatGPT”。用很多这样的回答微调，
    模型会拒绝无害的请求，并自称是别的模型。

    办法：删除这类回答，或只保留少量；`zhibei data inspect 文件` 会列出它们。可另加说明模型身份的行。
    """
    for rule, least, says in (
        ("assistant_disclaimer", DISCLAIMER_SHARE, 'an answer speaks "as an AI language model" or of its cut-off date'),
        ("names_another_model", OTHER_NAME_SHARE, "an answer names another model or its maker unasked"),
    ):
        seen = _met(facts, rule, least)
        if seen is not None:
            yield found_in_rows(
                seen,
                what=f"in {_some(facts, seen)} {says}",
                to_do="look at them with `zhibei data inspect FILE`, and remove what your model should not say",
            )


@pitfall("data", cost="run")
def answers_cut_off(facts: Facts) -> Iterable[Finding]:
    """Many long answers stop in the middle of a sentence or of code.

    Why: They were made with a limit on tokens. The terminator then stands behind half a sentence, and the model learns
    to stop there.

    Fix: Make the answers again with a higher limit, or remove those that were cut.

    许多长回答停在句子或代码中间。

    为何：它们生成时受到词元上限限制。结束符于是跟在半句话之后，模型会学着在那里停下。

    办法：用更高的上限重新生成，或删除被截断的回答。
    """
    seen = _met(facts, "cut_off_answer", CUT_OFF_SHARE)
    if seen is not None:
        yield found_in_rows(
            seen,
            what=f"in {_some(facts, seen)} a long answer stops in the middle",
            to_do="make those answers again with a higher limit, or remove them",
        )
