"""A path or recipe and `section.field=value` settings -> a checked run file. Knows files and names, no stage.

Layers, the later winning: defaults, recipe, compat set, file, command line. All faults of a run file are told together.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from zhibei.config.distributed import meant_by
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.faults import faults_of, place_of_fault, show_value
from zhibei.config.layers import Layer, Merged, command_line_layer, dotted
from zhibei.config.resolve import DEFAULT, PLANNED, ResolvedRun, plan_values, with_planned
from zhibei.config.rules import Misfit, PartsDoNotFit
from zhibei.config.run import RunFile
from zhibei.config.words import field_at, is_section, leaf_fields
from zhibei.config.yaml_tree import KeyPath, Tree, near_files, parse, read_text

RECIPE_RANK, COMPAT_RANK, FILE_RANK, COMMAND_LINE_RANK = 1, 2, 3, 4
FILES_OF_A_RUN = ("resolved.yaml", "run.yaml")


def read_run(path_or_recipe: str | Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """Read a run file, or start from a shipped recipe, and lay `overrides` over it.

    `path_or_recipe` is a YAML file, a run directory (its resolved.yaml is read) or the name of a recipe.
    Raises UserError with file, line and column (SeveralErrors when there are several faults).
    """
    read = _read(path_or_recipe, overrides)
    return _resolved(read, *_checked(read.merged))


def read_what_is_sound(
    path_or_recipe: str | Path, overrides: Sequence[str] = ()
) -> tuple[ResolvedRun | None, UserError | None]:
    """The run without its faulty fields, and the fault that `read_run` would raise.

    For looking at the rest of a broken run file at once; never for running it. The run is None where a required field
    is at fault. Raises UserError where the text cannot be read at all.
    """
    read = _read(path_or_recipe, overrides)
    fault: UserError | None = None
    while True:
        try:
            return _resolved(read, *_checked(read.merged)), fault
        except UserError as error:
            fault = fault or error
        try:
            RunFile.model_validate(read.merged.values, strict=True)
        except ValidationError as error:
            if not _without_faults(read.merged, error):
                return None, fault


@dataclass(frozen=True, slots=True)
class _Read:
    """The layers of a run file laid over one another, not yet checked."""

    merged: Merged
    text: str
    has_name: bool


def resolve_layers(layers: Sequence[Layer], *, name: str, text: str) -> ResolvedRun:
    """A run from layers that were made elsewhere, the first one lowest; a file of several runs has no other way.

    `name`: where no layer names the run. `text`: what is kept as the run's run.yaml. Raises what `read_run` raises.
    """
    read = _laid(layers, name=name, text=text)
    return _resolved(read, *_checked(read.merged))


def _read(path_or_recipe: str | Path, overrides: Sequence[str]) -> _Read:
    given = str(path_or_recipe)
    if given in recipe_names():
        layers, name, text = [recipe_layer(given)], given, recipe_text(given)
    else:
        path = _run_file(Path(given))
        text = read_text(path)
        layers, name = (
            _file_layers(text, str(path)),
            path.stem if path.name not in FILES_OF_A_RUN else path.resolve().parent.name,
        )
    if overrides:
        layers.append(command_line_layer(overrides, rank=COMMAND_LINE_RANK))
    return _laid(layers, name=name, text=text)


def _laid(layers: Sequence[Layer], *, name: str, text: str) -> _Read:
    layers = with_compat(layers)
    merged = Merged()
    for layer in layers:
        _open_empty_sections(layer.tree)
        merged.add(layer)
    has_name = "name" in merged.values
    merged.values.setdefault("name", name)
    return _Read(merged, text, has_name)


def _resolved(read: _Read, run: RunFile, notes: list[str]) -> ResolvedRun:
    origins = {key: _origin(key, read.merged) for key, _ in leaf_fields()}
    if not read.has_name:
        origins["name"] = PLANNED
    notes = [*notes, *_translated(read.merged, run, origins)]
    return with_planned(ResolvedRun(run, origins, read.text, tuple(notes)), plan_values(run))


def _translated(merged: Merged, run: RunFile, origins: dict[str, str]) -> list[str]:
    """A note where another tool's name for the sharding was understood; `origins` then say so too."""
    given = (merged.values.get("distributed") or {}).get("sharding")
    if not isinstance(given, str) or meant_by(given) is None:
        return []
    ours, key = run.distributed, "distributed.sharding"
    also = f", and distributed.offload: {ours.offload}" if ours.offload != "none" else ""
    note = f"{key}: {given} ({origins[key]}) is called {ours.sharding} here{also}"
    origins[key] = f"{origins[key]}, where it is called {given}"
    return [note]


