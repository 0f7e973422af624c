"""The evaluation stage: all models of a pipeline on the same rows and questions, compared pair by pair.

Answers are kept as they come (answers-NAME.json), so a stop costs at most one model. Knows models and files, no screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.data.references import Question, read_questions
from zhibei.pipeline.asked import SCORES_FILE, resolved_with
from zhibei.pipeline.compared import compare_all
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.config.run import RunFile
    from zhibei.data.prepared import PreparedRows
    from zhibei.pipeline.run import Work
    from zhibei.serve.chat import Speaker
    from zhibei.serve.gguf_speaker import GgufSpeaker

BASE = "base"
SECONDS_PER_CHECK = 600.0


@dataclass
class Measured:
    """What one model did: summed loss and tokens of each held-out row, its answer to each question, and their scores
    by `check` and `judge`."""

    name: str
    path: str
    loss_sums: list[float] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def evaluate_stage(work: Work) -> None:
    """Measure and compare the models of a stage of kind evaluate; writes scores.json into its folder.

    Raises UserError when a model, the questions or the judge cannot be used.
    """
    settings = work.stage.settings
    folder = work.pipeline.folder / work.stage.name
    folder.mkdir(parents=True, exist_ok=True)
    questions = _questions(work)
    rows = _heldout_rows(work)
    measured = []
    for name, path in models_of(work).items():
        kept = folder / f"answers-{name}.json"
        one = Measured(**read_json(kept)) if kept.is_file() else _ask(work, name, path, questions=questions, rows=rows)
        if not kept.is_file():
            write_json_atomic(kept, vars(one))
        work.watch(_event(f"{name}: {len(one.answers)} answers, {len(one.loss_sums)} held-out rows"))
        measured.append(one)
    if settings["check"] is not None:
        _check(measured, questions, str(settings["check"]))
    if settings["judge"] is not None:
        _judge(measured, questions, _place(work, str(settings["judge"])))
    document = {
        "models": [{"name": one.name, "path": one.path, "notes": one.notes} for one in measured],
        "questions": len(questions),
        "check": settings["check"],
        "judge": settings["judge"],
        **compare_all(measured),
        "examples": _examples(measured, questions),
    }
    write_json_atomic(folder / SCORES_FILE, document)
    for metric, scores in document["scores"].items():
        told = ", ".join(f"{name} {found['score']:.3f}" for name, found in scores.items())
        work.watch(_event(f"{metric}: {told}"))


def _event(text: str) -> dict[str, Any]:
    return {"kind": "event", "step": 0, "event": "evaluated", "text": text}


def models_of(work: Work) -> dict[str, str]:
    """Name -> path of the models to compare; by default where it all began and everything made since."""
    named = work.stage.settings["models"]
    if named is not None:
        return {_name(text): _place(work, text) for text in named}
    earlier = [stage for stage in work.pipeline.before(work.stage) if stage.about.makes == "model"]
    found: dict[str, str] = {}
    if earlier:
        found[BASE] = resolved_with(earlier[0], work.pipeline).run.model.path
    return found | {stage.name: _place(work, f"${stage.name}") for stage in earlier}


def _name(text: str) -> str:
    return text[1:] if text.startswith("$") else Path(text).name


def _place(work: Work, text: str) -> str:
    return work.pipeline.product(text[1:]) if text.startswith("$") else text


def _run_of(work: Work, text: str) -> RunFile:
    return read_run(RunDir(Path(_place(work, text))).resolved).run


def _questions(work: Work) -> list[Question]:
    """At most `most` questions with their references, the same for every model."""
    asked, most = work.stage.settings["questions"], work.stage.settings["most"]
    if asked is None:
        return []
    if asked.startswith("$"):
        run = _run_of(work, asked)
        found = read_questions(run.data, heldout_ids(run)[:most])
    else:
        data = _any_run(work).data.model_copy(update={"sources": [asked], "validation": 0})
        found = read_questions(data)
    questions = [question for question in found.values() if question.messages][:most]
    if not questions:
        raise UserError(
            f"{asked} holds no question",
            expected="held-out prompts, or a data file with at least one prompt",
            fix="hold rows out in that stage (data.validation), or name a file",
            where=f"{work.stage.where}, questions",
        )
    return questions


def _any_run(work: Work) -> RunFile:
    """A stage that trains, for how its files are read."""
    stages = [stage for stage in work.pipeline.stages if stage.about.trains]
    if not stages:
        raise UserError(
            "a pipeline without a stage that trains has nothing to compare",
            expected="at least one stage such as sft",
            fix="add it before this one",
            where=work.stage.where,
        )
    return resolved_with(stages[0], work.pipeline).run


def heldout_ids(run: RunFile) -> list[str]:
    """Ids of the records a run holds out, `source#record`."""
    from zhibei.data.pairs import prepare_answers
    from zhibei.data.prepare import prepare
    from zhibei.text.families import find_template
    from zhibei.train.beginning import load_run_tokenizer

    tokenizer = load_run_tokenizer(run)
    template = find_template(run.data.template, tokenizer)
    if run.stage == "sft":
        return list(prepare(run, tokenizer, template).heldout.row_ids)
    return list(next(iter(prepare_answers(run, tokenizer, template).heldout.sides.values())).row_ids)


@dataclass(frozen=True)
class HeldoutRows:
    """Rows the loss is measured on, and the tokenizer they are spelled in."""

    rows: PreparedRows
    fingerprint: str
    pad_token: int


def _heldout_rows(work: Work) -> HeldoutRows | None:
    named = work.stage.settings["loss"]
    if named is None:
        return None
    from zhibei.data.prepare import prepare
    from zhibei.text.families import find_template
    from zhibei.train.beginning import load_run_tokenizer

    run = _run_of(work, named) if named.startswith("$") else read_run(named).run
    if run.stage != "sft":
        raise UserError(
            f"loss names {named}, a run of stage {run.stage}",
            expected="a stage of sft: the loss of held-out answers is measured on its rows",
            fix="name the stage of sft",
            where=f"{work.stage.where}, loss",
        )
    tokenizer = load_run_tokenizer(run)
    rows = prepare(run, tokenizer, find_template(run.data.template, tokenizer)).heldout
    if len(rows) == 0:
        raise UserError(
            f"the run {named} holds no rows out",
            expected="held-out rows to measure the loss on",
            fix="set data.validation in that stage, or leave loss out",
            where=f"{work.stage.where}, loss",
        )
    return HeldoutRows(rows, tokenizer.fingerprint, tokenizer.pad_id)


def _ask(work: Work, name: str, path: str, *, questions: Sequence[Question], rows: HeldoutRows | None) -> Measured:
    """One model's losses and answers; it is released again when this returns."""
    from zhibei.evaluate.row_losses import row_losses
    from zhibei.serve.chat import Speaker, open_speaker

    settings = work.stage.settings
    is_ours = RunDir(Path(path)).manifest.is_file()
    shared = work.pipeline.shared.get("data", {}).get("template")
    template = None if is_ours else settings["template"] or (None if shared == "auto" else shared)
    speaker = open_speaker(path, template=template)
    measured = Measured(name, path, notes=list(speaker.notes))
    if rows is not None and not isinstance(speaker, Speaker):
        measured.notes.append("no loss: llama.cpp gives no loss of rows")
    elif rows is not None and isinstance(speaker, Speaker) and speaker.tokenizer.fingerprint != rows.fingerprint:
        measured.notes.append("no loss: its tokenizer spells the held-out rows otherwise")
    elif rows is not None and isinstance(speaker, Speaker):
        sums, counts = row_losses(speaker.model, rows.rows, pad_token=rows.pad_token, most_rows=settings["most"])
        measured.loss_sums, measured.loss_tokens = sums.tolist(), counts.tolist()
    if questions:
        measured.answers = _answers(speaker, questions, settings, system=_system_of(path) if is_ours else None)
    return measured


