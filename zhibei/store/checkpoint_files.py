"""The list of a checkpoint's files: made by who writes them, checked against what lies there. Knows no model.

`files.json` names every other file with size and SHA-256; of tensors that lie in parts also which rows a file holds
(format 2). One process alone names its files `model.safetensors`; of several, each writes its own, such as
`model.rank-00001.safetensors`. Format 1, without rows, is read like format 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.files import HashedFile, disk_error, drop_from_page_cache, read_json, sha256_of
from zhibei.store.folders import Problem
from zhibei.store.parts import Part, Span, StoredTensors, spans_of, uncovered
from zhibei.store.shards import (
    DEFAULT_SHARD_BYTES,
    ShardPlan,
    TensorFolder,
    Writable,
    WrittenFile,
    plan_shards,
    read_header,
    write_shards,
)

FILES_FORMAT = 2
Groups = Mapping[str, Mapping[str, "Writable | Part"]]
"""Group -> name -> a whole tensor, or the rows of it that this process writes."""


def bare(tensors: Mapping[str, Writable | Part]) -> dict[str, Writable]:
    """What goes into files, without the places in the whole."""
    return {name: tensor.tensor if isinstance(tensor, Part) else tensor for name, tensor in tensors.items()}


def planned(groups: Groups, *, rank: int, world: int, max_shard_bytes: int) -> dict[str, list[ShardPlan]]:
    """The files of each group. A rank that holds nothing of a group writes no file of it."""
    return {
        group: plan_shards(
            bare(tensors),
            stem=group if world == 1 else f"{group}.rank-{rank:05d}",
            max_shard_bytes=max_shard_bytes,
        )
        for group, tensors in groups.items()
        if tensors or world == 1
    }


def share_bytes(groups: Groups, *, rank: int = 0, world: int = 1, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    """Bytes of the files that `write_share` would write. UserError for a dtype that safetensors cannot hold."""
    plans = planned(groups, rank=rank, world=world, max_shard_bytes=max_shard_bytes)
    return sum(plan.num_bytes(bare(groups[group])) for group, files in plans.items() for plan in files)


def write_share(
    folder: Path,
    groups: Groups,
    *,
    purpose: str,
    rank: int = 0,
    world: int = 1,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[dict[str, Any]]:
    """Write this process's files into a folder that is being filled, and read them back; returns their lines for
    files.json. UserError when the disk refuses or gives back other bytes; who made the folder removes it then."""
    lines = []
    try:
        for group, files in planned(groups, rank=rank, world=world, max_shard_bytes=max_shard_bytes).items():
            for file in write_shards(folder, bare(groups[group]), plans=files):
                rows = {
                    name: [part.start, part.stop, part.num_rows]
                    for name in file.tensors
                    if isinstance(part := groups[group][name], Part)
                }
                lines.append(line_of(file) | ({"rank": rank, "rows": rows} if world > 1 else {}))
        for line in lines:
            require_same(folder / line["name"], line)
    except OSError as problem:
        raise disk_error(problem, purpose=purpose, where=folder.parent) from problem
    return lines


def line_of(file: WrittenFile) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.num_bytes, "sha256": file.sha256, "tensors": len(file.tensors)}


def require_same(path: Path, line: Mapping[str, Any]) -> None:
    """Raises UserError when a file that was just written reads back differently."""
    problem = check_file(path, num_bytes=line["bytes"], sha256=line["sha256"])
    if problem:
        raise _differs(f"{path.name}: {problem}", path.parent.parent)


def require_sound(folder: Path, step: int) -> None:
    """The same for a whole folder, without reading again what its writers have read back."""
    problems = check_checkpoint(folder, step=step, with_hashes=False)
    if problems:
        raise _differs(str(problems[0]), folder.parent)


def _differs(problem: str, where: Path) -> UserError:
    return UserError(
        f"what was just written reads back differently: {problem}",
        expected="the bytes that were written",
        fix="the disk or its driver is faulty: write to another one; older checkpoints are untouched",
        where=str(where),
    )


def write_text(folder: Path, name: str, text: str) -> WrittenFile:
    """A small file with its hash."""
    file = HashedFile(folder / name)
    try:
        file.write(text.encode("utf-8", errors="backslashreplace"))
    except BaseException:
        file.abandon()
        raise
    return WrittenFile(name, file.num_bytes, file.close(), ())


def files_record(step: int, lines: Iterable[Mapping[str, Any]], *, groups: list[str], world: int) -> dict[str, Any]:
    """The content of files.json."""
    return {"format": FILES_FORMAT, "step": step, "world": world, "groups": groups, "files": list(lines)}


def read_groups(path: Path) -> dict[str, StoredTensors]:
    """The tensors of each group, read from disk when asked for. Verify first: see `check_checkpoint`."""
    record = read_json(path / "files.json")
    found = {}
    for group in record["groups"]:
        whole: list[Path] = []
        divided: dict[str, list[tuple[Span, TensorFolder]]] = {}
        for item in record["files"]:
            if group_of(item["name"]) != group:
                continue
            spans = spans_of(item.get("rows", {}))
            folder = TensorFolder([path / item["name"]])
            for name, span in spans.items():
                divided.setdefault(name, []).append((span, folder))
            if len(spans) < len(folder):
                whole.append(path / item["name"])
        found[group] = StoredTensors(TensorFolder(whole, without=set(divided)), divided)
    return found


def group_of(file_name: str) -> str:
    return file_name.split(".")[0].split("-")[0]


def check_checkpoint(path: Path, *, step: int | None = None, with_hashes: bool = True) -> list[Problem]:
    """Everything wrong with one checkpoint: missing, extra, truncated or changed files, rows that no file or two files
    hold, a wrong step. Empty: sound.

    `with_hashes=False` looks at names, sizes and headers only: a flipped bit then goes unseen.
    """
    try:
        record = read_json(path / "files.json")
        state = read_json(path / "state.json")
        listed = {str(item["name"]): (int(item["bytes"]), str(item["sha256"])) for item in record["files"]}
        spans = {str(item["name"]): spans_of(item.get("rows", {})) for item in record["files"]}
        steps = {int(record["step"]), int(state["step"])}
        groups = [str(group) for group in record["groups"]]
        number = int(record["format"])
    except UserError as problem:
        return [Problem(problem.where, problem.what)]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        return [Problem(str(path / "files.json"), f"not as zhibei writes it: {type(problem).__name__} {problem}")]
    if number > FILES_FORMAT:
        return [Problem(str(path / "files.json"), f"format {number}, of a newer zhibei; this one reads {FILES_FORMAT}")]
    problems = []
    if step is not None and steps != {step}:
        problems.append(Problem(str(path), f"holds step {sorted(steps)}, its name says {step}"))
    present = {item.name for item in path.iterdir()}
    problems += [
        Problem(str(path / name), "not in files.json, so not part of the checkpoint")
        for name in sorted(present - set(listed) - {"files.json"})
    ]
    held = {group_of(name) for name in listed}
    problems += [Problem(str(path), f"no file of group {group}") for group in groups if group not in held]
    problems += [Problem(str(path), what) for what in _missing_rows(spans)]
    for name, (num_bytes, sha256) in listed.items():
        problem = check_file(path / name, num_bytes=num_bytes, sha256=sha256 if with_hashes else None)
        if problem is None and spans[name]:
            problem = _other_rows(path / name, spans[name])
        if problem:
            problems.append(Problem(str(path / name), problem))
    return problems


def _missing_rows(spans: Mapping[str, Mapping[str, Span]]) -> list[str]:
    together: dict[tuple[str, str], list[Span]] = {}
    for file, of_file in spans.items():
        for name, span in of_file.items():
            together.setdefault((group_of(file), name), []).append(span)
    found = ((group, name, uncovered(parts)) for (group, name), parts in together.items())
    return [f"{group} {name}: {problem}" for group, name, problem in found if problem]


def _other_rows(path: Path, spans: Mapping[str, Span]) -> str | None:
    entries = read_header(path).entries
    for name, span in spans.items():
        if name not in entries or entries[name].shape[:1] != (span.stop - span.start,):
            return f"does not hold rows {span.start} to {span.stop} of {name}, as files.json says"
    return None


def check_file(path: Path, *, num_bytes: int, sha256: str | None) -> str | None:
    """What is wrong with one file, or None."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != num_bytes:
        return f"{'truncated to' if size < num_bytes else 'grown to'} {size:,} of {num_bytes:,} bytes"
    try:
        if path.suffix == ".safetensors" and read_header(path).file_bytes != num_bytes:
            return "its header promises another size"
        if sha256 is not None:
            drop_from_page_cache(path)
            found = sha256_of(path)
            if found != sha256:
                return f"hash differs: {found[:12]}… instead of {sha256[:12]}… (bits changed after writing)"
    except UserError as problem:
        return problem.what
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    return None
