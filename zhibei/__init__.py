"""zhibei (指北): from data to a model that speaks, with the known pits caught before they cost a run.

A folder imports only folders on lower lines, and folders on one line do not know one another:

    cli   pipeline                          what the user types
    launch                                  ranks on one node and many
    doctor                                  what could go wrong, and the proof that it will not
    train | export | evaluate | serve | report    stages; they do not know one another
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

from zhibei import export as export  # these three folders answer to calls: see the end of this file
from zhibei import plan as plan
from zhibei import train as train

if TYPE_CHECKING:
    from zhibei.config.resolve import ResolvedRun
    from zhibei.data.prepared import PreparedSet
    from zhibei.data.readers import BrokenRecord
    from zhibei.data.records import Record
    from zhibei.doctor.checkup import Checkup
    from zhibei.doctor.outlook import Outlook
    from zhibei.doctor.verdict import Explanation
    from zhibei.export.hand_over import HandedOver
    from zhibei.export.parity import ParityReport
    from zhibei.model.quantized import QuantizeKind
    from zhibei.serve.chat import Speaker
    from zhibei.serve.judge import Judge
    from zhibei.store.run_dir import RunDir
    from zhibei.store.verify import Problem

__version__ = "0.1.0"

__all__ = [
    "check",
    "explain",
    "export",
    "judge",
    "load",
    "merge",
    "parity",
    "plan",
    "prepare",
    "read_file",
    "read_run",
    "resume",
    "run",
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


def run(pipeline: str | Path, overrides: Sequence[str] = (), *, watch: Watch | None = None) -> dict[str, Any]:
    """Several stages as one file; goes on where the same call was stopped (`zhibei run`). What every stage made."""
    from zhibei.pipeline.file import read_pipeline
    from zhibei.pipeline.run import run_pipeline

    return run_pipeline(read_pipeline(pipeline, overrides), watch=watch or _warn)


def verify(folder: str | Path) -> list[Problem]:
    """What is wrong with a run, checkpoint, model or adapter folder; empty when it is sound (`zhibei verify`)."""
    from zhibei.store.verify import verify_folder

    return verify_folder(Path(folder))


def load(
    path: str | Path,
    *,
    template: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    quantize: QuantizeKind = "none",
) -> Speaker:
    """A trained model to talk to, with the template it was trained with (`zhibei chat`); `quantize` int8 or nf4 holds
    its weights (under an adapter: those of its base) in 8 or 4 bits."""
    from zhibei.serve.chat import open_speaker

    return open_speaker(str(path), template=template, device=device, precision=precision, quantize=quantize)


def judge(path: str | Path, *, template: str | None = None, device: str = "auto", precision: str = "auto") -> Judge:
    """A trained reward model: `judge(path).score(messages)` is how good the last answer is (stage: reward)."""
    from zhibei.serve.judge import open_judge

    return open_judge(str(path), template=template, device=device, precision=precision)


def merge(
    *adapters: str | Path, base: str | Path | None = None, out: str | Path | None = None, dtype: str = "as-base"
) -> HandedOver:
    """Adapters and their base as one proved Hugging Face folder; `runs/a:0.7` gives one a share (`zhibei merge`)."""
    from zhibei.export.hand_over import merge

    named = [str(adapter) for adapter in adapters]
    return merge(named, base=str(base) if base else None, out=Path(out) if out else None, dtype=dtype)


def parity(reference: str | Path, other: str | Path, *, kind: str = "same") -> ParityReport:
    """Two forms of a model compared; `report.failures(limits)` is what is beyond a kind's limits (`zhibei parity`)."""
    from zhibei.export.proof import measure
    from zhibei.export.sides import FolderSide, open_side

    return measure(FolderSide(str(reference)), open_side(str(other)), kind=kind)


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


def _export(source: str | Path, *, to: str, **options: Any) -> Any:
    """A model in another form, proved: hf, gguf, meta, delta, recover or adapter (`zhibei export`).

    `options` are the fields of `zhibei.export.forms.Wanted`, for gguf of `zhibei.export.gguf.hand_over.Wanted`, with
    `base` and `out`. Returns a HandedOver, for gguf a GgufFiles.
    """
    from zhibei.config.errors import UserError

    out = options.pop("out", None)
    place = Path(out) if out is not None else None
    if to == "gguf":
        from zhibei.export.gguf.hand_over import Wanted as GgufWanted
        from zhibei.export.gguf.hand_over import hand_over_gguf

        return hand_over_gguf(str(source), base=options.pop("base", None), out=place, wanted=GgufWanted(**options))
    from zhibei.export.forms import FORMS, Wanted

    if to not in FORMS:
        raise UserError(
            f"there is no form {to}", expected=f"gguf, {', '.join(FORMS)}", fix="zhibei export  shows what each is"
        )
    return FORMS[to](str(source), Wanted(out=place, **options))


class _CallableFolder(ModuleType):
    """Python puts a subpackage into its parent under its own name, so that folder itself has to answer to the call."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ANSWERS[self.__name__](*arguments, **named)


_ANSWERS: dict[str, Callable[..., Any]] = {
    "zhibei.train": _train,
    "zhibei.plan": _plan,
    "zhibei.export": _export,
}
for _folder in (train, plan, export):
    _folder.__class__ = _CallableFolder
    _folder.__doc__ = _ANSWERS[_folder.__name__].__doc__
