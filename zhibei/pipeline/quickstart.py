"""`zhibei quickstart`: from nothing to a model that answers, measured before and after. Knows the order of stages.

The stages are ordinary runs: `pretrain.yaml` and `sft.yaml` in the folder can be changed and trained again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.evaluate.exact_match import ExactMatch, Question, score
from zhibei.evaluate.stats import compare_paired
from zhibei.pipeline.outcome import Outcome
from zhibei.pipeline.place import Order, Place, take_place
from zhibei.pipeline.stage import Settings, Watch, stage_record, train_stage, write_run_file
from zhibei.pipeline.summary import Stage, summary_of, write_summary
from zhibei.pipeline.world.files import WorldFiles, WorldSize, asked, read_questions, write_json_lines, write_world
from zhibei.store.pipeline_dir import write_pipeline
from zhibei.store.run_dir import RunDir

TEMPLATE = "mistral"
"""[INST] question [/INST] answer: the shortest of the common templates, so the least to read for a small model."""


@dataclass(frozen=True)
class Scale:
    """A world and how long a model learns in it. Rates and batches were found by trying (docs/quickstart.md)."""

    world: WorldSize
    pretrain_batch: int
    pretrain_rate: float
    sft_batch: int
    sft_rate: float
    lora_rate: float
    heldout_texts: int = 200


SCALES: dict[str, Scale] = {
    "standard": Scale(
        WorldSize(
            num_texts=16_000,
            num_conversations=14_400,
            most_turns=4,
            heldout_per_task=100,
            hidden=128,
            layers=2,
            heads=4,
        ),
        pretrain_batch=16,
        pretrain_rate=1.5e-3,
        sft_batch=10,
        sft_rate=1.2e-3,
        lora_rate=5e-3,
    ),
    "tiny": Scale(
        WorldSize(
            num_texts=2_000,
            num_conversations=4_000,
            most_turns=2,
            heldout_per_task=20,
            hidden=64,
            layers=2,
            heads=4,
        ),
        pretrain_batch=16,
        pretrain_rate=4e-3,
        sft_batch=16,
        sft_rate=4e-3,
        lora_rate=1e-2,
    ),
}
"""`standard` is what the command does; `tiny` only shows that the road is whole (tests)."""


def run_world(place: Place, order: Order, *, watch: Watch, started: float) -> Outcome:
    """Make the world, pre-train, fine-tune, measure base and tuned on held-out questions, and leave it all in a folder.

    `watch` gets the records of training and, for each stage, {"kind": "stage", "name": ..., "text": ...}.
    `started` is the time.monotonic() from which total_seconds counts. Raises what training raises; what is done by
    then is kept, and the same call goes on from there.
    """
    with _one_thread():
        return _run_world(place, order, watch=watch, started=started)


def _run_world(place: Place, order: Order, *, watch: Watch, started: float) -> Outcome:
    take_place(place, order)
    folder, scale = place.folder.resolve(), SCALES[order.size]
    outcome = Outcome(place.folder)

    watch(stage_record("world", f"texts, conversations and held-out questions, seed {order.seed}"))
    files = WorldFiles(folder / "world")
    if not files.folder.is_dir():
        files = write_world(files.folder, scale.world, seed=order.seed)
    questions = read_questions(files.heldout)

    watch(stage_record("pretrain", "a small LLaMA reads the texts and learns how this world works"))
    pretrain = train_stage(_pretrain_file(folder, files, order, scale), watch=watch)

    watch(stage_record("base", f"{len(questions)} held-out questions to the base model"))
    base = _ask(pretrain, questions)
    base_ended = time.monotonic()
    outcome.stages.append(_measured("base", base[0], base_ended - started))

    watch(stage_record("sft", "it learns to answer instructions"))
    sft = train_stage(_sft_file(folder, files, order, scale, base=pretrain), watch=watch)

    watch(stage_record("tuned", f"the same {len(questions)} questions to the tuned model"))
    tuned = _ask(sft, questions)
    outcome.stages.append(_measured("sft", tuned[0], time.monotonic() - base_ended))

    outcome.paired = compare_paired(base[0].right, tuned[0].right)
    outcome.by_task = _by_task(base[0], tuned[0])
    write_json_lines(folder / "answers.jsonl", _answer_rows(questions, base, tuned))
    outcome.examples = _examples(questions, base, tuned)
    write_pipeline(folder, stages=["pretrain", "sft"], final="sft")
    outcome.summary = summary_of(outcome.stages, seed=order.seed, total_seconds=time.monotonic() - started)
    write_summary(folder, outcome.summary)
    return outcome


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


def _pretrain_file(folder: Path, files: WorldFiles, order: Order, scale: Scale) -> Path:
    num_steps = scale.world.num_texts // scale.pretrain_batch
    settings = _settings(folder, name="pretrain", order=order, model=files.untrained)
    settings["data"] |= {
        "sources": [str(files.texts)],
        "validation": scale.heldout_texts,
        # Texts come in the order they were written: simple repetition first.
        "shuffle": False,
    }
    settings["sft"] |= {
        "global_batch": scale.pretrain_batch,
        "learning_rate": scale.pretrain_rate,
        "evaluate_every": max(1, num_steps // 4),
        "sample_tokens": 24,
    }
    return write_run_file(folder / "pretrain.yaml", settings, about="A small LLaMA reads about a small world.")


def _sft_file(folder: Path, files: WorldFiles, order: Order, scale: Scale, *, base: RunDir) -> Path:
    num_steps = scale.world.num_conversations // scale.sft_batch
    settings = _settings(folder, name="sft", order=order, model=base.path)
    settings["model"]["method"] = order.method
    settings["data"] |= {
        "sources": [str(files.conversations)],
        "validation": str(files.heldout),
        "group_by_length": True,
    }
    settings["sft"] |= {
        "global_batch": scale.sft_batch,
        "learning_rate": scale.sft_rate if order.method == "full" else scale.lora_rate,
        "evaluate_every": max(1, num_steps // 4),
        "evaluate_rows": 300,
        "sample_tokens": 24,
    }
    return write_run_file(folder / "sft.yaml", settings, about="The small LLaMA learns to answer instructions.")


def _settings(folder: Path, *, name: str, order: Order, model: Path) -> Settings:
    return {
        "name": name,
        "runs": str(folder),
        "seed": order.seed,
        "model": {"path": str(model)},
        "data": {
            "template": TEMPLATE,
            "max_tokens": SCALES[order.size].world.context_tokens,
            "packing": False,
            "workers": 0,
        },
        "sft": {
            "epochs": 1,
            "micro_batch_tokens": 8192,
            "beta2": 0.98,
            "min_lr_ratio": 0.05,
            "save_every": 0,
            "keep_best": False,
        },
        "log": {"tensorboard": False, "every": 5},
    }


def _ask(run: RunDir, questions: Sequence[Question]) -> tuple[ExactMatch, list[str]]:
    """Greedy answers of a run's model through the prompts that `zhibei chat` would send, and their score."""
    from zhibei.generate.options import SamplingOptions
    from zhibei.serve.chat import open_speaker
    from zhibei.text.messages import Message

    speaker = open_speaker(str(run.path))
    options = SamplingOptions(max_new_tokens=24, temperature=0.0, batch_rows=128)
    prompts = [speaker.prompt([Message("user", asked(question))], options) for question in questions]
    answers = [(answer.text or "").strip() for answer in speaker.answer(prompts, options)]
    return score(questions, answers), answers


