"""zhibei (指北): from data to a model that speaks, with the known pits caught before they cost a run.

A folder imports only folders on lower lines, and folders on one line do not know one another:

    cli   pipeline                          what the user types
    doctor                                  what could go wrong, and the proof that it will not
    train | evaluate | serve | report       stages; they do not know one another
    generate                                sampling
    data | model | losses | plan            materials; independent of one another
    text | store                            words <-> token ids; what lies on disk
    config                                  what was asked for

The functions below mirror the commands. Importing this package loads neither torch nor transformers; each function
imports what it needs when it is called. They raise `zhibei.config.errors.UserError` for what only you can put right.

    import zhibei

    run = zhibei.read_run("alpaca-lora-7b", ["model.path=llama-7b", "data.sources=[alpaca.json]"])
    print(zhibei.plan(run).fits, zhibei.check(run).findings)
    run_dir = zhibei.train(run)  # checked first, and under its watchdogs
    speaker = zhibei.load(run_dir.path)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zhibei import plan as plan  # these two folders answer to calls: see the end of this file
from zhibei import train as train

if TYPE_CHECKING:
    from zhibei.config.resolve import ResolvedRun
    from zhibei.data.prepared import PreparedSet
    from zhibei.data.readers import BrokenRecord
    from zhibei.data.records import Record
    from zhibei.doctor.checkup import Checkup
    from zhibei.doctor.outlook import Outlook
    from zhibei.doctor.verdict import Explanation
    from zhibei.serve.chat import Speaker
    from zhibei.serve.judge import Judge
    from zhibei.store.run_dir import RunDir
    from zhibei.store.verify import Problem

__version__ = "0.1.0"

__all__ = [
    "check",
    "explain",
    "judge",
    "load",
    "plan",
    "prepare",
    "read_file",
    "read_run",
    "resume",
    "train",
    "verify",
    "write_report",
]

Watch = Callable[[dict[str, Any]], Any]


def read_run(path_or_recipe: str | Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """A run file, run directory or recipe, with settings such as `sft.epochs=1` laid over it (`zhibei config`)."""
    from zhibei.config.read import read_run

    return read_run(path_or_recipe, overrides)


def read_file(path: str | Path, format: str = "auto") -> Iterator[Record | BrokenRecord]:
    """The records of one data file; the format is recognised unless it is named (`zhibei data inspect`)."""
    from zhibei.data.readers import read_file

    return read_file(path, format)


def prepare(resolved: ResolvedRun) -> PreparedSet:
    """Every row of a run as token ids with its mask, split, audited and cached; needs no weights."""
    from zhibei.data.prepare import prepare
    from zhibei.text.families import find_template
    from zhibei.train.beginning import load_run_tokenizer

    tokenizer = load_run_tokenizer(resolved.run)
    return prepare(resolved.run, tokenizer, find_template(resolved.run.data.template, tokenizer))


def check(resolved: ResolvedRun, machine: str | None = None) -> Checkup:
    """Everything that is known to be wrong with a run, on this machine or another such as `t4` (`zhibei check`)."""
    from zhibei.doctor.checkup import check
    from zhibei.doctor.facts.gather import gather_facts
    from zhibei.doctor.facts.machine import machine_for

    return check(gather_facts(resolved, machine=machine_for(machine) if machine else None))


def explain(path: str | Path) -> Explanation:
    """The pitfall behind a log or a saved traceback, of any program (`zhibei explain`)."""
    from zhibei.doctor.explain import explain_file
    from zhibei.doctor.pitfalls import load_catalogue

    return explain_file(Path(path), load_catalogue())


def resume(run_dir: str | Path, *, watch: Watch | None = None) -> RunDir:
    """Go on with a run that was stopped, from its newest sound checkpoint (`zhibei resume`)."""
    from zhibei.doctor.guard import train_guarded
    from zhibei.store.run_dir import RunDir

    directory = RunDir(Path(run_dir))
    return train_guarded(read_run(directory.resolved), watch=watch or _warn, resume=directory)


def verify(folder: str | Path) -> list[Problem]:
    """What is wrong with a run, checkpoint, model or adapter folder; empty when it is sound (`zhibei verify`)."""
    from zhibei.store.verify import verify_folder

    return verify_folder(Path(folder))


def load(path: str | Path, *, template: str | None = None, device: str = "auto", precision: str = "auto") -> Speaker:
    """A trained model to talk to, with the template it was trained with (`zhibei chat`)."""
    from zhibei.serve.chat import open_speaker

    return open_speaker(str(path), template=template, device=device, precision=precision)


def judge(path: str | Path, *, template: str | None = None, device: str = "auto", precision: str = "auto") -> Judge:
    """A trained reward model: `judge(path).score(messages)` is how good the last answer is (stage: reward)."""
    from zhibei.serve.judge import open_judge

    return open_judge(str(path), template=template, device=device, precision=precision)


def write_report(run_dir: str | Path) -> Path:
    """Write the report page of a run again (`zhibei report`)."""
    from zhibei.report.page import write_report
    from zhibei.store.run_dir import RunDir

    return write_report(RunDir(Path(run_dir)))


def _warn(record: dict[str, Any]) -> None:
    """Who passes no `watch` of their own still hears what the check and the watchdogs warn of."""
    if record.get("kind") == "event" and record.get("event") == "warning":
        warnings.warn(str(record["text"]), stacklevel=2)


def _train(run: ResolvedRun | str | Path, overrides: Sequence[str] = (), *, watch: Watch | None = None) -> RunDir:
    """Train as a run file, a recipe or a resolved run says, checked first and under its watchdogs (`zhibei train`).

    `watch` gets every record; without it, warnings are Python warnings.
    """
    from zhibei.config.resolve import ResolvedRun
    from zhibei.doctor.guard import train_guarded

    resolved = run if isinstance(run, ResolvedRun) else read_run(run, overrides)
    return train_guarded(resolved, watch=watch or _warn)


def _plan(resolved: ResolvedRun, machine: str | None = None, *, sharding: str = "", offload: str = "") -> Outlook:
    """What a run will need, on this machine or another such as `v100-32g:4` (`zhibei plan`)."""
    from zhibei.doctor.facts.machine import machine_for
    from zhibei.doctor.outlook import look_ahead

    return look_ahead(resolved.run, machine_for(machine), sharding=sharding, offload=offload)


class _CallableFolder(ModuleType):
    """Python puts a subpackage into its parent under its own name, so that folder itself has to answer to the call."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ANSWERS[self.__name__](*arguments, **named)


_ANSWERS: dict[str, Callable[..., Any]] = {"zhibei.train": _train, "zhibei.plan": _plan}
for _folder in (train, plan):
    _folder.__class__ = _CallableFolder
    _folder.__doc__ = _ANSWERS[_folder.__name__].__doc__
