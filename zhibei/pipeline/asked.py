"""What each stage was asked when it began, kept in the pipeline's folder; a stage is never gone on with otherwise.

asked.json: {"format": 1, "stages": {name: {"kind", "settings": {field: value}, "inputs": {name: run id}}}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zhibei.config.effects import STAGES
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.resolve import ResolvedRun, value_of
from zhibei.config.words import leaf_fields
from zhibei.pipeline.file import Pipeline, Stage
from zhibei.store.files import read_json, sha256_of, write_json_atomic
from zhibei.store.manifest import read_manifest
from zhibei.store.run_dir import RunDir

ASKED_FILE = "asked.json"
SCORES_FILE, HANDED_FILE = "scores.json", "handed_over.json"
ANY_VALUE = ("name", "runs", "device", "rehearse", "accept", "hand_over", "data.workers", "data.cache")
"""Fields that may change while a pipeline is under way: they change nothing that is learned."""
ANY_SECTION = ("log.", "watch.", "distributed.")


def settings_of(stage: Stage, pipeline: Pipeline) -> dict[str, Any]:
    """The fields of a stage that decide what comes out, `$name` as it was written."""
    if not stage.about.trains:
        return dict(stage.settings)
    run = stage.resolved({}, runs=pipeline.folder).run
    keys = [key for key, _ in leaf_fields() if key not in ANY_VALUE and not key.startswith(ANY_SECTION)]
    others = [stage for stage in STAGES if stage != run.stage]
    own = [key for key in keys if key.partition(".")[0] not in others]
    return json.loads(json.dumps({key: value_of(run, key) for key in own}))


def product_id(folder: Path) -> str:
    """What a finished stage made, by an id that is another one when it was made again; "" where nothing is finished."""
    run_dir = RunDir(folder)
    if run_dir.model.is_dir() and run_dir.manifest.is_file():
        return str(read_manifest(folder)["run_id"])
    documents = [folder / name for name in (SCORES_FILE, HANDED_FILE) if (folder / name).is_file()]
    return sha256_of(documents[0]) if documents else ""


def is_begun(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def read_asked(pipeline: Pipeline) -> dict[str, Any]:
    """What was asked before, by stage. Raises UserError when the folder holds something that is no pipeline."""
    folder, file = pipeline.folder, pipeline.folder / ASKED_FILE
    if file.is_file():
        return read_json(file)["stages"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists already and is no pipeline's folder",
            expected="a new name; nothing that exists is overwritten",
            fix="choose another name: name=NEW",
            where="name",
        )
    return {}


def take_folder(pipeline: Pipeline) -> None:
    """Make the pipeline's folder, or go on in it. Raises UserError when it holds something else."""
    stages = read_asked(pipeline)
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(pipeline.folder / ASKED_FILE, {"format": 1, "stages": stages})


def note_asked(pipeline: Pipeline, stage: Stage) -> None:
    """Keep what a stage is asked, before it begins."""
    stages = read_asked(pipeline)
    inputs = {name: product_id(pipeline.folder / name) for name in pipeline.inputs(stage)}
    stages[stage.name] = {"kind": stage.kind, "settings": settings_of(stage, pipeline), "inputs": inputs}
    write_json_atomic(pipeline.folder / ASKED_FILE, {"format": 1, "stages": stages})


def require_as_asked(pipeline: Pipeline) -> None:
    """Raises UserError when a stage that has begun is asked something else now, or was made from an input that is no
    longer there, naming every changed setting."""
    asked = read_asked(pipeline)
    faults = [fault for stage in pipeline.stages for fault in _changes(pipeline, stage, asked)]
    if faults:
        raise faults[0] if len(faults) == 1 else SeveralErrors(
            faults, what=f"{len(faults)} things changed since stages of {pipeline.folder} began"
        )  # fmt: skip


def _changes(pipeline: Pipeline, stage: Stage, asked: Mapping[str, Any]) -> Iterator[UserError]:
    folder = pipeline.folder / stage.name
    if not is_begun(folder):
        return
    state = "finished" if product_id(folder) else "interrupted"
    after = [other.name for other in pipeline.stages if stage.name in _ancestors(pipeline, other)]
    also = f" (and {', '.join(after)}, made from it)" if after else ""
    again = f"give the pipeline another name (name=NEW), or remove {folder}{also} to make it again"
    before = asked.get(stage.name)
    if before is None:
        yield UserError(
            f"{folder} is there, and this pipeline has not made it",
            expected="stages that this pipeline began",
            fix=again,
            where=stage.where,
        )
        return
    now = settings_of(stage, pipeline)
    if before["kind"] != stage.kind:
        yield UserError(
            f"the {state} stage {stage.name} was {before['kind']} and is {stage.kind} now",
            expected=f"stage: {before['kind']}",
            fix=f"put it back; or {again}",
            where=stage.where,
        )
        return
    origins = stage.resolved({}, runs=pipeline.folder).origins if stage.about.trains else {}
    for key in sorted(set(now) | set(before["settings"])):
        old, new = before["settings"].get(key), now.get(key)
        if key not in before["settings"] and origins.get(key, "default") in ("default", "planned"):
            continue  # a field that came with a newer version, as it always was
        if old != new:
            yield UserError(
                f"{key} of the {state} stage {stage.name} was {_shown(old)} and is {_shown(new)} now",
                expected=f"{key}: {_shown(old)}, with which it was begun",
                fix=f"put it back; or {again}",
                where=f"{origins.get(key, stage.where)} (stage {stage.name})",
            )
    if added := sorted(set(pipeline.inputs(stage)) - set(before["inputs"])):
        yield UserError(
            f"the {state} stage {stage.name} was made without {', '.join(added)}, which it uses now",
            expected=f"a stage that uses {', '.join(sorted(before['inputs'])) or 'no other stage'}",
            fix=again,
            where=stage.where,
        )
    for name, made in before["inputs"].items():
        found = product_id(pipeline.folder / name)
        if found != made:
            what = "is not there any more" if not found else "was made again since"
            yield UserError(
                f"the {state} stage {stage.name} was made from {name}, which {what}",
                expected=f"the {name} that it was made from",
                fix=again,
                where=stage.where,
            )


def _ancestors(pipeline: Pipeline, stage: Stage) -> set[str]:
    found = set(pipeline.inputs(stage))
    for name in tuple(found):
        found |= _ancestors(pipeline, pipeline.stage(name))
    return found


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def resolved_with(stage: Stage, pipeline: Pipeline) -> ResolvedRun:
    """The run of a stage with the places of what earlier stages made."""
    places = {name: pipeline.product(name) for name in stage.references.values()}
    return stage.resolved(places, runs=pipeline.folder.resolve())
