"""Data sets on the Hugging Face hub: which files hold a split, and their download. Knows no formats.

The usual layouts are understood: patterns in the card's `configs`, `<subset>/`, `data/`, `train-00000-of-00008.…`,
`train.json`; a repository without any split in its names is one training set. Nothing here runs code of the repository.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.run import Source
from zhibei.text.hub import silence

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PREFERENCE = (".parquet", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
"""When a split exists in several containers, the first of these is read."""
SHARD = re.compile(r"(.*?)-(\d{5})-of-(\d{5})(.*)")
NOT_DATA = re.compile(
    r"(^|/)(\.|dataset_infos?\.json$|dataset_dict\.json$|state\.json$|readme|license|requirements)", re.I
)


def suffix(name: str) -> str:
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix


def split_of(name: str) -> str | None:
    """The split a file name speaks of, by its last word that does: `data/train-00000-of-00001.parquet` -> train."""
    words = re.split(r"[/._\-\s]+", name.lower())
    for word in reversed(words):
        for split, names in SPLIT_NAMES.items():
            if word in names:
                return split
    return None


def _subset_folder(name: str) -> str:
    """The folder that could name a subset ("" for the top and for data/)."""
    folders = [part for part in PurePosixPath(name).parts[:-1] if part.lower() != "data" and split_of(part) is None]
    return folders[0] if folders else ""


def _from_card(names: Sequence[str], configs: Any, source: Source) -> list[str] | None:
    """What the card's `configs` say, or None when they say nothing."""
    if not isinstance(configs, list) or not configs:
        return None
    by_name = {str(entry.get("config_name", "default")): entry for entry in configs if isinstance(entry, dict)}
    defaults = [name for name, entry in by_name.items() if entry.get("default")]
    wanted = source.subset or ("default" if "default" in by_name else (defaults or list(by_name))[0])
    if source.subset is None and len(by_name) > 1 and wanted != "default" and not defaults:
        raise _choose("subset", None, sorted(by_name), source)
    if wanted not in by_name:
        raise _choose("subset", wanted, sorted(by_name), source)
    files = by_name[wanted].get("data_files")
    if not files:
        return None
    entries = files if isinstance(files, list) else [files]
    if all(isinstance(entry, str) for entry in entries):
        entries = [{"split": "train", "path": entries}]
    splits = {entry["split"]: entry["path"] for entry in entries if isinstance(entry, dict) and "path" in entry}
    if source.split not in splits:
        raise _choose("split", source.split, sorted(splits), source)
    patterns = splits[source.split]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # A `**/` may stand for no folder at all, which fnmatch does not know.
    loose = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in loose)]


def _choose(setting: str, wanted: str | None, existing: Sequence[str], source: Source) -> UserError:
    what = f"the data set has no {setting} {wanted!r}" if wanted else f"the data set has several {setting}s"
    return UserError(
        what,
        expected=f"one of {', '.join(existing)}" if existing else f"a data set with a {setting}",
        fix=f"name it: {setting}: {existing[0]}" if existing else "look at its files on the hub",
        where=source.path,
    )


def choose_files(names: Sequence[str], source: Source, *, configs: Any = None) -> list[str]:
    """The files of a repository that hold the wanted split and subset, in order.

    Raises UserError naming the splits or subsets there are, or the shards that are missing.
    """
    data = sorted(name for name in names if suffix(name) in PREFERENCE and not NOT_DATA.search(name))
    if not data:
        loader = f"{source.path.split('/')[-1]}.py" in names
        raise UserError(
            "the data set is made by a script of its repository" if loader else "the data set has no data files",
            expected=f"files ending in {', '.join(PREFERENCE)}",
            fix="download and convert it yourself, or use the copy on its refs/convert/parquet branch",
            where=source.path,
        )
    carded = _from_card(data, configs, source)
    chosen = carded if carded is not None else _by_names(data, source)
    if not chosen:
        raise _choose("split", source.split, sorted({split_of(name) or "train" for name in data}), source)
    kinds = [kind for kind in PREFERENCE if any(suffix(name) == kind for name in chosen)]
    chosen = [name for name in chosen if suffix(name) == kinds[0]]
    _check_shards(chosen, source)
    return chosen


def _by_names(data: Sequence[str], source: Source) -> list[str]:
    folders = sorted({_subset_folder(name) for name in data})
    if source.subset is not None:
        inside = [name for name in data if _subset_folder(name) == source.subset]
        inside = inside or [name for name in data if source.subset in re.split(r"[/.]+", name)]
        if not inside:
            raise _choose("subset", source.subset, [folder for folder in folders if folder], source)
        data = inside
    elif len(folders) > 1 and "" not in folders:
        raise _choose("subset", None, folders, source)
    elif len(folders) > 1:
        data = [name for name in data if _subset_folder(name) == ""]
    splits = {name: split_of(name) for name in data}
    if not any(splits.values()) and source.split == "train":
        return list(data)
    key = next((key for key, names in SPLIT_NAMES.items() if source.split in names), source.split)
    return [name for name in data if splits[name] == key or source.split in re.split(r"[/.\-]+", name)]


