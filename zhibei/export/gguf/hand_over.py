"""A model handed over as GGUF: written, read back by llama.cpp, compared with what it was made of. Prints nothing.

Everything is written into one new folder, which gets its name only when every file in it has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.data.encode import with_system
from zhibei.export.gguf.export import Exported, Ready, export_gguf, prepare
from zhibei.export.gguf.importance import Importance, measure_importance, read_importance
from zhibei.export.gguf.kinds import find_kind
from zhibei.export.gguf.modelfile import modelfile
from zhibei.export.gguf.source import Source, open_source
from zhibei.export.gguf_side import GgufSide
from zhibei.export.hand_over import Proving, default_export, reference_of
from zhibei.export.hub_folder import new_folder
from zhibei.export.parity import ParityReport
from zhibei.export.parity_limits import limits_for
from zhibei.export.probes import ALL, Probes, rows_of_text, training_rows
from zhibei.export.proof import measure, note_hand_over, write_parity
from zhibei.export.sides import FolderSide
from zhibei.generate.llama_library import INSTALL, is_installed
from zhibei.model.load import load_for_inference
from zhibei.store.files import write_json_atomic, write_text_atomic
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

IMATRIX_FILE = "imatrix.gguf"
IMATRIX_ROWS = 256
"""Rows an importance matrix is taken from; llama.cpp's advice of some ten thousand tokens and more."""


@dataclass(frozen=True)
class Wanted:
    """How GGUF files are to be made. The importance matrix is a file (`imatrix`), is made from a text (`imatrix_text`)
    or from the run's training rows (`imatrix_of_run`), or is left out. `split_bytes`: the most bytes of one part."""

    types: tuple[str, ...] = ("Q8_0",)
    imatrix: Path | None = None
    imatrix_text: Path | None = None
    imatrix_of_run: bool = False
    split_bytes: int | None = None
    template: str | None = None


@dataclass(frozen=True)
class GgufFiles:
    """What was made: the folder, each file with its figures (none where nothing was compared), and notes."""

    path: Path
    files: tuple[Exported, ...]
    reports: tuple[ParityReport | None, ...]
    notes: tuple[str, ...]


def hand_over_gguf(
    path: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    wanted: Wanted | None = None,
    proving: Proving | None = None,
) -> GgufFiles:
    """Write a run, folder or adapter as GGUF files in a new folder (`out`, else `runs/a/exports/gguf`), with a
    Modelfile for Ollama and the proof of each file.

    Raises UserError when something is refused, when llama.cpp cannot read a file back, and when a file is further from
    the model than its type may be; then nothing is left behind.
    """
    asked, how = wanted or Wanted(), proving or Proving()
    source = open_source(path, base=base, template=asked.template)
    ready = prepare(source)
    if how.is_wanted and not is_installed():
        raise UserError(
            "a GGUF file is proved by llama.cpp, which is not installed here",
            expected="the package xllamacpp",
            fix=f"{INSTALL}, or write without a proof (--no-parity)",
        )
    reference = reference_of([path], base=base, proving=how)
    if source.template is not None and (asked.template is not None or source.system is not None):
        reference.speak = partial(_prompt, source.template, source.system)
    place = out or default_export(source.found, "gguf")
    with new_folder(place, purpose="the GGUF files") as folder:
        imatrix = _importance(source, asked, how, reference, folder)
        written = export_gguf(
            source,
            folder,
            types=asked.types,
            imatrix=imatrix,
            split_bytes=asked.split_bytes,
            progress=how.progress,
        )
        notes = _write_modelfiles(ready, written, folder)
        reports = tuple(_prove(ready, reference, one, folder, how) for one in written)
        write_json_atomic(folder / "made_from.json", {"what": "gguf", "source": source.name})
    if imatrix is not None:
        notes = (*imatrix.notes, *notes)
    note_hand_over(source.found.run, "gguf", place, next((one for one in reports if one is not None), None))
    files = tuple(replace(one, paths=tuple(place / part.name for part in one.paths)) for one in written)
    return GgufFiles(place, files, reports, notes)


def faithful_probes(tokenizer: Tokenizer, probes: Probes = ALL) -> Probes:
    """The probes that a tokenizer gives back as they were: others it rewrites first (doubled spaces, Unicode forms),
    which llama.cpp does not, so that they show nothing about a file."""

    def is_kept(text: str) -> bool:
        return tokenizer.decode(tokenizer.encode(text)) == text

    return Probes(
        texts=[text for text in probes.texts if is_kept(text)],
        conversations=[
            messages for messages in probes.conversations if all(is_kept(message.content) for message in messages)
        ],
    )


def _prompt(template: Template, system: str | None, messages: Sequence[Message]) -> str:
    """What training would have put before the answer."""
    return template.render(with_system(messages, system), answer_next=True).text


def _prove(ready: Ready, reference: FolderSide, written: Exported, folder: Path, how: Proving) -> ParityReport | None:
    if not how.is_wanted:
        return None
    kind = find_kind(written.kind).name.lower()
    side = GgufSide(written.paths[0])
    probes = faithful_probes(ready.source.tokenizer)
    report = measure(reference, side, kind=kind, text=how.text, progress=how.progress, probes=probes)
    left_out = len(ALL.texts) + len(ALL.conversations) - len(probes.texts) - len(probes.conversations)
    if left_out:
        note = f"{left_out} probe texts and conversations were left out: the tokenizer rewrites them before reading"
        report = replace(report, notes=(*report.notes, note))
    limits = limits_for(kind)
    report.require(limits)
    write_parity(folder, report, limits, name=f"parity-{written.kind}.json")
    return report


def _importance(source: Source, asked: Wanted, how: Proving, reference: FolderSide, folder: Path) -> Importance | None:
    if asked.imatrix is not None:
        return read_importance(asked.imatrix)
    if asked.imatrix_text is None and not asked.imatrix_of_run:
        return None
    run = source.found.run
    if asked.imatrix_text is not None:
        rows, rows_from = rows_of_text(asked.imatrix_text, source.tokenizer)[:IMATRIX_ROWS], str(asked.imatrix_text)
    else:
        rows = training_rows(run, most=IMATRIX_ROWS) if run is not None else None
        rows_from = f"training rows of {source.name}"
    if not rows:
        raise UserError(
            f"{source.path} has no rows to take an importance matrix from",
            expected="a run whose prepared rows are still in the cache, or a text",
            fix="name a text that is like what the model is for: --imatrix-from TEXT",
            where="--imatrix",
        )
    model = load_for_inference(source.path, device=how.device, precision=how.precision, base=reference.base)
    found = measure_importance(model, rows, source=rows_from, progress=how.progress)
    found.save(folder / IMATRIX_FILE)
    return found


def _write_modelfiles(ready: Ready, written: Sequence[Exported], folder: Path) -> tuple[str, ...]:
    """One Modelfile per type; Ollama cannot read a file in parts."""
    tokenizer = ready.source.tokenizer
    notes: dict[str, None] = {}
    for one in written:
        for note in one.notes:
            notes.setdefault(note)
        if len(one.paths) > 1:
            notes.setdefault("Ollama reads no files in parts: no Modelfile was written for them")
            continue
        text, more = modelfile(
            next(iter(one.paths)).name,
            ready.source.template,
            context_tokens=int(ready.source.config["max_position_embeddings"]),
            eos=tokenizer.eos,
            bos=tokenizer.bos,
            system=ready.source.system or "",
        )
        name = "Modelfile" if len(written) == 1 else f"Modelfile.{one.kind}"
        write_text_atomic(folder / name, text)
        for note in more:
            notes.setdefault(note)
    return tuple(notes)
