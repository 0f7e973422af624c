"""The pipeline file: shared settings and a list of stages -> runs that can be checked, planned and trained.

Strict as a run file: every fault names file, line and column, and all of them are told together. Knows no stage's work.
"""

from __future__ import annotations

import copy
import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.faults import show_value
from zhibei.config.layers import Layer, Merged, command_line_layer
from zhibei.config.read import PIPELINE, recipe_layer, resolve_layers, shipped, shipped_text, with_compat
from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RunFile
from zhibei.config.yaml_tree import KeyPath, Tree, parse, read_text
from zhibei.pipeline.kinds import KINDS, Kind
from zhibei.pipeline.references import find_references, with_places
from zhibei.pipeline.run_text import run_file_text
from zhibei.pipeline.settings import read_settings

SHARED_RANK, SHARED_LINE_RANK, STAGE_RANK, STAGE_LINE_RANK = 3, 4, 5, 6
"""Above recipe and compat set: what all stages share, in the file and on the command line; then what one stage has."""
OWN_KEYS = ("name", "runs", "stages")
SHARED_KEYS = (*(key for key in RunFile.model_fields if key not in ("name", "runs", "stage", *KINDS)), "compat")


@dataclass(frozen=True)
class Stage:
    """One stage as the file has it. `references`: field -> the earlier stage whose product it names."""

    name: str
    kind: str
    layers: tuple[Layer, ...]
    where: str
    references: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The fields of a stage that is no training, `$name` as it was written."""

    @property
    def about(self) -> Kind:
        return KINDS[self.kind]

    def resolved(self, places: Mapping[str, str], *, runs: Path) -> ResolvedRun:
        """The run of a stage that trains, in folder `runs`. `$name` becomes `places[name]`; without one it stays, and a
        place of "" takes the field out. Raises UserError as `read_run` does."""
        layers = [with_places(layer, self.references, places) for layer in self.layers]
        own = {"name": self.name, "runs": str(runs), "stage": self.kind}
        layers.append(Layer(STAGE_LINE_RANK, f"stage {self.name}", Tree(value=own)))
        text = run_file_text(_merged(layers).values, about=f"Stage {self.name} of a pipeline.")
        try:
            return resolve_layers(layers, name=self.name, text=text)
        except UserError as error:
            raise _in_stage(error, self.name) from None


@dataclass(frozen=True)
class Pipeline:
    """The whole file. Each stage writes into `folder`/<its name>."""

    name: str
    runs: str
    source: str
    text: str
    stages: tuple[Stage, ...]
    shared: Mapping[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What was typed to run it, and goes on with it."""
        return shlex.join(["zhibei", "run", self.source, *self.overrides])

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def product(self, name: str) -> str:
        """Where what a stage makes lies, or will lie."""
        return str(self.folder.resolve() / name / self.stage(name).about.inside)

    def before(self, stage: Stage) -> list[Stage]:
        return list(self.stages[: self.stages.index(stage)])

    def inputs(self, stage: Stage) -> list[str]:
        """The stages whose products a stage uses: those it names, and where it names no models, all made before."""
        named = set(stage.references.values())
        if stage.settings.get("models", "") is None:
            named |= {one.name for one in self.before(stage) if one.about.makes == "model"}
        return sorted(named)


def is_pipeline(path: str | Path) -> bool:
    """Whether a file, or a shipped recipe, describes several stages; False for what cannot be read."""
    given = str(path)
    if given in shipped(PIPELINE) and not Path(path).exists():
        return True
    if not given.endswith((".yaml", ".yml")) or not Path(path).is_file():
        return False
    try:
        value = parse(read_text(Path(path)), source=given).value
    except UserError:
        return False
    return isinstance(value, dict) and "stages" in value


