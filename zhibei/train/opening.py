"""Opens a run directory: describes the run in it, or finds where to resume. Knows no loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.resolve import write_resolved
from zhibei.config.run import RunFile
from zhibei.data.prepare import source_files
from zhibei.data.preview import preview_rows
from zhibei.model.locate import Located, locate
from zhibei.model.ranks import current
from zhibei.store.checkpoint import check_checkpoint, newest_sound
from zhibei.store.files import write_json_atomic, write_text_atomic
from zhibei.store.folders import clean_left_overs
from zhibei.store.ledger import write_ledger
from zhibei.store.manifest import (
    model_fingerprint,
    new_manifest,
    read_manifest,
    recorded,
    require_manifest,
    template_entry,
    write_manifest,
)  # fmt: skip
from zhibei.store.run_dir import RunDir
from zhibei.train.planning import write_plan
from zhibei.train.resume import Progress, restore

if TYPE_CHECKING:
    from zhibei.train.materials import Materials

MAY_CHANGE = (
    "micro_batch_tokens", "evaluate_every", "evaluate_rows", "early_stop_patience", "save_every", "keep_checkpoints",
    "keep_best", "save_in_background", "sample_prompts", "sample_tokens", "rollout_batch", "reward_seconds",
    "vllm_memory_share",
)  # fmt: skip


def open_new(run_dir: RunDir, materials: Materials, manifest: Mapping[str, Any]) -> Progress:
    """Write run.yaml, resolved.yaml, manifest.json, plan.json, audit.json and ledger.jsonl; returns fresh counters."""
    write_text_atomic(run_dir.run_file, materials.resolved.text)
    write_resolved(materials.resolved, run_dir.resolved)
    previews = preview_rows(materials.rows.train, materials.tokenizer)
    write_json_atomic(run_dir.audit, {**materials.rows.audit, "previews": previews})
    write_ledger(run_dir.ledger, materials.rows.ledger)
    write_plan(run_dir.plan, materials.plan)
    write_manifest(run_dir.path, manifest)
    return Progress(run_id=manifest["run_id"], key=materials.rows.key)


def describe(materials: Materials) -> dict[str, Any]:
    """The manifest of this run: what later stages require to find unchanged."""
    run, tokenizer, template = materials.run, materials.tokenizer, materials.template
    found = locate(run.model.path)
    described = {
        "base": base_entry(found),
        "tokenizer": {"sha256": tokenizer.fingerprint, "source": tokenizer.source},
        "template": template_entry(materials.rows.template, jinja=template.as_jinja()),
        "special_ids": {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id},
        "supervise": run.data.supervise,
        "max_tokens": run.data.max_tokens,
        "data": source_files(run.data),
        "prepared_key": materials.rows.key,
        "global_batch": run.training.global_batch,
        "seed": run.seed,
        "method": run.model.method,
        "precision": materials.precision,
        "settings": settings_of(run),
        "parent_run": str(found.run.path.resolve()) if found.run is not None else None,
        "stage": run.stage,
        **materials.task.described,
    }
    name = torch.cuda.get_device_name(materials.device) if materials.device.type == "cuda" else "cpu"
    return new_manifest(described, device_name=name)


def settings_of(run: RunFile) -> dict[str, dict[str, Any]]:
    """What the run file says that decides what is learned, by section; a resumed run must still say it.

    How a step is computed (passes, recomputation, compilation) and when it is looked at or saved may change.
    """
    sections = {"model": ("quantize", "rope_scaling_factor"), "data": ("shuffle", "group_by_length")}
    chosen = {
        section: {name: getattr(getattr(run, section), name) for name in names} for section, names in sections.items()
    }
    if run.model.method != "full":
        chosen["lora"] = run.lora.model_dump(mode="json")
    training = run.training.model_dump(mode="json")
    return {**chosen, run.stage: {name: value for name, value in training.items() if name not in MAY_CHANGE}}


def base_entry(found: Located) -> dict[str, Any]:
    """Path and fingerprint of the base weights; a hub id has its name only until it is a folder here."""
    folder = Path(found.weights)
    return {
        "path": found.weights,
        "adapter": str(found.adapter) if found.adapter is not None else None,
        "fingerprint": model_fingerprint(folder) if folder.is_dir() else None,
    }


def open_again(run_dir: RunDir, materials: Materials) -> tuple[Progress, list[str]]:
    """The counters of the newest sound checkpoint, its weights and states put back, and notes on unsound ones.

    Raises UserError when the run belongs to other rows, template, tokenizer or base model.
    """
    now = describe(materials)
    same = ("prepared_key", "special_ids", "supervise", "max_tokens", "method", "precision", "global_batch", "seed")
    expected = {name: now[name] for name in same}
    expected |= {"base.fingerprint": now["base"]["fingerprint"], "tokenizer.sha256": now["tokenizer"]["sha256"]}
    expected |= {"template.sha256": now["template"]["sha256"]}
    if recorded(read_manifest(run_dir.path), "settings") is not None:
        expected |= {
            f"settings.{section}.{name}": value
            for section, values in now["settings"].items()
            for name, value in values.items()
        }
    manifest = require_manifest(run_dir.path, expected)
    path, notes = current().first_does(lambda: _to_go_on_from(run_dir))
    if path is None:
        return Progress(run_id=manifest["run_id"], key=materials.rows.key), notes
    progress = restore(Path(path), materials.stepper, key=materials.rows.key)
    if progress.run_id != manifest["run_id"]:
        raise UserError(
            f"the checkpoint belongs to run {progress.run_id}, the manifest to run {manifest['run_id']}",
            expected="checkpoints of this run",
            fix="move the foreign checkpoint away",
            where=path,
        )
    return progress, notes


def _to_go_on_from(run_dir: RunDir) -> tuple[str | None, list[str]]:
    """The newest sound checkpoint, with notes on what was cleaned and what is not sound."""
    left_over = [str(note) for note in clean_left_overs(run_dir.path)]
    found = newest_sound(run_dir.checkpoints)
    if found is None:
        return None, [*left_over, "no checkpoint yet: starts at step 0"]
    return str(found.path), [*left_over, *(str(note) for note in found.notes)]


def checkpoint_path(run_dir: RunDir, step: int | None) -> Path | None:
    """The folder of a step's checkpoint, if it is there and sound."""
    if step is None:
        return None
    path = run_dir.checkpoint(step)
    return path if path.is_dir() and not check_checkpoint(path, step=step) else None
