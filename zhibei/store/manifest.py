"""manifest.json: what a run was made from; written by training, required by every later stage. Knows only plain values.

{"format": 1, "zhibei": "0.1.0", "run_id": uuid, "created": time, "environment": {...},
 "base": {"path", "fingerprint"}, "tokenizer": {"sha256", ...}, "template": {"name", "jinja", "sha256"},
 "special_ids": {...}, "supervise", "max_tokens", "data": [{"path", "bytes", "sha256"}], "prepared_key",
 "global_batch", "seed", "method", "precision", "parent_run",
 "finished": null, or time and final figures, "model_files": [{"name", "bytes", "sha256"}] once finished}
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.store.files import read_json, sha256_of, sha256_of_text, write_json_atomic
from zhibei.store.headers import read_header
from zhibei.store.run_dir import RunDir

MANIFEST_FORMAT = 1
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
DESCRIBED = (
    "base", "tokenizer", "template", "special_ids", "supervise", "max_tokens", "data", "prepared_key",
    "global_batch", "seed", "method", "precision", "parent_run",
)  # fmt: skip
"""What training must say; the rest is known here."""

WHOLE_BYTES = 64 * 2**20
SAMPLE_BYTES = 64 * 2**10
NUM_SAMPLES = 256
LAUNCHES = "ZHIBEI_LAUNCHES"
"""Environment variable: the launches that this run belongs to; started again by one of them, it goes on."""


def new_manifest(described: Mapping[str, Any], *, device_name: str) -> dict[str, Any]:
    """A manifest for a run that starts now, with a new run id. `described` must have every name in DESCRIBED."""
    missing = [name for name in DESCRIBED if name not in described]
    if missing:
        raise ValueError(f"a manifest needs {', '.join(missing)}")
    return {
        "format": MANIFEST_FORMAT,
        "zhibei": _version("zhibei"),
        "run_id": str(uuid.uuid4()),
        "created": now(),
        "finished": None,
        "launch": [name for name in os.environ.get(LAUNCHES, "").split(",") if name],
        "environment": environment(device_name=device_name),
        **described,
    }


def environment(*, device_name: str) -> dict[str, Any]:
    """Versions and machine, without importing anything heavy."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": device_name,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def template_entry(name: str, *, jinja: str) -> dict[str, str]:
    """How a template is named in a manifest: by name, by its text, and by the hash of its text."""
    return {"name": name, "jinja": jinja, "sha256": sha256_of_text(jinja)}


def model_fingerprint(folder: Path) -> str:
    """SHA-256 that changes when a model folder's config or weights change.

    Taken over config.json and adapter_config.json (parsed, keys sorted), then for each *.safetensors file in order of
    name: name, size, header, and the data: all of it up to 64 MiB per file, beyond that 256 blocks of 64 KiB spread
    evenly from the first byte to the last. A change confined to bytes between the blocks is not seen: the fingerprint
    tells models apart, it does not prove that a file is undamaged. Path and time of a folder do not matter.
    """
    sha256 = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            sha256.update(name.encode() + json.dumps(read_json(folder / name), sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "no safetensors weights here",
            expected="a model folder with *.safetensors files",
            fix="convert the weights first (pickle files such as .bin are never opened)",
            where=str(folder),
        )
    for path in files:
        header = read_header(path)
        size = path.stat().st_size
        sha256.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            sha256.update(file.read(header.data_start))
            for start, num_bytes in _sampled_blocks(size - header.data_start):
                file.seek(header.data_start + start)
                sha256.update(file.read(num_bytes))
    return sha256.hexdigest()


def _sampled_blocks(data_bytes: int) -> list[tuple[int, int]]:
    """(start, length) of the blocks that are hashed, the last one ending with the data."""
    if data_bytes <= WHOLE_BYTES:
        return [(start, min(2**20, data_bytes - start)) for start in range(0, data_bytes, 2**20)]
    last = data_bytes - SAMPLE_BYTES
    return [(last * number // (NUM_SAMPLES - 1), SAMPLE_BYTES) for number in range(NUM_SAMPLES)]


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, whole or not at all."""
    write_json_atomic(RunDir(run_dir).manifest, dict(manifest))


def finish_manifest(run_dir: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Note that the run ended, when, with which figures, and the hashes of the model's files; the whole manifest.

    Call it when `model/` is in its place: `zhibei verify` compares the files with these hashes ever after.
    """
    manifest = read_manifest(run_dir)
    model_files = sorted(path for path in RunDir(run_dir).model.glob("*") if path.is_file())
    manifest["model_files"] = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in model_files
    ]
    manifest["finished"] = {"time": now(), **figures}
    write_manifest(run_dir, manifest)
    return manifest


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The manifest of a run. UserError when there is none, or it is not one that this version reads."""
    path = RunDir(run_dir).manifest
    if not path.is_file():
        raise UserError(
            "the run directory has no manifest.json",
            expected="a run directory that zhibei's training wrote",
            fix="give the run directory itself (runs/<name>), or train the model with zhibei",
            where=str(run_dir),
        )
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MANIFEST_FORMAT:
        raise UserError(
            f"manifest of format {found!r}",
            expected=f"format {MANIFEST_FORMAT}",
            fix="use the version of zhibei that wrote it" if found else "the file was edited; restore it from a copy",
            where=str(path),
        )
    return manifest


def require_manifest(run_dir: Path, expected: Mapping[str, Any] | None = None, *, fix: str = "") -> dict[str, Any]:
    """The manifest, if it says what the coming stage relies on.

    `expected` maps dotted names to values: `{"template.sha256": "…", "tokenizer.sha256": "…"}`. UserError that names
    both values of each one that is absent or differs. Training wrote it; silently going on would give nonsense.
    """
    manifest = read_manifest(run_dir)
    errors = [
        UserError(
            f"{name} is {_short(wanted)} now, and was {_short(recorded(manifest, name))} when the run was trained",
            expected=f"{name} = {_short(recorded(manifest, name))}",
            fix=fix or "use what the run was trained with, or train anew with what you have now",
            where=str(RunDir(run_dir).manifest),
        )
        for name, wanted in (expected or {}).items()
        if recorded(manifest, name) != wanted
    ]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        where = str(RunDir(run_dir).manifest)
        raise SeveralErrors(
            errors, what=f"{len(errors)} things are not as they were when the run was trained", where=where
        )
    return manifest


def recorded(manifest: Mapping[str, Any], name: str) -> Any:
    """The value under a dotted name (`template.sha256`); None when it is absent."""
    value: Any = manifest
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def require_base(adapter: Path, weights: Path) -> None:
    """An adapter belongs to the very weights it was trained on; on others it gives nonsense without any message.

    Asked of adapters in a run of zhibei (`runs/<name>/model`); others carry no fingerprint. Raises UserError.
    """
    run = run_of(adapter)
    if run is None or not weights.is_dir() or not recorded(read_manifest(run.path), "base.fingerprint"):
        return
    path = recorded(read_manifest(run.path), "base.path")
    fix = f"give the base it was trained on ({path}), or train an adapter on {weights}"
    require_manifest(run.path, {"base.fingerprint": model_fingerprint(weights)}, fix=fix)


def run_of(folder: Path) -> RunDir | None:
    """The run that a folder is, or that its model folder belongs to."""
    for place in (folder, folder.resolve().parent):
        run = RunDir(place)
        if run.manifest.is_file() and (place == folder or run.model.resolve() == folder.resolve()):
            return run
    return None


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
