"""Where a model or tokenizer lies on this machine: a folder, a run, or a download of the hub. Asks no network."""

from __future__ import annotations

import os
from pathlib import Path

from zhibei.model.locate import HUB_ID


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or Path(home) / "hub").expanduser()


def folder_of(path: str, *, revision: str | None = None, needs: str = "config.json") -> Path | None:
    """The folder behind a path or hub id, where `needs` lies; None when it is not on this machine.

    Of a hub id: the snapshot that `revision` (or `main`) names in the download cache.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / needs).is_file():
            return candidate
    if folder.exists() or not HUB_ID.fullmatch(path):
        return folder if folder.is_dir() else None
    download = hub_cache() / f"models--{path.replace('/', '--')}"
    reference = download / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or ""
    snapshot = download / "snapshots" / commit
    return snapshot if commit and (snapshot / needs).is_file() else None
