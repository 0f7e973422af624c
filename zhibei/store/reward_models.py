"""Whether a reward model is an adapter on the base that a run trains on. Reads JSON and fingerprints, no weights."""

from __future__ import annotations

from pathlib import Path

from zhibei.config.run import RunFile
from zhibei.store.files import read_json
from zhibei.store.manifest import model_fingerprint, read_manifest, recorded, run_of
from zhibei.store.pipeline_dir import final_run
from zhibei.store.run_dir import RunDir

ADAPTER_CONFIG = "adapter_config.json"
HEADS = {"score", "classifier"}
"""What PEFT names as saved beside the adapters of every sequence classifier."""


def model_folder(path: str) -> Path:
    """The folder with the weights or the adapter behind a path that a person wrote; it may not be there."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return folder
    folder = final_run(folder)
    return RunDir(folder).model if RunDir(folder).manifest.is_file() else folder


def score_adapter_on_base(run: RunFile, reward_model: str) -> Path | None:
    """The adapter folder of this reward model, where this run's own base can carry it: it was trained by this package
    on the same weights (by fingerprint) with the same positions. None for every other reward model."""
    adapter, base = model_folder(reward_model), model_folder(run.model.path)
    if run.model.method == "full" or not (adapter / ADAPTER_CONFIG).is_file() or (base / ADAPTER_CONFIG).is_file():
        return None
    config, trained_by = read_json(adapter / ADAPTER_CONFIG), run_of(adapter)
    if trained_by is None or config.get("task_type") != "SEQ_CLS" or not set(config["modules_to_save"] or ()) <= HEADS:
        return None
    manifest = read_manifest(trained_by.path)
    theirs = recorded(manifest, "base.fingerprint")
    same_positions = recorded(manifest, "settings.model.rope_scaling_factor") == run.model.rope_scaling_factor
    if theirs is None or not same_positions or not list(base.glob("*.safetensors")):
        return None
    return adapter if model_fingerprint(base) == theirs else None


def shared_judge(run: RunFile) -> Path | None:
    """The adapter folder of the run's reward model where it lies on the run's base as one more adapter; None where it
    is a model of its own, or there is none."""
    named = getattr(run.training, "reward_model", None)
    if named is None or (run.stage == "ppo" and run.ppo.models == "separate"):
        return None
    return score_adapter_on_base(run, named)
