"""`zhibei quickstart`: from nothing to a model people prefer, measured at every step. Knows the order of stages.

The stages are ordinary runs: `pretrain.yaml`, `sft.yaml`, `reward.yaml` and `ppo.yaml` in the folder can be changed and
trained again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from zhibei.evaluate.exact_match import Question
from zhibei.evaluate.stats import compare_paired
from zhibei.pipeline.asking import Answered, ask, course, draw
from zhibei.pipeline.handover import hand_over
from zhibei.pipeline.learned import course_of, reward_of
from zhibei.pipeline.outcome import Outcome, Step
from zhibei.pipeline.place import Order, Place, take_place
from zhibei.pipeline.scale import SCALES, Scale, ppo_file, pretrain_file, reward_file, sft_file
from zhibei.pipeline.stage import Watch, stage_record, train_stage
from zhibei.pipeline.summary import Stage, summary_of, write_summary
from zhibei.pipeline.world.files import WorldFiles, asked, read_questions, write_json_lines, write_world
from zhibei.pipeline.world.preferences import (
    PreferenceFiles,
    own_pairs,
    slip_pairs,
    training_questions,
    write_preferences,
)
from zhibei.store.pipeline_dir import write_pipeline
from zhibei.store.run_dir import RunDir


@dataclass
class Going:
    """A quickstart under way: what was asked for, where it writes, who is told, and what was found so far."""

    order: Order
    folder: Path
    scale: Scale
    watch: Watch
    outcome: Outcome
    measured_at: float
    questions: list[Question] = field(default_factory=list)
    answered: dict[str, Answered] = field(default_factory=dict)

    def measure(self, name: str, run: RunDir, text: str) -> None:
        """Ask all questions to a model; its seconds count from the measurement before."""
        self.watch(stage_record(f"ask {name}", text))
        self.answered[name] = ask(run, self.questions)
        share = self.answered[name].found.overall
        now = time.monotonic()
        self.outcome.stages.append(
            Stage(name, "exact_match", share.score, share.low, share.high, now - self.measured_at)
        )
        self.measured_at = now


def run_world(place: Place, order: Order, *, watch: Watch, started: float) -> Outcome:
    """Make the world, pre-train, fine-tune, learn preferences, and measure every model on held-out questions; all of it
    stays in a folder. `order.until` ends it earlier.

    `watch` gets the records of training and, for each stage, {"kind": "stage", "name": ..., "text": ...}.
    `started` is the time.monotonic() from which total_seconds counts. Raises what training raises; what is done by
    then is kept, and the same call goes on from there.
    """
    take_place(place, order)
    folder, outcome = place.folder.resolve(), Outcome(place.folder)
    going = Going(order, folder, SCALES[order.size], watch, outcome, measured_at=started)
    done: list[str] = []
    with _one_thread():
        for stages in STAGES_UNTIL[order.until]:
            done += stages(going)
        _compare(going)
    final = [name for name in done if name in going.answered][-1]
    write_pipeline(folder, stages=done, final=final)
    outcome.summary = summary_of(outcome.stages, seed=order.seed, total_seconds=time.monotonic() - started)
    write_summary(folder, outcome.summary)
    return outcome


def _supervised(going: Going) -> list[str]:
    """World, pre-training and fine-tuning."""
    folder, order, scale, watch = going.folder, going.order, going.scale, going.watch
    watch(stage_record("world", f"texts, conversations and held-out questions, seed {order.seed}"))
    files = WorldFiles(folder / "world")
    if not files.folder.is_dir():
        files = write_world(files.folder, scale.world, seed=order.seed)
    going.questions = read_questions(files.heldout)

    watch(stage_record("pretrain", "a small LLaMA reads the texts and learns how this world works"))
    pretrain = train_stage(pretrain_file(folder, files, scale=scale, seed=order.seed), watch=watch)
    going.measure("base", pretrain, f"{len(going.questions)} held-out questions, none of them seen in training")

    watch(stage_record("sft", "it learns to answer from demonstrations; late ones often end in a needless hedge"))
    run_file = sft_file(folder, files, scale=scale, seed=order.seed, method=order.method)
    going.measure("sft", train_stage(run_file, watch=watch), "the same questions to the fine-tuned model")
    return ["pretrain", "sft"]


def _preferred(going: Going) -> list[str]:
    """Preference pairs and the reward model."""
    watch = going.watch
    watch(stage_record("preferences", "its answers to training questions; the better one of two is marked"))
    files = _preferences(going)
    watch(stage_record("reward", "a reward model learns from the pairs which answer is better"))
    run = train_stage(reward_file(going.folder, files, scale=going.scale, seed=going.order.seed), watch=watch)
    going.outcome.reward = reward_of(run)
    return ["reward"]


def _preferences(going: Going) -> PreferenceFiles:
    files = PreferenceFiles(going.folder / "preferences")
    if files.folder.is_dir():
        return files
    size, seed = going.scale.preferred, going.order.seed
    questions = training_questions("own answers", seed, size.asked)
    answers = draw(RunDir(going.folder / "sft"), questions, copies=size.copies, seed=seed)
    slips = slip_pairs(training_questions("slips", seed, size.slips), seed=seed)
    learned = going.scale.learned
    num_prompts = learned.heldout_prompts + 2 * learned.batch * learned.iterations
    prompts = training_questions("prompts", seed, num_prompts)
    return write_preferences(files.folder, chain(own_pairs(questions, answers), slips), prompts)


def _policy(going: Going) -> list[str]:
    """PPO from the reward model's scores; the world's checker has no part in it."""
    order, scale, folder = going.order, going.scale, going.folder
    going.watch(stage_record("ppo", "it writes answers, and learns from the scores that the reward model gives them"))
    files = PreferenceFiles(folder / "preferences")
    run = train_stage(ppo_file(folder, files, scale=scale, seed=order.seed, method=order.method), watch=going.watch)
    going.measure("ppo", run, "the same questions to the policy, and to its checkpoints on the way")
    going.outcome.course = course_of(run, course(RunDir(folder / "sft"), run, going.questions))
    going.watch(stage_record("handover", "the policy as one GGUF file, compared with what it was made of"))
    going.outcome.handed_over = hand_over(folder, run)
    return ["ppo"]


Stages = Callable[[Going], list[str]]
STAGES_UNTIL: dict[str, tuple[Stages, ...]] = {
    "sft": (_supervised,),
    "reward": (_supervised, _preferred),
    "ppo": (_supervised, _preferred, _policy),
}
"""What is done until where; each part gives the runs it made."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from more threads, and gives the same figures whatever the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(going: Going) -> None:
    """Models beside one another on the same questions: over all, by task, and in words."""
    outcome, names = going.outcome, list(going.answered)
    for before, after in pairwise(names):
        pair = compare_paired(going.answered[before].found.right, going.answered[after].found.right)
        outcome.steps.append(Step(before, after, pair))
    outcome.by_task = _by_task(going.answered)
    write_json_lines(going.folder / "answers.jsonl", _answer_rows(going.questions, going.answered))
    outcome.examples = _examples(going.questions, going.answered)