def _check_shards(chosen: Sequence[str], source: Source) -> None:
    shards: dict[tuple[str, str], set[int]] = {}
    for name in chosen:
        found = SHARD.fullmatch(name)
        if found:
            shards.setdefault((found[1], found[3]), set()).add(int(found[2]))
    for (stem, total), present in shards.items():
        missing = sorted(set(range(int(total))) - present)
        if missing:
            raise UserError(
                f"{len(missing)} of {int(total)} parts of {stem} are missing (first: part {missing[0]:05d})",
                expected="all parts",
                fix="report it to the data set's author, or go online if this is an incomplete download",
                where=source.path,
            )


def download(
    source: Source, notice: Callable[[str], None] | None = None, *, advice: str = ""
) -> list[tuple[Path, str]]:
    """Downloads what is needed (kept in the hub's own cache) and returns (file, name to show) in order.

    `advice` is said when there is no such data set. Offline, an earlier download is used.
    Raises UserError for data sets that are absent, gated or out of reach.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors
    from huggingface_hub.repocard import metadata_load

    def card_of(path: str | Path) -> Any:
        return (metadata_load(path) or {}).get("configs")

    try:
        if why := silence():
            raise ConnectionError(why)
        info = hub.HfApi().dataset_info(source.path)
        names = [file.rfilename for file in info.siblings or []]
        fetch = _Fetch(hub, source.path, info.sha)
        configs = card_of(fetch("README.md")) if "README.md" in names else None
        chosen = choose_files(names, source, configs=configs)
        label = f"{source.path}@{(info.sha or 'main')[:8]}"
        return [(Path(fetch(name)), f"{label}/{name}") for name in chosen]
    except errors.GatedRepoError:
        raise UserError(
            "the data set is gated: its authors want you to accept terms first",
            expected="an account that has access",
            fix=f"accept them at https://huggingface.co/datasets/{source.path}, then log in with `hf auth login`",
            where=source.path,
        ) from None
    except errors.RepositoryNotFoundError:
        raise _neither(source, advice, "the hub has no public data set of that name (or it is private)") from None
    except errors.HFValidationError:
        raise _neither(source, advice, "it is none, by its form") from None
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = _reason(error)
    except Exception as error:
        # huggingface_hub lets errors of its HTTP library through (httpx in 1.x, its own in 2.x).
        if "connect" not in type(error).__name__.lower() and "timeout" not in type(error).__name__.lower():
            raise
        reason = _reason(error)
    folder = _earlier_download(Path(constants.HF_HUB_CACHE), source.path)
    if folder is None:
        raise _neither(source, advice, f"the hub cannot be reached ({reason}), nor is there an earlier download")
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    configs = card_of(folder / "README.md") if "README.md" in names else None
    if notice:
        notice(f"{source.path}: the hub cannot be reached ({reason}); using the earlier download {folder.name[:8]}")
    label = f"{source.path}@{folder.name[:8]}"
    return [(folder / name, f"{label}/{name}") for name in choose_files(names, source, configs=configs)]


def _earlier_download(cache: Path, name: str) -> Path | None:
    """The newest commit of a data set in the hub's cache. It may lack files that were not asked for; parts of a split
    that are missing are noticed when its files are chosen."""
    commits = (cache / f"datasets--{name.replace('/', '--')}" / "snapshots").glob("*")
    return max(commits, key=lambda folder: folder.stat().st_mtime, default=None)


class _Fetch:
    """Downloads files of one commit, so that all parts belong together."""

    def __init__(self, hub: Any, repository: str, commit: str | None) -> None:
        self.hub, self.repository, self.commit = hub, repository, commit

    def __call__(self, name: str) -> str:
        return self.hub.hf_hub_download(self.repository, name, repo_type="dataset", revision=self.commit)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "offline mode is enabled" in text.lower():
        return "HF_HUB_OFFLINE is set"
    return text[:100] or type(error).__name__


def _neither(source: Source, advice: str, reason: str) -> UserError:
    return UserError(
        f"no file or folder of that name here, and as a hub id: {reason}",
        expected="an existing path, or the id (owner/name) of a data set on the hub",
        fix=advice or "check the spelling; offline, download the data set and give its folder",
        where=source.path,
    )