def read_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file, or a shipped one by its name, with settings laid over it such as `model.path=...` or
    `stages.ppo.ppo.learning_rate=1e-6`.

    Raises UserError (SeveralErrors when there are several faults), each with its place.
    """
    path = Path(path)
    is_shipped = str(path) in shipped(PIPELINE) and not path.exists()
    if not path.exists() and not is_shipped and path.suffix not in (".yaml", ".yml"):
        names = shipped(PIPELINE)
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
        raise UserError(
            "no such file or shipped pipeline",
            expected=f"a YAML file with a list of stages, or one of {', '.join(names)}",
            fix=f"did you mean {near[0]}?" if near else "check the name",
            where=str(path),
        )
    text = shipped_text(str(path), PIPELINE) if is_shipped else read_text(path)
    tree = _parsed(text, str(path))
    layer = Layer(SHARED_RANK, str(path), tree)
    listed = _require_form(layer)
    line = command_line_layer(overrides, rank=SHARED_LINE_RANK) if overrides else Layer(0, "", Tree(value={}))
    faults: list[UserError] = []
    own, shared, of_stages = _split(layer, line, faults)
    names = _names(layer, listed, faults)
    faults += _unknown_stages(of_stages, [name for name in names if name])
    stages: list[Stage] = []
    for number, name in enumerate(names):
        if name:
            below = [*shared, *_stage_layers(layer, line, number, name, of_stages)]
            faults += _read_stage(name, below, stages, names, where=layer.where(("stages", number)))
    if faults:
        raise faults[0] if len(faults) == 1 else SeveralErrors(faults, what=f"{len(faults)} faults in the pipeline")
    return Pipeline(
        name=str(own.get("name", path.stem)),
        runs=str(own.get("runs", "runs")),
        source=str(path),
        text=text,
        stages=tuple(stages),
        shared=_merged(shared).values,
        overrides=tuple(overrides),
    )


def _parsed(text: str, source: str) -> Tree:
    try:
        return parse(text, source=source)
    except UserError as error:
        if "${" not in text:
            raise
        fix = "name an earlier stage as $NAME: in YAML, braces inside { } end the mapping"
        raise UserError(error.what, expected=error.expected, fix=fix, where=error.where) from None


def _require_form(layer: Layer) -> list[Any]:
    value = layer.tree.value
    if not isinstance(value, dict) or "stages" not in value:
        raise UserError(
            "this file has no list of stages",
            expected="a pipeline: shared settings, and  stages:  with an entry for each",
            fix="add  stages:  or, for a single run, use zhibei train",
            where=f"{layer.source}:1:1",
        )
    listed = value["stages"]
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"stages is {show_value(listed)}" if listed != [] else "stages is empty",
            expected="a list, each item the settings of one stage",
            fix="write  stages:  and below it  - name: sft  with its settings",
            where=layer.where(("stages",)),
        )
    return listed


def _split(layer: Layer, line: Layer, faults: list[UserError]) -> tuple[dict, list[Layer], dict[str, Any]]:
    """What names the pipeline, what all stages share (file, then command line), and what the command line says of
    single stages."""
    own: dict[str, Any] = {}
    shared = []
    for one in (layer, line):
        values = dict(one.tree.value or {})
        for key in values:
            if key not in OWN_KEYS and key not in SHARED_KEYS:
                faults.append(_unknown_key(key, one))
        own |= {key: values[key] for key in ("name", "runs") if key in values}
        kept = {key: {} if value is None else value for key, value in values.items() if key in SHARED_KEYS}
        shared.append(replace(one, tree=replace(one.tree, value=copy.deepcopy(kept))))
    for key, value in own.items():
        if not isinstance(value, str) or not value.strip() or (key == "name" and "/" in value):
            faults.append(
                UserError(
                    f"{key} is {show_value(value)}",
                    expected="text" if key == "runs" else "one folder's name",
                    fix=f"write {key}: my_pipeline" if key == "name" else "write runs: a folder",
                    where=layer.where((key,)),
                )
            )
    of_stages = (line.tree.value or {}).get("stages", {})
    if not isinstance(of_stages, dict):
        faults.append(
            UserError(
                f"stages is {show_value(of_stages)}",
                expected="stages.NAME.section.field=value",
                fix="change the list of stages in the file",
                where=line.where(("stages",)),
            )
        )
        of_stages = {}
    return own, shared, of_stages


def _unknown_key(key: str, layer: Layer) -> UserError:
    if key in KINDS:
        fix = f"{key} belongs to a stage: write it below - name: {key} in stages"
    elif near := difflib.get_close_matches(key, [*OWN_KEYS, *SHARED_KEYS], n=1, cutoff=0.6):
        fix = f"did you mean {near[0]}?"
    else:
        fix = "remove it, or move it into the stage it belongs to"
    return UserError(
        f"unknown key {key!r}",
        expected=f"one of {', '.join([*OWN_KEYS, *SHARED_KEYS])}",
        fix=fix,
        where=layer.where((key,), at_key=True),
    )


def _names(layer: Layer, listed: list[Any], faults: list[UserError]) -> list[str]:
    """The name of each stage; "" where it has none that can be used, which is a fault."""
    found: list[str] = []
    for number, entry in enumerate(listed):
        where = layer.where(("stages", number))
        name = entry.get("name") if isinstance(entry, dict) else None
        expected = "a name of letters, digits and _: it becomes a folder, and other stages call it $NAME"
        if not isinstance(entry, dict):
            faults.append(UserError(f"stage {number + 1} is {show_value(entry)}", expected="a mapping of settings",
                                    fix="write  - name: sft  and its settings below", where=where))  # fmt: skip
        elif not isinstance(name, str) or not name.isidentifier():
            what = "has no name" if name is None else f"is named {name!r}"
            faults.append(UserError(f"stage {number + 1} {what}", expected=expected, fix="add  name: sft",
                                    where=layer.where(("stages", number, "name")) if name else where))  # fmt: skip
        elif name in found:
            faults.append(UserError(f"two stages are named {name}", expected=expected, fix="rename one of them",
                                    where=layer.where(("stages", number, "name"))))  # fmt: skip
        else:
            found.append(name)
            continue
        found.append("")
    return found


def _unknown_stages(of_stages: Mapping[str, Any], names: list[str]) -> Iterator[UserError]:
    for name, settings in of_stages.items():
        if name not in names or not isinstance(settings, dict):
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            yield UserError(
                f"there is no stage {name}" if name not in names else f"stages.{name} is {show_value(settings)}",
                expected=f"stages.NAME.section.field=value with one of {', '.join(names)}",
                fix=f"did you mean stages.{near[0]}?" if near and name not in names else "name a stage and its field",
                where=f"command line: stages.{name}",
            )


def _stage_layers(layer: Layer, line: Layer, number: int, name: str, of_stages: Mapping[str, Any]) -> list[Layer]:
    """What the file and the command line say of one stage, with the places of both."""
    path: KeyPath = ("stages", number)
    tree = Tree(
        value=copy.deepcopy(layer.tree.value["stages"][number]),
        keys={key[2:]: place for key, place in layer.tree.keys.items() if key[:2] == path},
        values={key[2:]: place for key, place in layer.tree.values.items() if key[:2] == path},
    )
    found = [Layer(STAGE_RANK, layer.source, tree)]
    settings = of_stages.get(name)
    if isinstance(settings, dict):
        value = copy.deepcopy(settings)
        found.append(Layer(STAGE_LINE_RANK, line.source, Tree(value=value), prefix=f"stages.{name}."))
    return found


def _read_stage(
    name: str, layers: list[Layer], stages: list[Stage], names: list[str], *, where: str
) -> Iterator[UserError]:
    """Adds the stage to `stages`; the faults of one that cannot be read keep others from being told wrongly."""
    try:
        stage, faults = _stage(name, layers, stages, names, where=where)
        yield from faults
        stages.append(stage)
        if stage.about.trains and not faults:
            stage.resolved({}, runs=Path("runs"))
    except SeveralErrors as several:
        yield from several.errors
    except UserError as error:
        yield error


def _stage(
    name: str, layers: list[Layer], earlier: list[Stage], names: list[str], *, where: str
) -> tuple[Stage, list[UserError]]:
    """One stage and what is wrong with its references. Raises UserError where its kind or its own fields are wrong."""
    for layer in layers:
        if layer.rank >= STAGE_RANK:
            layer.tree.value.pop("name", None)
        for key, value in layer.tree.value.items():
            if value is None and key in RunFile.model_fields:
                layer.tree.value[key] = {}
    if faults := [_runs_fault(name, layer) for layer in layers if "runs" in layer.tree.value]:
        raise faults[0]
    merged = _merged(layers)
    kind = merged.values.get("stage", name if name in KINDS else None)
    recipe = merged.values.get("recipe")
    if recipe is not None and (kind is None or (kind in KINDS and KINDS[kind].trains)):
        setter = merged.setter(("recipe",))
        layers = [_recipe_below(str(recipe), setter.where(("recipe",)) if setter else where), *layers]
        kind = _merged(layers).values.get("stage", "sft") if "stage" not in merged.values else kind
    if kind not in KINDS:
        raise _unknown_kind(name, kind, merged, where)
    is_run = KINDS[kind].trains
    layers = _own_compat(layers, str(kind)) if is_run else layers
    for layer in layers:
        for key in ("stage", *(["recipe"] if is_run else [])):
            layer.tree.value.pop(key, None)
    layers = layers if is_run else [layer for layer in layers if layer.rank >= STAGE_RANK]
    merged = _merged(layers)
    settings = {} if is_run else read_settings(merged, KINDS[kind].settings, stage=name)
    if not is_run and (wrong := KINDS[kind].misfit(settings)):
        raise UserError(f"stage {name}: {wrong[0]}", expected="settings that each do something", fix=wrong[1],
                        where=where)  # fmt: skip
    stage = Stage(name, kind, tuple(layers), where, settings=settings)
    references, faults = find_references(stage, merged, earlier, names)
    return replace(stage, references=references), faults


def _own_compat(layers: list[Layer], kind: str) -> list[Layer]:
    """The layers with the compat set; every stage has a copy of what is shared, since the name is taken out of it."""
    copies = [replace(one, tree=replace(one.tree, value=copy.deepcopy(one.tree.value))) for one in layers]
    if "stage" not in copies[-1].tree.value:
        copies[-1].tree.value["stage"] = kind
    return with_compat(copies)


def _merged(layers: Sequence[Layer]) -> Merged:
    merged = Merged()
    for layer in layers:
        merged.add(layer)
    return merged


def _runs_fault(name: str, layer: Layer) -> UserError:
    return UserError(
        f"stage {name} names its own folder of runs",
        expected="one folder for all stages",
        fix="write runs at the top of the file",
        where=layer.where(("runs",)),
    )


def _recipe_below(recipe: str, where: str) -> Layer:
    try:
        return recipe_layer(recipe)
    except UserError as error:
        raise UserError(error.what, expected=error.expected, fix=error.fix, where=where) from None


def _unknown_kind(name: str, kind: Any, merged: Merged, where: str) -> UserError:
    setter = merged.setter(("stage",))
    near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.4) if kind is not None else []
    return UserError(
        f"stage {name} does not say what it does" if kind is None else f"stage {name}: there is no stage {kind!r}",
        expected=f"stage: one of {', '.join(KINDS)}",
        fix=f"did you mean stage: {near[0]}?" if near else f"add, for example,  stage: sft  to {name}",
        where=setter.where(("stage",)) if setter is not None else where,
    )


def _in_stage(error: UserError, name: str) -> UserError:
    """The same fault with the stage it belongs to."""
    if isinstance(error, SeveralErrors):
        return SeveralErrors([_in_stage(one, name) for one in error.errors], what=error.what, where=error.where)
    where = error.where if error.where not in ("", "run file") else "pipeline"
    return UserError(error.what, expected=error.expected, fix=error.fix, where=f"{where} (stage {name})",
                     pitfall=error.pitfall)  # fmt: skip
