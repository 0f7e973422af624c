"""A checkpoint of a run as a complete Hugging Face folder: parts of all ranks put together, adapters merged, one tensor
in memory at a time, without a GPU. Knows no training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.config.run import RunFile
from zhibei.export.adapters import read_adapter_folder
from zhibei.export.card import open_points
from zhibei.export.hand_over import HandedOver, Progress
from zhibei.export.hub_folder import MADE_FROM, add_card, complete_folder, new_folder, write_merged
from zhibei.export.merge import Merged
from zhibei.export.proof import note_hand_over
from zhibei.export.sources import MergeSource, local_folder
from zhibei.model.language_model import LanguageModel
from zhibei.model.load import Need, load_for_training
from zhibei.model.locate import Located, locate
from zhibei.model.save import write_whole
from zhibei.model.wording import choose_template
from zhibei.store.checkpoint import check_checkpoint, list_steps, load_checkpoint
from zhibei.store.files import write_json_atomic, write_text_atomic
from zhibei.store.manifest import read_manifest
from zhibei.store.parts import StoredTensors
from zhibei.store.pipeline_dir import final_run
from zhibei.store.run_dir import RunDir
from zhibei.store.shards import LazyTensor, Writable, read_tensors
from zhibei.text.tokenizer import load_tokenizer


def export_checkpoint(
    path: str,
    checkpoint: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    dtype: str = "as-base",
    progress: Progress = lambda what, done, total: None,
) -> HandedOver:
    """A complete Hugging Face folder of one checkpoint (`step-000200`, `200`, or `newest`) of a run, finished or not.

    Adapters are merged into their base. Every tensor is read back and compared. Raises UserError for a checkpoint that
    is not sound, for a reward model's, and for a base that is not there.
    """
    run_dir = RunDir(final_run(Path(path)))
    folder = find_checkpoint(run_dir, checkpoint)
    run = read_run(str(run_dir.resolved)).run
    if run.stage == "reward":
        raise UserError(
            "this is the run of a reward model, whose score head no Hugging Face folder of a language model has",
            expected="a run that ends as a language model",
            fix=f"finish it: zhibei resume {path}",
            where=str(folder),
        )
    groups, state = load_checkpoint(folder)
    place = out or run_dir.exports / f"hf-{folder.name}"
    base_folder = local_folder(locate(base or run.model.path).weights)
    located = Located(str(base_folder), run=run_dir)
    model = skeleton(run, precision=str(read_manifest(run_dir.path)["precision"]))
    whole = whole_of(model, groups["model"], where=folder, progress=progress)
    merged: Merged | None = None
    with new_folder(place, purpose="the exported checkpoint") as new:
        if model.hf is model.inner:
            if dtype != "as-base":
                raise UserError(
                    f"--dtype {dtype} has no effect: a checkpoint of full training is written as the run computes",
                    expected="no --dtype",
                    fix="leave it out",
                    where="--dtype",
                )
            write_whole(model, new, whole)
            require_same(new, whole)
            complete_folder(new, located, base=base_folder)
        else:
            with _as_adapter(model, whole, beside=place) as adapter:
                source = MergeSource(base_folder, (read_adapter_folder(adapter),), located)
                merged = write_merged(
                    source, new, dtype=dtype, progress=lambda done, total: progress("merge", done, total)
                )
        _write_template(new, located)
        made_from = {"what": "checkpoint", "step": state["step"], "run_id": state.get("run_id")}
        write_json_atomic(new / MADE_FROM, made_from)
        add_card(new, located, base=base_folder, parity=None)
    note_hand_over(run_dir, "checkpoint", place, None)
    note = f"step {state['step']}: {len(whole)} tensors, read back and equal to the checkpoint's"
    if merged is not None:
        note = f"step {state['step']}: adapters of {folder.name} merged into {base_folder.name}"
    return HandedOver(place, merged, None, tuple(open_points(place)), (note,))


def find_checkpoint(run: RunDir, asked: str) -> Path:
    """The folder of a step as a person names it. Raises UserError where there is none, or it is not sound."""
    steps = dict(list_steps(run.checkpoints))
    digits = asked.removeprefix("step-")
    step = max(steps, default=None) if asked == "newest" else int(digits) if digits.isdigit() else None
    if step not in steps:
        raise UserError(
            f"{run.path} has no checkpoint {asked}",
            expected=f"newest, or one of {', '.join(path.name for path in steps.values())}"
            if steps
            else "a run with checkpoints",
            fix="look into its folder checkpoints",
            where="--checkpoint",
        )
    problems = check_checkpoint(steps[step], step=step)
    if problems:
        raise UserError(
            f"{steps[step].name} is not sound: {problems[0].what}",
            expected="a checkpoint that verifies",
            fix=f"name another one (zhibei verify {run.path} shows which are sound)",
            where=problems[0].path,
        )
    return steps[step]


def skeleton(run: RunFile, *, precision: str) -> LanguageModel:
    """The modules of a run's model without values: names, shapes, and the settings that belong to its files."""
    need = Need(torch.device("cpu"), precision, packing=False, longest_row=run.data.max_tokens, is_skeleton=True)
    section = run.model.model_copy(update={"quantize": "none"}) if run.model.method == "qlora" else run.model
    return load_for_training(section, run.lora, need)


