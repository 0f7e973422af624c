"""Questions of the small world to the models of a quickstart, and who was right. Knows runs and the checker.

The world's checker speaks here and nowhere in a stage: what PPO learns from is the reward model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zhibei.evaluate.exact_match import ExactMatch, Question, score
from zhibei.pipeline.scale import LONGEST_ANSWER
from zhibei.pipeline.world.files import asked
from zhibei.store.run_dir import RunDir

ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Answered:
    """The answers of one model to all questions, and which were right."""

    answers: list[str]
    found: ExactMatch


def ask(run: RunDir, questions: Sequence[Question]) -> Answered:
    """Greedy answers of a run's model through the prompts that `zhibei chat` would send."""
    return _answered(_speaker(run), questions)


def draw(run: RunDir, questions: Sequence[Question], *, copies: int, seed: int) -> list[list[str]]:
    """`copies` answers to each question, drawn as PPO draws them."""
    asked_often = [question for question in questions for _ in range(copies)]
    drawn = _answers(_speaker(run), asked_often, temperature=1.0, seed=seed)
    return [drawn[start : start + copies] for start in range(0, len(drawn), copies)]


def course(start: RunDir, run: RunDir, questions: Sequence[Question]) -> dict[int, float]:
    """The share of right answers at each checkpoint of a policy that began as the model of `start`; step 0 is that
    model. The stage itself never sees these figures."""
    from zhibei.store.checkpoint import list_steps, load_checkpoint

    speaker = _speaker(start)
    parameters = dict(speaker.model.hf.named_parameters())
    found = {0: _answered(speaker, questions).found.overall.score}
    for step, path in list_steps(run.checkpoints):
        groups, _ = load_checkpoint(path)
        for name, value in groups["model"].items():
            parameters[name].data.copy_(value)
        found[step] = _answered(speaker, questions).found.overall.score
    return found


def _speaker(run: RunDir) -> Any:
    from zhibei.serve.chat import open_speaker

    return open_speaker(str(run.path))


def _answered(speaker: Any, questions: Sequence[Question]) -> Answered:
    answers = _answers(speaker, questions)
    return Answered(answers, score(questions, answers))


def _answers(speaker: Any, questions: Sequence[Question], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
    from zhibei.generate.options import SamplingOptions
    from zhibei.text.messages import Message

    options = SamplingOptions(
        max_new_tokens=LONGEST_ANSWER, temperature=temperature, batch_rows=ROWS_AT_ONCE, seed=seed
    )
    prompts = [speaker.prompt([Message("user", asked(question))], options) for question in questions]
    return [(answer.text or "").strip() for answer in speaker.answer(prompts, options)]
