"""`zhibei run`: the stages of a pipeline one after the other, and the same call goes on where it was stopped.

Knows the order of stages; what a stage does is in its kind.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zhibei.config.errors import RunInterrupted
from zhibei.pipeline.asked import (
    HANDED_FILE,
    SCORES_FILE,
    note_asked,
    product_id,
    require_as_asked,
    resolved_with,
    take_folder,
)
from zhibei.pipeline.file import Pipeline, Stage
from zhibei.pipeline.foresee import Foreseen, foresee
from zhibei.pipeline.report import write_pipeline_report
from zhibei.pipeline.stage import Rehearse, Watch, stage_record, train_resolved
from zhibei.store.files import read_json, write_json_atomic, write_text_atomic
from zhibei.store.manifest import read_manifest
from zhibei.store.pipeline_dir import write_pipeline

OUTCOME_FILE = "outcome.json"
PIPELINE_COPY = "pipeline.yaml"


@dataclass(frozen=True)
class Work:
    """What a stage that is no training gets: the pipeline, itself, and whom to tell."""

    pipeline: Pipeline
    stage: Stage
    watch: Watch


def run_pipeline(
    pipeline: Pipeline,
    *,
    watch: Watch,
    rehearse: Rehearse | None = None,
    on_foreseen: Callable[[list[Foreseen]], Any] = lambda found: None,
) -> dict[str, Any]:
    """Check everything, then do what is not done yet; the document of outcome.json.

    `watch` gets the records of training and {"kind": "stage", "name", "text", "number", "of"} when a stage begins.
    `on_foreseen` hears what the checks found before anything runs. Raises UserError when a check stops a stage, when a
    stage that has begun is asked something else now, and what training raises.
    """
    started = time.monotonic()
    require_as_asked(pipeline)
    found = foresee(pipeline, plans=False)
    on_foreseen(found)
    for one in found:
        if one.checkup is not None and one.blocks:
            raise one.checkup.as_error()
    take_folder(pipeline)
    write_text_atomic(pipeline.folder / PIPELINE_COPY, pipeline.text)
    try:
        for number, one in enumerate(found, start=1):
            about = ABOUT.get(one.stage.kind, one.stage.kind)
            text = {"finished": "done already", "interrupted": "goes on", "new": about}[one.state]
            told = {"stage": one.stage.kind, "number": number, "of": len(found)}
            watch({**stage_record(one.stage.name, text), **told})
            if one.state != "finished":
                note_asked(pipeline, one.stage)
            if one.state != "finished" or one.stage.about.trains:  # of a finished run, what hand_over still lacks
                _do(Work(pipeline, one.stage, watch), rehearse)
            _note_final(pipeline)
    except BaseException:
        # The page of what is done is worth having; what stopped it is what must be told.
        with contextlib.suppress(Exception):
            _conclude(pipeline, started)
        raise
    return _conclude(pipeline, started)


def _conclude(pipeline: Pipeline, started: float) -> dict[str, Any]:
    """outcome.json and report.html, as far as the stages are done."""
    outcome = outcome_of(pipeline, seconds=time.monotonic() - started)
    write_json_atomic(pipeline.folder / OUTCOME_FILE, outcome)
    write_pipeline_report(pipeline, outcome)
    return outcome


ABOUT = {
    "sft": "learns to answer",
    "reward": "learns which answers are better",
    "dpo": "learns from pairs of answers",
    "ppo": "learns from the reward of its own answers",
    "grpo": "learns from groups of its own answers",
    "raft": "learns from the best of its own answers",
    "evaluate": "the same questions to every model",
    "merge": "adapters and base become one model",
    "export": "a folder for every other program",
    "gguf": "files for llama.cpp",
}


def _do(work: Work, rehearse: Rehearse | None) -> None:
    try:
        if work.stage.about.trains:
            resolved = resolved_with(work.stage, work.pipeline)
            train_resolved(resolved, watch=work.watch, rehearse=rehearse)
            return
        module, _, name = work.stage.about.work.partition(":")
        getattr(importlib.import_module(module), name)(work)
    except RunInterrupted as stopped:
        raise RunInterrupted(
            stopped.what,
            expected=stopped.expected,
            fix=f"go on with the same command: {work.pipeline.command}",
            where=stopped.where,
        ) from None


def _note_final(pipeline: Pipeline) -> None:
    """`zhibei chat FOLDER` talks to the newest model that was made."""
    made = [
        stage.name
        for stage in pipeline.stages
        if stage.about.makes == "model" and stage.about.trains and product_id(pipeline.folder / stage.name)
    ]
    if made:
        write_pipeline(pipeline.folder, stages=[stage.name for stage in pipeline.stages], final=made[-1])


def outcome_of(pipeline: Pipeline, *, seconds: float) -> dict[str, Any]:
    """What the stages made, as far as they are done."""
    stages = []
    for stage in pipeline.stages:
        folder = pipeline.folder / stage.name
        entry: dict[str, Any] = {"name": stage.name, "kind": stage.kind, "folder": str(folder)}
        if stage.about.trains and product_id(folder):
            entry["finished"] = read_manifest(folder).get("finished")
        for key, name in (("scores", SCORES_FILE), ("handed_over", HANDED_FILE)):
            if (folder / name).is_file():
                entry[key] = read_json(folder / name)
        stages.append(entry)
    return {"name": pipeline.name, "folder": str(pipeline.folder), "stages": stages, "seconds": round(seconds, 2)}
