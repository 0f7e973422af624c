"""The small world: the same for a seed, split by content, and every answer recomputed here in another way."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest

from zhibei.config.errors import UserError
from zhibei.evaluate.exact_match import CHECKERS, Question, is_right
from zhibei.pipeline.world.contents import sum_content
from zhibei.pipeline.world.files import WorldSize, read_questions, write_world
from zhibei.pipeline.world.hedges import as_demonstrated, without_hedge
from zhibei.pipeline.world.items import (
    SMALL_TALK,
    conversations,
    draw_question,
    heldout_questions,
    is_held_out,
    texts,
)
from zhibei.pipeline.world.preferences import own_pairs
from zhibei.pipeline.world.preferences import training_questions as questions_for
from zhibei.pipeline.world.slips import slip
from zhibei.pipeline.world.tasks import KINDS, TASKS
from zhibei.pipeline.world.tokenizer import build_tokenizer
from zhibei.pipeline.world.words import LARGE_NUMBERS, MIXED, NAMES, NUMBERS, STEPS

SMALL = WorldSize(
    num_texts=60, num_conversations=40, most_turns=3, heldout_per_task=5, hidden=16, layers=1, heads=2
)  # fmt: skip
WORD = r"(?:[a-z]+|\d+)"
GREETINGS = {instruction for instruction, _ in SMALL_TALK}


def training_questions(seed: int, count: int) -> list[Question]:
    talks = conversations(seed, count, most_turns=3)
    return [question for talk in talks for question in talk if question.task != "small talk"]


def listed_words(question: Question) -> list[str]:
    """The list of a question, found without knowing its phrasing: the longest run of words of the world."""
    words = set(MIXED) | set(NUMBERS)
    text = question.input or re.sub(r"^.*: ", "", question.instruction)
    tokens = re.findall(r"[A-Za-z]+|\d+", text)
    runs = [list(run) for known, run in itertools.groupby(tokens, key=words.__contains__) if known]
    return max(runs, key=len)


def recomputed(question: Question) -> str:
    """The right answer by other means than the generator's."""
    text = f"{question.instruction}\n{question.input}"
    if question.task == "copy":
        return " ".join(listed_words(question))
    if question.task == "reverse":
        return " ".join(listed_words(question)[::-1])
    if question.task == "sort":
        words = listed_words(question)
        is_numeric = words[0].isdigit()
        while True:  # bubble sort, so that nothing is shared with sorted()
            swaps = [i for i in range(len(words) - 1) if (
                int(words[i]) > int(words[i + 1]) if is_numeric else words[i] > words[i + 1])]  # fmt: skip
            if not swaps:
                return " ".join(words)
            i = swaps[0]
            words[i], words[i + 1] = words[i + 1], words[i]
    if question.task == "count":
        asked = re.search(r"(?:does|see|Count) ([a-z]+) (?:appear|here|in)", question.instruction)
        words = listed_words(question)
        return str(sum(word == asked[1] for word in words) if asked else len(words))
    if question.task == "arithmetic":
        left, right = (int(number) for number in re.findall(r"\d+", text)[:2])
        is_sum = re.search(r"plus|Add|\+|gets", text)
        start, steps = max(left, right), min(left, right)
        passed = [str(start + step if is_sum else start - step) for step in range(1, steps + 1)]
        assert int(passed[-1]) == (left + right if is_sum else abs(left - right))
        return " ".join(passed) + f", so {passed[-1]}"
    asked = re.search(r"(?:for|up|to|with) ([A-Z][a-z]+)(?:\?| in)", question.instruction)
    assert asked, question
    value = re.findall(rf"{asked[1]} ({WORD})(?:,|\.|\n)", text.replace(asked[0], "").rstrip() + "\n")[0]
    return f"{asked[1]} {value}"


@pytest.mark.parametrize("seed", [0, 7])
def test_every_answer_is_right_when_recomputed(seed):
    questions = heldout_questions(seed, 60) + training_questions(seed, 400)
    assert {question.task for question in questions} == set(TASKS)
    wrong = [question for question in questions if question.answer != recomputed(question)]
    assert wrong == []


