"""The whole pipeline before any of it runs: every stage checked, and planned. Loads no weights.

A stage that goes on from an earlier one is checked as far as is known: with the model that the earlier one begins with
in its place, which has the same tokenizer and the same sizes. It is checked again when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei.config.errors import UserError
from zhibei.config.hand_over import HAND_OVER_RULES
from zhibei.config.resolve import ResolvedRun
from zhibei.export.gguf.kinds import find_kind
from zhibei.pipeline.asked import is_begun, product_id, resolved_with
from zhibei.pipeline.file import Pipeline, Stage
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.doctor.checkup import Checkup
    from zhibei.doctor.outlook import Outlook
    from zhibei.plan.machines import Machine


@dataclass(frozen=True)
class Foreseen:
    """One stage. `state`: new, interrupted or finished. `checkup` and `outlook` where it trains and is not finished;
    `unplanned`: why there is no plan."""

    stage: Stage
    state: str
    checkup: Checkup | None = None
    outlook: Outlook | None = None
    unplanned: str = ""
    num_steps: int | None = None
    """From the rows that were prepared; None where they could not be."""

    @property
    def blocks(self) -> bool:
        return self.checkup is not None and self.checkup.blocks

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        ahead = self.outlook
        memory = ahead.search.chosen.memory if ahead is not None else None
        return {
            "stage": self.stage.name,
            "kind": self.stage.kind,
            "state": self.state,
            "check": self.checkup.as_dict() if self.checkup is not None else None,
            "peak_gib": memory.peak_gib if memory is not None else None,
            "host_gib": memory.host_gib if memory is not None else None,
            "disk_gib": memory.disk.peak_gib if memory is not None and memory.disk is not None else None,
            "hours": ahead.search.hours if ahead is not None else None,
            "steps": self.num_steps,
            "fits": ahead.fits if ahead is not None else None,
            "unplanned": self.unplanned,
        }


def foresee(
    pipeline: Pipeline,
    *,
    machine: Machine | None = None,
    plans: bool = True,
    on_stage: Callable[[str], Any] = lambda name: None,
) -> list[Foreseen]:
    """Check and plan every stage. `machine` stands in for this one. Raises UserError for what is wrong between stages;
    findings of a single stage are in its checkup."""
    for fault in between_stages(pipeline):
        raise fault
    return [_foresee_one(pipeline, stage, machine, plans, on_stage) for stage in pipeline.stages]


def _foresee_one(
    pipeline: Pipeline, stage: Stage, machine: Machine | None, plans: bool, on_stage: Callable[[str], Any]
) -> Foreseen:
    from zhibei.doctor.checkup import check
    from zhibei.doctor.facts.gather import gather_facts

    folder = pipeline.folder / stage.name
    state = "finished" if product_id(folder) else "interrupted" if is_begun(folder) else "new"
    if not stage.about.trains or state == "finished":
        return Foreseen(stage, state)
    on_stage(stage.name)
    is_whole = all(product_id(pipeline.folder / name) for name in stage.references.values())
    resolved = resolved_with(stage, pipeline) if is_whole else stand_in(pipeline, stage, with_reward=False)
    own = RunDir(folder) if state == "interrupted" and RunDir(folder).manifest.is_file() else None
    resolved = with_forms(resolved, [*resolved.run.hand_over, *forms_asked_later(pipeline, stage)])
    facts = gather_facts(resolved, machine=machine, resume=own)
    settled = facts.run.training.max_steps if facts.resolved is not None else None
    num_steps = facts.pairs.num_steps if facts.pairs is not None else settled
    found = Foreseen(stage, state, check(facts), num_steps=num_steps)
    if not plans:
        return found
    return _planned(found, resolved if is_whole else stand_in(pipeline, stage, with_reward=True), machine)


def _planned(found: Foreseen, resolved: ResolvedRun, machine: Machine | None) -> Foreseen:
    from zhibei.doctor.facts.machine import machine_for
    from zhibei.doctor.outlook import look_ahead

    try:
        ahead = look_ahead(resolved.run, machine or machine_for(None))
    except UserError as error:
        return replace(found, unplanned=error.what)
    return replace(found, outlook=ahead, num_steps=found.num_steps or ahead.search.total_steps)


FORMS_OF_STAGES: dict[str, Callable[[Stage], list[str]]] = {
    "merge": lambda stage: ["merged"],
    "export": lambda stage: ["hf"],
    "gguf": lambda stage: [f"gguf:{find_kind(str(name)).name}" for name in stage.settings["types"]],
}
"""Kind of a stage that hands a model on -> the same as a run file's hand_over says it."""