def _system_of(path: str) -> str | None:
    return read_run(RunDir(Path(path)).resolved).run.data.system


def _answers(
    speaker: Speaker | GgufSpeaker, questions: Sequence[Question], settings: Mapping[str, Any], *, system: str | None
) -> list[str]:
    """Through the prompts that `zhibei chat` would send."""
    from zhibei.data.encode import with_system
    from zhibei.generate.options import SamplingOptions

    options = SamplingOptions(max_new_tokens=settings["max_new_tokens"], temperature=float(settings["temperature"]))
    prompts = [speaker.prompt(with_system(question.messages, system), options) for question in questions]
    return [(answer.text or "").strip() for answer in speaker.answer(prompts, options)]


def _check(measured: Sequence[Measured], questions: Sequence[Question], name: str) -> None:
    """What the verifier says of every answer. Raises UserError where it needs references that are missing."""
    from zhibei.generate.rewards import Answered, needs_references, reward_source

    references = [question.reference for question in questions]
    if needs_references(name) and any(not (reference or "").strip() for reference in references):
        missing = sum(not (reference or "").strip() for reference in references)
        raise UserError(
            f"{missing} of {len(questions)} questions have no result to compare with",
            expected=f"a reference in every record for check: {name}",
            fix="add it to the records (an answer, or a field such as gt_answer), or use another check",
            where="check",
        )
    source = reward_source(name, seconds=SECONDS_PER_CHECK, where="check")
    prompts = [question.text for question in questions]
    for one in measured:
        answered = Answered(prompts=prompts, answers=one.answers, references=references, tokens=[[]] * len(prompts))
        one.right = source(answered)


def _judge(measured: Sequence[Measured], questions: Sequence[Question], path: str) -> None:
    """The reward model's score of every answer."""
    from zhibei.serve.judge import open_judge
    from zhibei.text.messages import Message

    judge = open_judge(path)
    for one in measured:
        conversations = [
            (*question.messages, Message("assistant", answer))
            for question, answer in zip(questions, one.answers, strict=True)
        ]
        one.judged = judge.scores(conversations)


def _examples(measured: Sequence[Measured], questions: Sequence[Question], most: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "question": question.text,
            "reference": question.reference or "",
            "answers": {one.name: one.answers[place] for one in measured},
            "right": {one.name: one.right[place] for one in measured if one.right},
            "judged": {one.name: one.judged[place] for one in measured if one.judged},
        }
        for place, question in enumerate(questions[:most])
    ]