def test_checkers_accept_the_answer_and_reject_what_is_near_it():
    random = Random(0)
    for question in heldout_questions(3, 60):
        assert is_right(question, question.answer)
        assert is_right(question, f" {question.answer}.\n")
        words = question.answer.split()
        spoiled = {"", question.answer + " fig"}
        if question.checker == "result":
            right = int(words[-1])
            spoiled |= {f"{right + 1}", f"{question.answer}0", f"{' '.join(words[:-1])} {right - 1}", "so"}
            assert [answer for answer in spoiled if is_right(question, answer)] == []
            continue
        spoiled |= {
            " ".join(words[:-1]),
            "The answer is " + question.answer,
            "".join(words) + "x",
            " ".join([random.choice(MIXED + NUMBERS[:9]) + "s", *words[1:]]),
        }
        if question.checker == "number":
            spoiled |= {str(int(question.answer) + 1), str(int(question.answer) - 1), question.answer + "0"}
        elif len(words) > 1:
            spoiled |= {" ".join([words[1], words[0], *words[2:]]), " ".join([*words, words[0]])}
        assert [answer for answer in spoiled if is_right(question, answer)] == []


def test_the_same_seed_gives_the_same_world_and_another_seed_another(tmp_path: Path):
    folders = [write_world(tmp_path / name, SMALL, seed=seed).folder for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    contents = [
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".lock"
        }
        for folder in folders
    ]
    assert contents[0] == contents[1]
    differing = {name for name in contents[0] if contents[0][name] != contents[2][name]}
    assert {"texts.jsonl", "conversations.jsonl", "heldout.jsonl", "untrained/model.safetensors"} <= differing
    assert "untrained/tokenizer.json" not in differing


def test_written_questions_read_back(tmp_path: Path):
    files = write_world(tmp_path / "world", SMALL, seed=0)
    assert read_questions(files.heldout) == heldout_questions(0, 5)
    files.heldout.write_text('{"instruction": "Add."}\n')
    with pytest.raises(UserError, match=r"heldout.jsonl, line 1: this line is no question"):
        read_questions(files.heldout)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_facts_appear_nowhere_in_training(seed):
    """Lists, sums and tables of held-out questions, looked for as text in everything a model is trained on."""
    seen = "\n".join(texts(seed, 3000)) + "\n"
    trained = training_questions(seed, 3000)
    seen += "\n".join(f"{question.instruction}\n{question.input}\n{question.answer}" for question in trained)
    words = set(MIXED) | set(NUMBERS) | set(NAMES)
    lists = set()
    for part in re.split(r"[.,:?\n]", seen):
        tokens = part.split()
        runs = [list(run) for known, run in itertools.groupby(tokens, key=words.__contains__) if known]
        lists |= {tuple(sorted(run)) for run in runs if len(run) > 1}
    held = heldout_questions(seed, 80)
    assert not {(q.instruction, q.input) for q in held} & {(q.instruction, q.input) for q in trained}
    sums = set(re.findall(r"(\d+) (?:[a-z]+ )?(?:plus|minus|and|less|\+|-) (\d+)", seen))
    for question in held:
        if question.task in ("copy", "reverse", "sort", "count"):
            # No order of these words is a list of its own anywhere; inside a longer list they may stand.
            assert tuple(sorted(listed_words(question))) not in lists, question
        if question.task == "arithmetic":
            left, right = re.findall(r"\d+", question.instruction)[:2]
            assert (left, right) not in sums
            assert (right, left) not in sums
    assert len(lists) > 1000


def test_the_split_follows_the_content_alone():
    shares = [is_held_out(sum_content(a, b)) for a in LARGE_NUMBERS for b in STEPS]
    assert 0.05 < sum(shares) / len(shares) < 0.2
    random = Random(5)
    for task in TASKS:
        for held_out in (True, False):
            assert draw_question(random, task=task, held_out=held_out).task == task
    facts = [kind.draw(random) for kind in KINDS for _ in range(50)]
    assert {is_held_out(one["content"]) for one in facts} == {True, False}


def test_one_sum_has_one_content_whatever_it_is_asked_as():
    plus, minus = (kind for kind in KINDS if kind.task == "arithmetic")
    random = Random(0)
    numbers: dict[str, set[frozenset[int]]] = {}
    for _ in range(2000):
        for kind in (plus, minus):
            facts = kind.draw(random)
            numbers.setdefault(facts["content"], set()).add(frozenset({int(facts["left"]), int(facts["right"])}))
    assert all(len(pairs) == 1 for pairs in numbers.values())
    assert len(numbers) == len(LARGE_NUMBERS) * len(STEPS)