def forms_asked_later(pipeline: Pipeline, stage: Stage) -> list[str]:
    """What later stages make of this stage's model: it is refused before training, where it can be."""
    found: list[str] = []
    for later in pipeline.stages:
        named = later.references.get("model")
        if later.kind in FORMS_OF_STAGES and named is not None and made_by(pipeline, named) is stage:
            found += FORMS_OF_STAGES[later.kind](later)
    return found


def with_forms(resolved: ResolvedRun, forms: list[str]) -> ResolvedRun:
    """The run with these forms in its hand_over, each once."""
    return replace(resolved, run=resolved.run.model_copy(update={"hand_over": list(dict.fromkeys(forms))}))


def stand_in(pipeline: Pipeline, stage: Stage, *, with_reward: bool) -> ResolvedRun:
    """The run of a stage with models that exist in place of those that earlier stages will make. `with_reward`: also
    for the reward model, whose size then counts; a check of it would look for a reward model that is not there yet."""
    places: dict[str, str] = {}
    template = ""
    for key, name in stage.references.items():
        before = stand_in(pipeline, made_by(pipeline, name), with_reward=with_reward)
        places[name] = before.run.model.path
        template = before.run.data.template if key == "model.path" else template
    resolved = stage.resolved(places, runs=pipeline.folder.resolve())
    if not with_reward:
        resolved = _without(resolved, [key for key in stage.references if key != "model.path"])
    if template and resolved.run.data.template == "auto":
        # What the earlier run will leave as its chat template.
        data = resolved.run.data.model_copy(update={"template": template})
        return replace(resolved, run=resolved.run.model_copy(update={"data": data}))
    return resolved


def made_by(pipeline: Pipeline, name: str) -> Stage:
    """The stage that trained what a stage makes: of a merged model, the one that trained its adapters."""
    stage = pipeline.stage(name)
    while not stage.about.trains and stage.references:
        stage = pipeline.stage(next(iter(stage.references.values())))
    return stage


def _without(resolved: ResolvedRun, keys: list[str]) -> ResolvedRun:
    """The run without what is not there yet: a reward model, an adapter to go on from."""
    run = resolved.run
    for key in keys:
        section, _, name = key.partition(".")
        run = run.model_copy(update={section: getattr(run, section).model_copy(update={name: None})})
    return replace(resolved, run=run)


def between_stages(pipeline: Pipeline) -> Iterator[UserError]:
    """What no stage shows by itself: one form of the prompts from stage to stage, data files that are there, models
    that have the form they are handed on in."""
    for stage in pipeline.stages:
        if not stage.about.trains:
            yield from _missing_files(stage)
            yield from _impossible_form(pipeline, stage)
            continue
        own = stage.resolved({}, runs=pipeline.folder)
        for key, name in stage.references.items():
            source = made_by(pipeline, name)
            if not source.about.trains:
                continue
            before = source.resolved({}, runs=pipeline.folder)
            ours, theirs = own.run.data.template, before.run.data.template
            if "auto" not in (ours, theirs) and ours != theirs:
                yield UserError(
                    f"stage {stage.name} renders its prompts in the template {ours}, and {key} names {name}, which "
                    f"learns the template {theirs}",
                    expected="one template for stages that go on from one another",
                    fix=f"set data.template: {theirs} in {stage.name}, or once at the top of the file",
                    where=f"{own.origins.get('data.template', stage.where)} (stage {stage.name})",
                )


def _impossible_form(pipeline: Pipeline, stage: Stage) -> Iterator[UserError]:
    """The rules of the run file about hand_over, for a stage that hands on what an earlier one trains."""
    named = stage.references.get("model")
    source = made_by(pipeline, named) if stage.kind in FORMS_OF_STAGES and named is not None else None
    if source is None or not source.about.trains:
        return
    run = with_forms(source.resolved({}, runs=pipeline.folder), FORMS_OF_STAGES[stage.kind](stage)).run
    for rule in HAND_OVER_RULES:
        if rule.find(run):
            yield UserError(
                f"stage {stage.name} makes {', '.join(run.hand_over)} of {source.name}: {rule.why}",
                expected="a form that this model has",
                fix=f"remove stage {stage.name}, or name another model; in a run file: {rule.fix}",
                where=stage.where,
            )


def _missing_files(stage: Stage) -> Iterator[UserError]:
    asked = stage.settings.get("questions")
    if isinstance(asked, str) and not asked.startswith("$") and not Path(asked).expanduser().exists():
        yield UserError(
            f"stage {stage.name}: there is no file {asked}",
            expected="a data file, or $NAME of a stage whose held-out prompts are asked",
            fix="check the path of questions",
            where=stage.where,
        )