def _without_faults(merged: Merged, error: ValidationError) -> bool:
    """Takes the faulty values out; False when there was nothing to take out, so that something required is missing."""
    places = [place_of_fault(detail, merged) for detail in error.errors()]
    places += [misfit.field for misfit in _misfits(error)]
    was_taken = False
    for place in places:
        while place and place not in merged.setters:
            place = place[:-1]
        if place:
            merged.remove(place)
            was_taken = True
    return was_taken


def with_compat(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with the numbers of the set that `compat` names in one of them, above recipes and below files.

    Raises UserError for a set that is not there, or that says nothing of the stage.
    """
    named = [layer for layer in layers if isinstance(layer.tree.value, dict) and "compat" in layer.tree.value]
    if not named:
        return list(layers)
    where = named[-1].where(("compat",))
    name = str([layer.tree.value.pop("compat") for layer in named][-1])
    stages = [layer.tree.value["stage"] for layer in layers if "stage" in (layer.tree.value or {})]
    if name not in shipped(COMPAT):
        near = difflib.get_close_matches(name, shipped(COMPAT), n=1, cutoff=0.4)
        raise UserError(
            f"there is no compat set {name!r}",
            expected=f"one of {', '.join(shipped(COMPAT))}",
            fix=f"did you mean {near[0]}?" if near else "choose one of them, or remove it",
            where=where,
        )
    tree = parse(shipped_text(name, COMPAT), source=f"compat {name}")
    stage = str(stages[-1] if stages else "sft")
    if stage not in tree.value:
        raise UserError(
            f"the compat set {name} says nothing of stage {stage}",
            expected=f"a run of stage {', '.join(tree.value)}",
            fix="remove it from this run",
            where=where,
        )
    layer = Layer(COMPAT_RANK, f"compat {name}", Tree(value=tree.value[stage]))
    place = sum(one.source.startswith("recipe ") for one in layers)
    return [*layers[:place], layer, *layers[place:]]


def with_compat_set(overrides: Sequence[str], name: str) -> tuple[str, ...]:
    """The settings of a command line with what its option --compat asks for."""
    return (*overrides, f"compat={name}") if name else tuple(overrides)


COMPAT, PIPELINE = ".compat", ".pipeline"
"""What stands before .yaml in the name of a shipped file that is no recipe of a single run."""


def shipped(kind: str) -> list[str]:
    """Names of the shipped files of a kind, sorted."""
    names = [entry.name for entry in (resources.files("zhibei") / "recipes").iterdir()]
    return sorted(name.removesuffix(f"{kind}.yaml") for name in names if name.endswith(f"{kind}.yaml"))


def shipped_text(name: str, kind: str) -> str:
    """The text of a shipped file, comments included."""
    return (resources.files("zhibei") / "recipes" / f"{name}{kind}.yaml").read_text(encoding="utf-8")


def recipe_names() -> list[str]:
    """Names of the shipped recipes of single runs, sorted."""
    return [name for name in shipped("") if "." not in name]


def recipe_text(name: str) -> str:
    """The text of a shipped recipe, comments included. Raises UserError for an unknown name, with the nearest one."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        raise UserError(
            f"there is no recipe {name!r}",
            expected=f"one of {', '.join(recipe_names())}",
            fix=f"did you mean {near[0]}?" if near else "choose one of them, or remove the key recipe",
        )
    return shipped_text(name, "")


def _run_file(path: Path) -> Path:
    if path.is_dir():
        return next((path / name for name in FILES_OF_A_RUN if (path / name).is_file()), path)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    names = recipe_names()
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.5)
    hint = f"did you mean the recipe {near[0]}?" if near else near_files(path)
    raise UserError(
        "no such file or recipe",
        expected=f"a YAML run file, a run directory, or a recipe ({', '.join(names)})",
        fix=hint or "check the name",
        where=str(path),
    )


def recipe_layer(name: str) -> Layer:
    """A shipped recipe, below whatever is laid over it. Raises UserError for an unknown name."""
    source = f"recipe {name}"
    return Layer(RECIPE_RANK, source, parse(recipe_text(name), source=source))