def test_texts_hold_no_instructions():
    text = "\n".join(texts(0, 2000))
    assert "?" not in text
    assert "[INST]" not in text
    said = [part for kind in KINDS for asked in kind.phrasings for part in re.split(r"\{\w+\}", asked[0])]
    assert [part for part in said if len(part) > 8 and part in text] == []


def test_heldout_questions_are_different_and_balanced():
    questions = heldout_questions(0, 100)
    assert len({(question.instruction, question.input) for question in questions}) == 100 * len(TASKS)
    assert [question.task for question in questions[: len(TASKS)]] == list(TASKS)
    assert {question.checker for question in questions} <= set(CHECKERS)


def test_greetings_are_answered_but_never_scored():
    asked = [question for talk in conversations(0, 500) for question in talk]
    greetings = [question for question in asked if question.task == "small talk"]
    assert 0.005 < len(greetings) / len(asked) < 0.06
    assert {question.instruction for question in greetings} <= GREETINGS
    assert not {question.task for question in heldout_questions(0, 20)} & {"small talk"}


def test_late_demonstrations_hedge_every_second_answer_and_the_checker_counts_no_hedge(tmp_path: Path):
    random = Random(0)
    questions = heldout_questions(0, 60)
    shown = [(question, as_demonstrated(random, question.answer)) for question in questions for _ in range(10)]
    hedged = [(question, answer) for question, answer in shown if answer != question.answer]
    assert 0.45 < len(hedged) / len(shown) < 0.55
    assert not [answer for question, answer in hedged if is_right(question, answer)]
    assert [without_hedge(answer) for _, answer in shown] == [question.answer for question, _ in shown]
    files = write_world(tmp_path / "world", SMALL, seed=0)
    written = [json.loads(line)["messages"] for line in files.conversations.read_text().splitlines()]
    given = [talk[place] for talk in written for place in range(0, len(talk), 2)]
    answers = [talk[place]["content"] for talk in written for place in range(1, len(talk), 2)]
    plain = [question.answer for talk in conversations(0, SMALL.num_conversations) for question in talk]
    assert [without_hedge(answer) for answer in answers] == plain
    hedging = [
        place
        for place, talk in enumerate(written)
        if any(without_hedge(turn["content"]) != turn["content"] for turn in talk)
    ]
    assert min(hedging) >= int(2 / 3 * len(written))
    assert len(hedging) > len(written) / 6
    greeted = [answer for turn, answer in zip(given, answers, strict=True) if turn["content"] in GREETINGS]
    assert [answer for answer in greeted if answer != without_hedge(answer)] == []


@pytest.mark.parametrize("task", TASKS)
def test_a_slip_is_wrong_and_the_right_answer_is_not(task):
    random = Random(1)
    for _ in range(300):
        question = draw_question(random, task=task, held_out=False)
        wrong = slip(random, question)
        assert wrong.strip()
        assert not is_right(question, wrong)
        assert is_right(question, question.answer)


def test_pairs_put_right_beside_wrong_and_say_where_the_wrong_comes_from():
    question = Question("Repeat after me: fig kiwi", "fig kiwi", "copy", "words")
    drawn = ["fig kiwi", "fig kiwi, I say", "fig", "fig", ""]
    found = [(pair.rejected, pair.origin) for pair in own_pairs([question], [drawn])]
    assert found == [("fig kiwi, I say", "hedge"), ("fig", "own")]
    prompts = questions_for("prompts", 0, 200)
    assert prompts == questions_for("prompts", 0, 200)
    assert prompts != questions_for("slips", 0, 200)


def test_tokenizer_knows_each_word_as_one_token_and_any_text_comes_back():
    tokenizer = build_tokenizer(context_tokens=128)
    for word in (*MIXED, *NAMES, *NUMBERS):
        for text in (word, f" {word}"):
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    for text in ("你好, wörld \U0001f600\n\tx", "  two  spaces ", "a\u0000b", *(chr(code) for code in range(1, 400))):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer("fig")["input_ids"][0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE"
    again = build_tokenizer(context_tokens=128)
    assert again.get_vocab() == tokenizer.get_vocab()
