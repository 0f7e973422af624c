"""The files a source names: one file, a folder, a glob, or a data set on the hub. Knows no formats."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable
from pathlib import Path

from zhibei.config.errors import UserError
from zhibei.config.run import Source

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".text", ".md")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_data_file(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return path.is_file() and not name.startswith(".") and name.endswith(SUFFIXES)


def files_of(source: Source, notice: Callable[[str], None] | None = None) -> list[tuple[Path, str]]:
    """Files of a source in the order of their names, each with the name to show; a hub data set is downloaded first.

    A path that exists is never taken for a hub id. Raises UserError when nothing is found, and when `split` or
    `subset` are set on local files, where they have no effect.
    """
    path = Path(source.path).expanduser()
    if path.exists() or glob.has_magic(source.path):
        _refuse_hub_settings(source)
        return [(name, str(name)) for name in _local(path, source)]
    if is_hub_id(source.path):
        from zhibei.data.hub import download

        return download(source, notice, advice=near_name(path))
    raise _missing(source, path)


def is_hub_id(path: str) -> bool:
    """owner/name, and not the name of a data file."""
    return bool(HUB_ID.fullmatch(path)) and not path.lower().removesuffix(".gz").endswith(SUFFIXES)


def _refuse_hub_settings(source: Source) -> None:
    for name, value, default in (("split", source.split, "train"), ("subset", source.subset, None)):
        if value != default:
            raise UserError(
                f"{name}: {value} has no effect on local files",
                expected=f"{name} only with a hub data set",
                fix=f"remove {name}; name the files you want",
                where=source.path,
            )


def _local(path: Path, source: Source) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return _folder(path)
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [name for name in found if is_data_file(name)] or [name for name in found if name.is_file()]
    if not files:
        raise UserError(
            "no file matches the pattern", expected="at least one file", fix="check the pattern", where=source.path
        )
    return files


def _folder(path: Path) -> list[Path]:
    found = sorted(name for name in path.rglob("*") if is_data_file(name))
    if not found:
        raise UserError(
            "no data file in the folder",
            expected=f"files ending in {', '.join(SUFFIXES)}",
            fix="name the files, or another folder",
            where=str(path),
        )
    return found


def near_name(path: Path) -> str:
    """An existing neighbour with nearly that name, as advice."""
    names = [name.name for name in path.parent.iterdir()] if path.parent.is_dir() else []
    stems = {name.split(".")[0]: name for name in names}
    near = difflib.get_close_matches(path.name, [*names, *stems], n=1)
    return f"did you mean {path.parent / stems.get(near[0], near[0])}?" if near else ""


def _missing(source: Source, path: Path) -> UserError:
    hint = near_name(path) or "check the path"
    if not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist; check the path"
    return UserError("no such file or folder", expected="an existing file, folder or glob", fix=hint, where=source.path)
