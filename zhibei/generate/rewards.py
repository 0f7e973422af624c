"""Where rewards come from: a verifier, a Python function, a server, a reward model. Knows texts and tokens, no loop.

A source is a function from answers to one number each. What it gives is checked here, so that a loop only sees
finite numbers, one per answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.generate.verifiers import VERIFIERS, Verifier, matches

MOST_REPLY_BYTES = 64 * 2**20


RETRY_SECONDS = (1.0, 4.0, 16.0)
"""How long a server that failed is left alone before it is asked again; then it counts as broken."""


class RewardFailed(UserError):
    """A source of rewards raised, hung, or gave something that is no reward. What was learned before is sound."""


@dataclass(frozen=True)
class Answered:
    """Answers to be scored. All of one length; `tokens` are prompt and answer together, as the model saw them."""

    prompts: Sequence[str]
    answers: Sequence[str]
    references: Sequence[str | None]
    tokens: Sequence[Sequence[int]]


Scorer = Callable[[Answered], Any]
"""What it gives is looked at by RewardSource, since it may come from anywhere."""


@dataclass(frozen=True)
class RewardSource:
    """`name` is what messages call it; `seconds`: longest time for one batch of answers."""

    name: str
    score: Scorer
    seconds: float
    where: str = "reward"

    def __call__(self, answered: Answered) -> list[float]:
        """One finite reward per answer. Raises RewardFailed naming the source when it raises, hangs, gives more or
        fewer rewards than there are answers, or something that is no finite number."""
        rewards = self._within_time(answered)
        if isinstance(rewards, (str, bytes)) or not hasattr(rewards, "__len__"):
            raise self._fault(f"gave {type(rewards).__name__} instead of a list of numbers")
        if len(rewards) != len(answered.answers):
            raise self._fault(f"gave {len(rewards)} rewards for {len(answered.answers)} answers")
        return [self._number(value, place, answered) for place, value in enumerate(rewards)]

    def _number(self, value: Any, place: int, answered: Answered) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._fault(f"gave {value!r} for answer {place}: {answered.answers[place][:80]!r}")
        return number

    def _within_time(self, answered: Answered) -> Any:
        """Run beside this thread, because a function that hangs cannot be interrupted, only left behind."""
        outcome: list[tuple[bool, Any]] = []

        def work() -> None:
            try:
                outcome.append((True, self.score(answered)))
            except BaseException as problem:  # whatever a user's function raises is told to the user
                outcome.append((False, problem))

        thread = threading.Thread(target=work, name="reward", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not outcome:
            raise self._fault(f"did not answer within {self.seconds:g} s")
        is_fine, result = outcome[0]
        if is_fine:
            return result
        if isinstance(result, (RewardFailed, KeyboardInterrupt)):
            raise result
        line = _line_of(result)
        raise self._fault(f"raised {type(result).__name__}: {result}{line}") from result

    def _fault(self, what: str) -> RewardFailed:
        return RewardFailed(
            f"the reward {self.name} {what}",
            expected="one finite number per answer, in time",
            fix="try it by itself on a few answers; the run can be resumed once it works",
            where=self.where,
        )


def _line_of(problem: BaseException) -> str:
    """Where in the user's own file it went wrong."""
    last = problem.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f" ({Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno})" if last is not None else ""


def reward_source(text: str, *, seconds: float, where: str = "reward") -> RewardSource:
    """The source that a run file names: number, exact, contains, regex:PATTERN, python:MODULE_OR_FILE:FUNCTION, or an
    http address. Raises UserError for anything else, before a run begins."""
    kind, _, rest = text.partition(":")
    makers: dict[str, Callable[[], Scorer]] = {
        **{name: (lambda verify=verify: _verified(verify)) for name, verify in VERIFIERS.items()},
        "regex": lambda: _verified(matches(rest, where=where)),
        "python": lambda: python_function(rest, where=where),
        "http": lambda: server(text, seconds=seconds, where=where),
        "https": lambda: server(text, seconds=seconds, where=where),
    }
    if kind not in makers or (kind in VERIFIERS and rest):
        raise UserError(
            f"the reward {text!r} is not known",
            expected="number, exact, contains, regex:PATTERN, python:MODULE_OR_FILE:FUNCTION, or http://ADDRESS",
            fix="write one of them; a reward model goes into reward_model",
            where=where,
        )
    is_server = kind in ("http", "https")
    return RewardSource(text, makers[kind](), seconds_with_retries(seconds) if is_server else seconds, where)