def _measured(name: str, found: ExactMatch, seconds: float) -> Stage:
    share = found.overall
    return Stage(name, "exact_match", share.score, share.low, share.high, seconds)


def _by_task(base: ExactMatch, tuned: ExactMatch) -> dict[str, dict[str, Any]]:
    return {
        task: {
            "questions": share.total,
            "base": base.by_task[task].score,
            "tuned": share.score,
            "low": share.low,
            "high": share.high,
        }
        for task, share in tuned.by_task.items()
    }


Answered = tuple[ExactMatch, list[str]]


def _answer_rows(questions: Sequence[Question], base: Answered, tuned: Answered) -> list[dict[str, Any]]:
    return [
        {
            "task": question.task,
            "question": asked(question),
            "expected": question.answer,
            "base": base[1][number],
            "base_right": base[0].right[number],
            "tuned": tuned[1][number],
            "tuned_right": tuned[0].right[number],
        }
        for number, question in enumerate(questions)
    ]


def _examples(questions: Sequence[Question], base: Answered, tuned: Answered) -> list[dict[str, Any]]:
    """The first question of each task, whatever the answers."""
    first: dict[str, int] = {}
    for number, question in enumerate(questions):
        first.setdefault(question.task, number)
    return [
        {
            "question": asked(questions[number]),
            "expected": questions[number].answer,
            "base": base[1][number],
            "tuned": tuned[1][number],
            "tuned_is_right": tuned[0].right[number],
        }
        for number in first.values()
    ]