def whole_of(
    model: LanguageModel, stored: StoredTensors, *, where: Path, progress: Progress = lambda what, done, total: None
) -> dict[str, Writable]:
    """What a finished model of these weights holds, each tensor read (from all its parts) when its turn comes."""
    learning = model.trainable()
    differing = sorted(set(learning) ^ set(stored)) or [
        name for name, parameter in learning.items() if tuple(parameter.shape) != stored.shape(name)
    ]
    if differing:
        raise UserError(
            f"the checkpoint is not of this model: {len(differing)} tensors differ, e.g. {differing[0]}",
            expected="the model and method that resolved.yaml of the run names",
            fix="put the base model back as it was when the run began",
            where=str(where),
        )
    total, done = len(learning), iter(range(1, 10**9))

    def read(name: str, dtype: torch.dtype) -> torch.Tensor:
        progress("read", min(next(done), total), total)
        shape = stored.shape(name)
        return (stored.rows(name, 0, shape[0]) if shape else stored[name]).to(dtype)

    found: dict[str, Writable] = {}
    for name, parameter in learning.items():
        dtype = model.dtype if parameter.dtype.is_floating_point else parameter.dtype
        found[name] = LazyTensor(dtype, tuple(parameter.shape), functools.partial(read, name, dtype))
    return found


def require_same(folder: Path, whole: dict[str, Writable]) -> None:
    """Raises UserError when a tensor that was written reads back differently."""
    written = read_tensors(folder, stem="model")
    for name, expected in whole.items():
        value = expected.read() if isinstance(expected, LazyTensor) else expected
        if not torch.equal(written.read_unmapped(name), value):
            raise UserError(
                f"{name} reads back differently",
                expected="the bits of the checkpoint",
                fix="the disk or its driver is faulty: write to another one",
                where=str(folder),
            )


@contextmanager
def _as_adapter(model: LanguageModel, whole: dict[str, Writable], *, beside: Path) -> Iterator[Path]:
    """A PEFT folder of a checkpoint's adapters, for as long as they are being merged."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".merging-", dir=beside.parent) as folder:
        write_whole(model, Path(folder), whole)
        yield Path(folder)


def _write_template(folder: Path, located: Located) -> None:
    """The template that the run trains on, where transformers looks for it first."""
    tokenizer: Any = load_tokenizer(str(folder))
    template, _ = choose_template(located, tokenizer, asked=None)
    write_text_atomic(folder / "chat_template.jinja", template.as_jinja())