def needs_references(text: str) -> bool:
    """Whether a source compares with the record's own result; without one every answer would be wrong."""
    return text in VERIFIERS


def _verified(verify: Verifier) -> Scorer:
    return lambda answered: [
        verify(answer, reference) for answer, reference in zip(answered.answers, answered.references, strict=True)
    ]


def python_function(text: str, *, where: str) -> Scorer:
    """`package.module:function` or `path/file.py:function`; called with prompts, answers and references (lists)."""
    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise UserError(
            f"the reward python:{text} names no function",
            expected="python:MODULE:FUNCTION or python:FILE.py:FUNCTION",
            fix="write for example python:rewards.py:score",
            where=where,
        )
    function = getattr(_module(place, where=where), name, None)
    if not callable(function):
        raise UserError(
            f"{place} has no function {name}",
            expected=f"def {name}(prompts, answers, references) giving one number per answer",
            fix="correct the name, or write the function",
            where=where,
        )
    wanted = {"prompts", "answers", "references"}
    try:
        inspect.signature(function).bind(**{argument: [] for argument in wanted})
    except TypeError as problem:
        raise UserError(
            f"{text} cannot be called as {name}(prompts=, answers=, references=): {problem}",
            expected="a function of the lists prompts, answers and references",
            fix=f"write: def {name}(prompts, answers, references, **_): ...",
            where=where,
        ) from None
    return lambda answered: function(
        prompts=list(answered.prompts), answers=list(answered.answers), references=list(answered.references)
    )


def _module(place: str, *, where: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        spec = importlib.util.spec_from_file_location(f"zhibei_reward_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise FileNotFoundError(f"{path} is not there")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as problem:  # a user's module may raise anything while it is imported
        raise UserError(
            f"the reward function's module {place} cannot be loaded: {type(problem).__name__}: {problem}",
            expected="a module that Python can import, or the path of a .py file",
            fix="correct the name or the file",
            where=where,
        ) from problem


def server(address: str, *, seconds: float, where: str) -> Scorer:
    """POST of {"prompts", "answers", "references"} as JSON; the reply is a JSON list of numbers, or {"rewards": it}.

    A server that does not answer, or answers with an error of its own (5xx, 429), is asked again after RETRY_SECONDS.
    """

    def score(answered: Answered) -> Any:
        body = {
            "prompts": list(answered.prompts),
            "answers": list(answered.answers),
            "references": list(answered.references),
        }
        request = urllib.request.Request(
            address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        for pause in (*RETRY_SECONDS, None):
            try:
                with urllib.request.urlopen(request, timeout=seconds) as reply:
                    found = json.loads(reply.read(MOST_REPLY_BYTES))
                break
            except (OSError, ValueError) as problem:  # URLError and timeouts are OSErrors, broken JSON is a ValueError
                if pause is None or not may_pass(problem):
                    asked = "" if pause is not None else f", asked {len(RETRY_SECONDS) + 1} times"
                    raise RewardFailed(
                        f"the reward server {address} failed{asked}: {type(problem).__name__}: {problem}",
                        expected="a JSON list of numbers, one per answer",
                        fix="start the server, or correct the address; the run can be resumed once it answers",
                        where=where,
                    ) from problem
            time.sleep(pause)
        return found["rewards"] if isinstance(found, dict) and "rewards" in found else found

    return score


def may_pass(problem: OSError | ValueError) -> bool:
    """Whether asking again may help: not where the server says that the request is wrong (4xx but 429)."""
    if isinstance(problem, urllib.error.HTTPError):
        return problem.code >= 500 or problem.code == 429
    return isinstance(problem, OSError)


def seconds_with_retries(seconds: float) -> float:
    """The longest that asking a server may take in all."""
    return seconds * (len(RETRY_SECONDS) + 1) + sum(RETRY_SECONDS)


def summed(sources: Sequence[RewardSource]) -> Callable[[Answered], list[float]]:
    """Several sources count together: the sum of what they give."""

    def score(answered: Answered) -> list[float]:
        return [sum(values) for values in zip(*(source(answered) for source in sources), strict=True)]

    return score