def _file_layers(text: str, source: str) -> list[Layer]:
    tree = parse(text, source=source)
    layer = Layer(FILE_RANK, source, tree)
    if tree.value is None:
        raise UserError(
            "this file is empty",
            expected="a run file",
            fix="begin with  model: {path: ...}  and  data: {sources: [...]}, or  recipe: alpaca-7b",
            where=f"{source}:1:1",
        )
    if not isinstance(tree.value, dict):
        raise UserError(
            f"the run file is {show_value(tree.value)}",
            expected="a mapping of sections: model, data, sft, ...",
            fix="write  section:  and indent its fields below it",
            where=layer.where(()),
        )
    if "stages" in tree.value:
        raise UserError(
            "this file describes several stages",
            expected="a single run",
            fix=f"run them with: zhibei run {source}",
            where=layer.where(("stages",), at_key=True),
        )
    recipe = tree.value.pop("recipe", None)
    if recipe is None:
        return [layer]
    try:
        return [recipe_layer(str(recipe)), layer]
    except UserError as error:
        raise UserError(error.what, expected=error.expected, fix=error.fix, where=layer.where(("recipe",))) from None


def _open_empty_sections(tree: Tree) -> None:
    """`sft:` with nothing below it (all commented out) is an empty section, not a null."""
    for name, value in tree.value.items():
        wanted = field_at((name,))
        if value is None and wanted and is_section(wanted[0]):
            tree.value[name] = {}


def _checked(merged: Merged) -> tuple[RunFile, list[str]]:
    """Validate; a setting that a higher layer made idle gives way, with a note; every other misfit is a fault."""
    notes: list[str] = []
    while True:
        try:
            return RunFile.model_validate(merged.values, strict=True), notes
        except ValidationError as error:
            faults = faults_of(error, merged)
            misfits = _misfits(error)
            gives_way = [misfit for misfit in misfits if _gives_way(misfit, merged)]
            faults += _misfit_faults([misfit for misfit in misfits if misfit not in gives_way], merged)
            if faults:
                raise _together(faults) from None
            for field in {misfit.field: misfit for misfit in gives_way}.values():
                layer = merged.setter(field.field)
                origin = layer.origin(field.field) if layer else DEFAULT
                merged.remove(field.field)
                if origin.startswith("compat "):
                    continue  # a set speaks of full training and of adapters; a run has one of them
                notes.append(f"{dotted(field.field)} ({origin}) has no effect any more: {field.rule.why}")


def _misfits(error: ValidationError) -> list[Misfit]:
    causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
    return [misfit for cause in causes if isinstance(cause, PartsDoNotFit) for misfit in cause.misfits]


def _gives_way(misfit: Misfit, merged: Merged) -> bool:
    """What a higher layer made idle; and whatever is idle of a compat set, which speaks of adapters too."""
    if misfit.rule.is_conflict:
        return False
    if (owner := merged.setter(misfit.field)) is not None and owner.source.startswith("compat "):
        return True
    setter, cause = merged.setter(misfit.field), merged.setter(misfit.rule.cause)
    return (setter.rank if setter else 0) < (cause.rank if cause else 0)


def _misfit_faults(misfits: list[Misfit], merged: Merged) -> list[UserError]:
    """One fault per rule and layer, at the first of the fields that the rule objects to."""
    groups: dict[tuple[int, int], list[Misfit]] = {}
    for misfit in misfits:
        layer = merged.setter(misfit.field)
        groups.setdefault((id(misfit.rule), layer.rank if layer else 0), []).append(misfit)
    return [_misfit_fault(group[0], [dotted(other.field) for other in group[1:]], merged) for group in groups.values()]


def _misfit_fault(misfit: Misfit, others: list[str], merged: Merged) -> UserError:
    path = misfit.field
    layer = merged.setter(path) or merged.setter(misfit.rule.cause)
    words = "does not fit" if misfit.rule.is_conflict else "has no effect"
    also = f" (nor {'has' if len(others) == 1 else 'have'} {', '.join(others)})" if others else ""
    return UserError(
        f"{dotted(path)} {words}{also}: {misfit.rule.why}",
        expected="settings that fit together and each do something",
        fix=misfit.rule.fix,
        where=layer.where(path, at_key=True) if layer else "run file",
    )


def _together(faults: list[UserError]) -> UserError:
    if len(faults) == 1:
        return faults[0]
    return SeveralErrors(faults, what=f"{len(faults)} faults in the run file")


def _origin(key: str, merged: Merged) -> str:
    path: KeyPath = tuple(key.split("."))
    layer = merged.setter(path) if path in merged.setters else None
    return layer.origin(path) if layer else DEFAULT
