"""What a run begins with and needs no torch for: its directory, which is never written over, and its tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.run import RunFile
from zhibei.data.prepared_cache import cache_root
from zhibei.model.locate import locate
from zhibei.store.manifest import require_manifest
from zhibei.store.run_dir import RunDir
from zhibei.text.tokenizer import Tokenizer, load_tokenizer


def run_dir_of(run: RunFile) -> RunDir:
    return RunDir(Path(run.runs) / run.name)


def refuse_existing(run_dir: RunDir) -> None:
    """A directory that holds anything is never written over. Raises UserError."""
    if run_dir.path.is_file() or (run_dir.path.is_dir() and any(run_dir.path.iterdir())):
        raise UserError(
            f"{run_dir.path} exists already",
            expected="a new run name; nothing that exists is overwritten",
            fix=f"continue it with: zhibei resume {run_dir.path}; or choose another name: name=NEW",
            where="name",
        )


def require_writable(run_dir: RunDir) -> None:
    """The run's folder can be made where it should be; found out before rows are prepared. Raises UserError."""
    place = run_dir.path.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".zhibei-", dir=place):
            pass
    except OSError as problem:
        raise UserError(
            f"{run_dir.path} cannot be made: {place} is not writable ({problem.strerror})",
            expected="a folder that can be written to",
            fix="set runs: to a folder of yours, or make that one writable",
            where="runs",
        ) from None


def load_run_tokenizer(run: RunFile) -> Tokenizer:
    """The tokenizer the run file names, else the one beside the model (for an adapter: its own, else its base's).

    Raises UserError when the model is that of a run and the tokenizer in it is no longer the one it was trained with.
    """
    path, options = tokenizer_place(run)
    tokenizer = load_tokenizer(path, cache=cache_root(run.data.cache), **options)
    parent = locate(run.model.path).run
    if parent is not None and run.model.tokenizer is None and parent.manifest.is_file():
        fix = "put the tokenizer files back as the run wrote them (zhibei verify names the changed one)"
        require_manifest(parent.path, {"tokenizer.sha256": tokenizer.fingerprint}, fix=fix)
    return tokenizer


def tokenizer_place(run: RunFile) -> tuple[str, dict[str, Any]]:
    """Path and loading options of the run's tokenizer; training reads it from there and saves it from there."""
    trust = {"trust_remote_code": run.model.trust_remote_code}
    if run.model.tokenizer is not None:
        return run.model.tokenizer, trust
    found = locate(run.model.path)
    own = found.adapter if found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file() else None
    return str(own or found.weights), {"revision": run.model.revision, **trust}
