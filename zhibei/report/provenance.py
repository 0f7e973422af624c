"""What was asked for, where it ran, what it left and what to do next. Knows files of a run directory, not training."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zhibei.report.html import Markup, Section, both, escape, figure, join, missing, nested, note, size_of, table, tag
from zhibei.report.inputs import RunInputs

MOST_FILES = 60
RESULTS = {
    "passed": ("passed", "通过", "good-text"),
    "failed": ("failed", "未通过", "bad-text"),
    "not run": ("not run", "未执行", "quiet"),
}


def run_file(inputs: RunInputs) -> Section:
    """resolved.yaml: every value that held, with its origin as the comment behind it."""
    if not inputs.resolved.strip():
        text = "resolved.yaml is missing or empty.", "resolved.yaml 缺失或为空。"
        return Section("Effective run file", "实际生效的运行文件", missing(*text))
    lines = join(origin_line(line) + Markup("\n") for line in inputs.resolved.splitlines())
    explained = note("Each comment says where its value came from.", "每行注释说明该值的来源。")
    summary = tag("summary", both("show resolved.yaml", "展开 resolved.yaml"))
    body = explained + tag("details", summary + tag("pre", lines, class_="code"), open="")
    return Section("Effective run file", "实际生效的运行文件", body)


def origin_line(line: str) -> Markup:
    """A YAML line with its comment set back: what follows a `#` after two spaces or at the start of the line."""
    found = re.match(r"^(.*?)(\s{2,}#[^'\"]*|^\s*#.*)$", line)
    if found is None:
        return escape(line)
    is_plain = not found[1] or found[2].strip() == "# default"
    return escape(found[1]) + tag("span", found[2], class_="origin" if is_plain else "origin chosen")


def manifest(inputs: RunInputs) -> Section:
    """Versions, hashes, machine: what is needed to repeat the run."""
    if not inputs.manifest:
        reason = inputs.problems.get("manifest.json", "empty")
        text = f"manifest.json: {reason}.", f"manifest.json：{'缺失' if reason == 'missing' else reason}。"
        return Section("Environment and manifest", "环境与清单", missing(*text))
    return Section("Environment and manifest", "环境与清单", tag("div", nested(inputs.manifest), class_="wide"))


def proofs(inputs: RunInputs) -> Section:
    """What was reloaded and compared after it was written."""
    if not inputs.proofs:
        text = "No proofs yet: proofs.json is written at the end of a run, after the model was reloaded."
        return Section("Proofs", "验证", missing(text, "尚无验证：proofs.json 在运行结束、模型重新加载之后写出。"))
    rows = []
    for proof in inputs.proofs:
        passed = proof.get("passed")
        english, chinese, style = RESULTS["passed" if passed is True else "failed" if passed is False else "not run"]
        others = {key: value for key, value in proof.items() if key not in ("name", "passed", "detail", "value")}
        detail = tag("div", proof.get("detail") or "", class_="text") + (nested(others) if others else Markup(""))
        value = proof.get("value")
        shown = nested(value) if isinstance(value, (dict, list)) else figure(value) if value is not None else ""
        rows.append([proof.get("name", "?"), tag("b", both(english, chinese), class_=style), shown, detail])
    head = [both("proof", "验证项"), both("result", "结果"), both("value", "数值"), both("detail", "说明")]
    return Section("Proofs", "验证", table(head, rows, numeric=[2]))


def files(inputs: RunInputs) -> Section:
    """Every file of the run directory with its size; folders of checkpoints are listed as one line each."""
    folder = inputs.run_dir.path
    if not folder.is_dir():
        return Section("Files", "文件", missing("The run directory is missing.", "运行目录不存在。"))
    sizes: dict[str, tuple[int, int]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path != inputs.run_dir.report:
            name = file_group(path.relative_to(folder))
            num_files, num_bytes = sizes.get(name, (0, 0))
            sizes[name] = (num_files + 1, num_bytes + size_on_disk(path))
    if not sizes:
        return Section("Files", "文件", missing("The run directory is empty.", "运行目录为空。"))
    shown = sorted(sizes.items())[:MOST_FILES]
    rows = [[tag("span", name, class_="code text"), f"{count:,}", size_of(size)] for name, (count, size) in shown]
    count, size = (sum(column) for column in zip(*sizes.values(), strict=True))
    rows.append([tag("b", both("all", "合计")), tag("b", f"{count:,}"), tag("b", size_of(size))])
    body = note(f"In {folder.resolve()}", f"位于 {folder.resolve()}")
    body += table([both("path", "路径"), both("files", "文件数"), both("size", "大小")], rows, numeric=[1, 2])
    if len(sizes) > MOST_FILES:
        rest = len(sizes) - MOST_FILES
        body += note(f"and {rest:,} more paths, counted above", f"另有 {rest:,} 个路径，已计入合计")
    return Section("Files", "文件", body)


def file_group(relative: Path) -> str:
    """The line a file is listed under: model/ by file, checkpoints by step, other folders as one."""
    parts = relative.parts
    if len(parts) == 1 or parts[0] == "model":
        return str(relative)
    return "/".join(parts[:2] if parts[0] == "checkpoints" and len(parts) > 2 else parts[:1]) + "/"


def size_on_disk(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed while we looked, e.g. an old checkpoint of a run that is still going
        return 0


def commands(inputs: RunInputs) -> Section:
    """What to type next."""
    run_dir = shlex.quote(str(inputs.run_dir.path))
    chat = (f"zhibei chat {run_dir}", "talk to the model", "与模型对话")
    resume = (f"zhibei resume {run_dir}", "go on from the newest sound checkpoint", "从最新的完好检查点继续")
    lines = [
        chat if inputs.run_dir.model.is_dir() else resume,
        (f"zhibei verify {run_dir}", "prove again that the files are whole", "再次验证文件完整"),
        (f"zhibei report {run_dir}", "rebuild this page", "重新生成本页"),
    ]
    if inputs.run_dir.model.is_dir():
        is_adapter = (inputs.run_dir.model / "adapter_config.json").is_file()
        merge = (f"zhibei merge {run_dir}", "one whole model of base and adapter", "把基座与适配器合并为完整模型")
        gguf = (f"zhibei export {run_dir} --to gguf", "for llama.cpp and Ollama", "用于 llama.cpp 与 Ollama")
        lines[1:1] = [*([merge] if is_adapter else []), gguf]
    width = max(len(command) for command, _, _ in lines) + 2
    shown = join(
        Markup(escape(command.ljust(width))) + tag("span", both(f"# {english}", f"# {chinese}"), class_="origin") + "\n"
        for command, english, chinese in lines
    )
    return Section("What next", "下一步", tag("pre", shown, class_="code commands"))


PROVENANCE_SECTIONS: dict[str, Callable[[Any], Section]] = {
    "run_file": run_file,
    "manifest": manifest,
    "proofs": proofs,
    "files": files,
    "commands": commands,
}
