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
    run_dir = zhibei.train(run)
    speaker = zhibei.load(run_dir.path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zhibei import train as train  # the folder answers to calls: see zhibei/train/__init__.py

if TYPE_CHECKING:
    from zhibei.config.resolve import ResolvedRun
    from zhibei.data.prepared import PreparedSet
    from zhibei.data.readers import BrokenRecord
    from zhibei.data.records import Record
    from zhibei.serve.chat import Speaker
    from zhibei.store.run_dir import RunDir
    from zhibei.store.verify import Problem

__version__ = "0.1.0"

__all__ = ["load", "prepare", "read_file", "read_run", "resume", "train", "verify", "write_report"]


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


def resume(run_dir: str | Path, *, watch: Callable[[dict[str, Any]], None] | None = None) -> RunDir:
    """Go on with a run that was stopped, from its newest sound checkpoint (`zhibei resume`)."""
    from zhibei.store.run_dir import RunDir
    from zhibei.train.record import ignore
    from zhibei.train.offline import train

    directory = RunDir(Path(run_dir))
    return train(read_run(directory.resolved), watch=watch or ignore, resume=directory)


def verify(folder: str | Path) -> list[Problem]:
    """What is wrong with a run, checkpoint, model or adapter folder; empty when it is sound (`zhibei verify`)."""
    from zhibei.store.verify import verify_folder

    return verify_folder(Path(folder))


def load(path: str | Path, *, template: str | None = None, device: str = "auto", precision: str = "auto") -> Speaker:
    """A trained model to talk to, with the template it was trained with (`zhibei chat`)."""
    from zhibei.serve.chat import open_speaker

    return open_speaker(str(path), template=template, device=device, precision=precision)


def write_report(run_dir: str | Path) -> Path:
    """Write the report page of a run again (`zhibei report`)."""
    from zhibei.report.page import write_report
    from zhibei.store.run_dir import RunDir

    return write_report(RunDir(Path(run_dir)))