def _by_task(answered: dict[str, Answered]) -> dict[str, dict[str, Any]]:
    first = next(iter(answered.values())).found
    return {
        task: {
            "questions": share.total,
            **{
                name: {"score": own.score, "low": own.low, "high": own.high}
                for name, own in ((name, one.found.by_task[task]) for name, one in answered.items())
            },
        }
        for task, share in first.by_task.items()
    }


def _answer_rows(questions: Sequence[Question], answered: dict[str, Answered]) -> list[dict[str, Any]]:
    return [
        {"task": question.task, **_side_by_side(questions, answered, number)}
        for number, question in enumerate(questions)
    ]


def _examples(questions: Sequence[Question], answered: dict[str, Answered]) -> list[dict[str, Any]]:
    """The first question of each task, whatever the answers."""
    first: dict[str, int] = {}
    for number, question in enumerate(questions):
        first.setdefault(question.task, number)
    return [_side_by_side(questions, answered, number) for number in first.values()]


def _side_by_side(questions: Sequence[Question], answered: dict[str, Answered], number: int) -> dict[str, Any]:
    return {
        "question": asked(questions[number]),
        "expected": questions[number].answer,
        "answers": {name: one.answers[number] for name, one in answered.items()},
        "right": {name: one.found.right[number] for name, one in answered.items()},
    }
