"""What lies behind a model path: weights, an adapter on a base, a run directory, a hub id. Reads no weights."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.store.manifest import run_of
from zhibei.store.pipeline_dir import final_run
from zhibei.store.run_dir import RunDir
from zhibei.text.tokenizer import looks_local

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Located:
    """`weights`: folder or hub id of full weights. `adapter`: a PEFT folder on top. `run`: the run it came from."""

    weights: str
    adapter: Path | None = None
    run: RunDir | None = None


def locate(path: str, *, base: str | None = None) -> Located:
    """Resolve a path the user typed. `base` overrides the base model an adapter names. A folder of several stages
    (pipeline.json) stands for the run of its last one.

    Raises UserError when nothing is there, naming near names, and when an adapter's base is missing.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if HUB_ID.fullmatch(path) and not looks_local(path):
            return Located(path)
        near = _near(folder)
        raise UserError(
            f"there is no folder {path}",
            expected="a Hugging Face folder, a run directory, or a hub id such as huggyllama/llama-7b",
            fix=f"did you mean {near}?" if near else "check the path",
            where="model.path",
        )
    if folder.is_file():
        raise UserError(
            f"{path} is a file",
            expected="the folder that holds config.json and the weights",
            fix=f"write {folder.parent}",
            where="model.path",
        )
    folder = final_run(folder)
    run = RunDir(folder) if RunDir(folder).manifest.is_file() or RunDir(folder).resolved.is_file() else run_of(folder)
    if run is not None:
        if not run.model.is_dir():
            raise UserError(
                f"the run {path} has no finished model yet",
                expected=f"{run.model}, which a run writes when it ends",
                fix=f"finish it with: zhibei resume {path}",
                where="model.path",
            )
        folder = run.model
    if (folder / "adapter_config.json").is_file():
        if list(folder.glob("model*.safetensors")):
            raise UserError(
                f"{folder} holds an adapter (adapter_config.json) and whole weights (model*.safetensors)",
                expected="one of them",
                fix="move one into a folder of its own: the adapter with its adapter_model.safetensors, or the weights "
                "with config.json",
                where="model.path",
            )
        return Located(_base_of(folder, base), adapter=folder, run=run)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json",
            expected="a Hugging Face folder: config.json, tokenizer files, model.safetensors",
            fix=_nested_hint(folder),
            where="model.path",
        )
    return Located(str(folder.resolve()), run=run)


def _base_of(adapter: Path, base: str | None) -> str:
    try:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"{adapter}/adapter_config.json cannot be read: {error!r}",
            expected="JSON with base_model_name_or_path",
            fix="copy the adapter folder again from where it was written",
            where="model.path",
        ) from None
    wanted = base or str(named)
    if Path(wanted).expanduser().is_dir():
        return str(Path(wanted).expanduser().resolve())
    if wanted.startswith((".", "/", "~")) or wanted.count("/") > 1:
        raise UserError(
            f"the adapter {adapter} was trained on {wanted}, which is not here",
            expected="its base model at that path",
            fix="name the base where it lies now: --base PATH (chat) or put the folder back",
            where="model.path",
        )
    return wanted


def _near(folder: Path) -> str | None:
    parent = folder.parent
    if not parent.is_dir():
        return None
    found = difflib.get_close_matches(folder.name, [entry.name for entry in parent.iterdir() if entry.is_dir()], n=1)
    return str(parent / found[0]) if found else None


TRAINING_STATES: dict[str, str] = {
    "*.distcp": "these are shards of one model; gather them first: accelerate merge-weights SHARDS OUTPUT",
    "*/*.distcp": "these are shards of one model; gather them first: accelerate merge-weights SHARDS OUTPUT",
    "zero_to_fp32.py": "this is a DeepSpeed checkpoint; gather it first: python zero_to_fp32.py . OUTPUT",
    "global_step*": "this is a DeepSpeed checkpoint; gather it first with its zero_to_fp32.py",
    "files.json": "this is a checkpoint inside a run of zhibei: finish the run (zhibei resume RUN) and use the run, or "
    "make a model of it: zhibei export RUN --to hf --checkpoint STEP",
    "optimizer.pt": "this is a training state without a model; use the folder that the model was saved into",
}
"""What training leaves that is no model, and how to make one of it."""


def _nested_hint(folder: Path) -> str:
    for pattern, hint in TRAINING_STATES.items():
        if any(folder.glob(pattern)):
            return hint
    nested = sorted(path.parent for path in folder.glob("*/config.json"))
    if nested:
        return f"write {nested[-1]}"
    if list(folder.glob("consolidated.*.pth")):
        return f"these are Meta's original weights; convert them first: zhibei export {folder} --to hf"
    return "point at the folder that the model was saved or downloaded into"
