"""Proves that a checkpoint, a run, or a Hugging Face or PEFT folder is whole. Changes nothing, unpickles nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.checkpoint import STEP_NAME, check_checkpoint, list_steps
from zhibei.store.files import read_json, sha256_of
from zhibei.store.folders import LEFT_OVER_NAME, Problem
from zhibei.store.ledger import read_ledger
from zhibei.store.manifest import read_manifest, require_base
from zhibei.store.metrics import read_metrics
from zhibei.store.model_folder import inspect_adapter_folder, inspect_model_folder
from zhibei.store.pipeline_dir import PIPELINE_FILE
from zhibei.store.run_dir import RunDir
from zhibei.store.weights import FileFindings, inspect_json, inspect_weights


@dataclass
class Verdict:
    """What was looked at, file by file. `kind`: checkpoint, checkpoints, run, pipeline, model or adapter."""

    path: Path
    kind: str
    files: list[FileFindings] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        return [Problem(str(file.path), what) for file in self.files for what in file.problems]

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "sound": self.is_sound,
            "files": [
                {
                    "path": str(file.path),
                    "bytes": file.num_bytes,
                    "tensors": file.num_tensors,
                    "problems": file.problems,
                    "notes": file.notes,
                }
                for file in self.files
            ],
        }


def verify_folder(path: Path) -> list[Problem]:
    """Everything that is wrong with a folder; empty when it is sound. UserError when it is nothing that we know."""
    return inspect_folder(path).problems


def inspect_folder(path: Path) -> Verdict:
    """Look at every file of a checkpoint, a run, a model or an adapter folder."""
    if not path.is_dir():
        raise UserError(
            "there is no such folder" if not path.exists() else "this is a file",
            expected="a run directory, a checkpoint, or a Hugging Face or PEFT folder",
            fix=f"try {path.parent}" if path.is_file() else "check the path",
            where=str(path),
        )
    for kind, (is_kind, inspect) in KINDS.items():
        if is_kind(path):
            return Verdict(path, kind, inspect(path))
    raise UserError(
        "nothing here that can be verified",
        expected="a run directory (manifest.json), a checkpoint (files.json), a model (config.json) or an adapter",
        fix="give the folder itself, e.g. runs/<name> or runs/<name>/model",
        where=str(path),
    )


def inspect_checkpoint(path: Path) -> list[FileFindings]:
    """Names, sizes, hashes, step and finiteness of one checkpoint."""
    match = STEP_NAME.fullmatch(path.name)
    found: dict[Path, FileFindings] = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            found[file], _ = inspect_weights(file)
        else:
            found[file] = FileFindings(file, num_bytes=file.stat().st_size)
    for problem in check_checkpoint(path, step=int(match.group(1)) if match else None):
        findings = found.setdefault(Path(problem.path), FileFindings(Path(problem.path)))
        # A cut file is seen twice, by its list entry and by its own header.
        if not any(what.startswith("truncated") for what in findings.problems):
            findings.problems.append(problem.what)
    return list(found.values())


def inspect_checkpoints(folder: Path) -> list[FileFindings]:
    """All checkpoints of a run; what killed saves left behind is named, and cleaned by the next resume."""
    files = [findings for _, path in list_steps(folder) for findings in inspect_checkpoint(path)]
    return files + _left_overs(folder)


def _left_overs(folder: Path) -> list[FileFindings]:
    note = "left by a save that was killed or is under way"
    return [
        FileFindings(path, notes=[note]) for path in sorted(folder.iterdir()) if LEFT_OVER_NAME.fullmatch(path.name)
    ]


def inspect_run(path: Path) -> list[FileFindings]:
    """The whole run directory: manifest, metrics, ledger, audit, proofs, every checkpoint and the finished model."""
    run = RunDir(path)
    manifest_file, manifest = _inspect_manifest(run)
    files = [manifest_file, _inspect_metrics(run.metrics), *_left_overs(path)]
    if run.ledger.exists():
        files.append(_inspect_ledger(run.ledger))
    files += [inspect_json(name)[0] for name in (run.audit,) if name.exists()]
    if run.proofs.exists():
        files.append(_inspect_proofs(run.proofs))
    if run.checkpoints.is_dir():
        files += inspect_checkpoints(run.checkpoints)
        files += _of_other_runs(run.checkpoints, run_id=manifest.get("run_id"))
    if run.model.is_dir():
        files += inspect_folder(run.model).files
        files += _against_hashes(run.model, manifest.get("model_files") or [])
        files += _base_of_adapter(run.model)
    elif manifest.get("finished"):
        files.append(FileFindings(run.model, problems=["missing, although the manifest says that the run finished"]))
    return files


def _inspect_manifest(run: RunDir) -> tuple[FileFindings, dict[str, Any]]:
    findings = FileFindings(run.manifest)
    try:
        manifest = read_manifest(run.path)
        findings.num_bytes = run.manifest.stat().st_size
        return findings, manifest
    except UserError as problem:
        findings.problems.append(problem.what)
        return findings, {}


def _inspect_metrics(path: Path) -> FileFindings:
    findings = FileFindings(path)
    if not path.exists():
        findings.notes.append("none yet: no step was logged")
        return findings
    findings.num_bytes = path.stat().st_size
    try:
        read_metrics(path, notes=findings.notes)
    except UserError as problem:
        findings.problems.append(f"{problem.where.rpartition(', ')[2]}: {problem.what}")
    return findings


def _inspect_ledger(path: Path) -> FileFindings:
    findings = FileFindings(path, num_bytes=path.stat().st_size)
    try:
        read_ledger(path)
    except UserError as problem:
        findings.problems.append(f"{problem.where.rpartition(', ')[2]}: {problem.what}")
    return findings


def _inspect_proofs(path: Path) -> FileFindings:
    findings, proofs = inspect_json(path)
    for proof in proofs if isinstance(proofs, list) else []:
        if isinstance(proof, dict) and proof.get("passed") is False:
            findings.problems.append(f"proof {proof.get('name')} failed: {proof.get('detail', '')}")
    return findings


def _of_other_runs(checkpoints: Path, *, run_id: str | None) -> list[FileFindings]:
    files = []
    for _, path in list_steps(checkpoints):
        try:
            owner = read_json(path / "state.json").get("run_id")
        except (UserError, AttributeError):
            continue  # already reported
        if run_id is not None and owner is not None and owner != run_id:
            files.append(FileFindings(path, problems=[f"belongs to run {owner}, the manifest says {run_id}"]))
    return files


def _against_hashes(folder: Path, recorded: list[dict[str, Any]]) -> list[FileFindings]:
    """Files whose content is not the one that was written when the run ended."""
    files = []
    for item in recorded:
        path = folder / str(item.get("name"))
        if not path.is_file():
            files.append(FileFindings(path, problems=["missing"]))
        elif sha256_of(path) != item.get("sha256"):
            files.append(FileFindings(path, problems=["hash differs from the one in the manifest"]))
    return files


def _base_of_adapter(model: Path) -> list[FileFindings]:
    """An adapter is only as sound as the base below it: what lies at its path must be what it was trained on."""
    try:
        base = Path(str(read_json(model / "adapter_config.json")["base_model_name_or_path"]))
    except (UserError, KeyError, TypeError):
        return []  # no adapter, or one that is reported already
    try:
        require_base(model, base)
    except UserError as problem:
        return [FileFindings(base, problems=[problem.what])]
    return []


def inspect_pipeline(path: Path) -> list[FileFindings]:
    """Every run of a pipeline, in the order of its stages."""
    findings, content = inspect_json(path / PIPELINE_FILE)
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, list) or not stages:
        findings.problems += [] if findings.problems else ["names no stages"]
        return [findings]
    files = [findings]
    for stage in stages:
        run = path / str(stage)
        if run.is_dir():
            files += inspect_run(run)
        else:
            files.append(FileFindings(run, problems=["missing, although pipeline.json names this stage"]))
    return files


KINDS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], list[FileFindings]]]] = {
    "checkpoint": (
        lambda path: (path / "files.json").is_file() or STEP_NAME.fullmatch(path.name) is not None,
        inspect_checkpoint,
    ),
    "pipeline": (lambda path: (path / PIPELINE_FILE).is_file(), inspect_pipeline),
    "run": (lambda path: RunDir(path).manifest.is_file() or RunDir(path).resolved.is_file(), inspect_run),
    "adapter": (lambda path: (path / "adapter_config.json").is_file(), inspect_adapter_folder),
    "model": (
        lambda path: (path / "config.json").is_file() or any(path.glob("model*.safetensors*")),
        inspect_model_folder,
    ),
    "checkpoints": (lambda path: bool(list_steps(path)), inspect_checkpoints),
}
