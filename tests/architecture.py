"""The shape of the package as rules over its syntax trees. Knows no run-time behaviour.

`broken_rules(root)` reads every Python file below `root` (the package folder) and yields one sentence per breach.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Lowest layer first. A folder may import folders of earlier lines; folders of one line do not know each other.
LAYERS = (
    ("config",),
    ("text", "store"),
    ("data", "model", "losses", "plan"),
    ("generate",),
    ("train", "export", "evaluate", "serve", "report"),
    ("doctor",),
    ("launch",),
    ("cli", "pipeline", "migrate"),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}

# What each folder may import from other people: at the top of a file, and only inside the function that needs it.
THIRD_PARTY: dict[str, tuple[set[str], set[str]]] = {
    "config": ({"pydantic", "yaml"}, set()),
    "text": ({"numpy", "tokenizers"}, {"transformers", "jinja2"}),
    "store": ({"torch", "numpy", "safetensors"}, {"tensorboard", "wandb"}),
    "data": ({"numpy", "torch"}, {"pyarrow", "huggingface_hub"}),
    "model": ({"torch", "transformers"}, {"peft", "bitsandbytes"}),
    "losses": ({"torch"}, set()),
    "plan": (set(), set()),
    "doctor": ({"numpy"}, {"torch", "transformers", "peft", "bitsandbytes", "sentencepiece", "safetensors"}),
    # xllamacpp is llama.cpp in this process; its logits come as arrays of numpy.
    "generate": ({"torch", "numpy"}, {"transformers", "vllm", "xllamacpp"}),
    # Answers become rows, and rows are arrays of numpy.
    "train": ({"torch", "numpy"}, {"bitsandbytes"}),
    "evaluate": ({"numpy", "torch"}, set()),
    # xllamacpp is llama.cpp in this process; uvicorn and llguidance are there where the extra `serve` is installed.
    "serve": ({"torch"}, {"uvicorn", "xllamacpp", "numpy", "llguidance", "vllm"}),
    "export": ({"numpy", "torch", "safetensors"}, {"gguf", "xllamacpp", "transformers", "peft", "sentencepiece"}),
    "report": (set(), set()),
    # torch keeps the ranks of a node; it is loaded once a launch is under way.
    "launch": (set(), {"torch"}),
    "pipeline": ({"numpy"}, {"torch", "transformers", "tokenizers"}),
    "cli": ({"cyclopts", "rich"}, {"numpy", "pydantic"}),
    "": ({"cyclopts"}, set()),
}

VAGUE_NAMES = {"util", "utils", "common", "misc", "helper", "helpers", "base", "core", "manager", "extras", "tools"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_LOOP_LINES, MOST_ARGUMENTS = 400, 80, 120, 6

# Training loops are read top to bottom; they may be longer than other functions.
LOOPS = {("train/offline.py", "loop")}

_KERNEL = "a GPU kernel: its arguments are addresses and sizes, and Triton takes no records"
_NUMBERS = "a rank answers some of the prompts, and what is drawn for one depends on its number among all of them"

# Breaches that were decided, with the reason: {sentence: reason}. Empty is best.
ALLOWED: dict[str, str] = {
    "generate/kernels.py: generate must not import triton": "kernels are written in Triton; the file is imported late, "
    "where there is a GPU (generate/decoding.py)",
    "generate/kernels.py: _few_rows takes 25 arguments, more than 6": _KERNEL,
    "generate/kernels.py: _rotated takes 8 arguments, more than 6": _KERNEL,
    "generate/kernels.py: _attend takes 22 arguments, more than 6": _KERNEL,
    "generate/rollouts.py: write_answers takes 7 arguments, more than 6": _NUMBERS,
    "generate/sampler.py: generate takes 7 arguments, more than 6": _NUMBERS,
    "generate/vllm_engine.py: __call__ takes 7 arguments, more than 6": _NUMBERS,
}


@dataclass(frozen=True)
class SourceFile:
    """One parsed file; `place` is its path inside the package, `folder` the first part of it."""

    place: str
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.place.split("/")[0] if "/" in self.place else ""


def broken_rules(root: Path) -> Iterator[str]:
    """Every breach below `root`, as `folder/file.py: what`."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        source = SourceFile(path.relative_to(root).as_posix(), text, ast.parse(text))
        for rule in (_layer_breaches, _library_breaches, _wording_breaches, _size_breaches):
            for breach in rule(source, root.name):
                yield f"{source.place}: {breach}"


def imports_of(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(dotted name, is it inside a function?). `from a import b` gives a.b; relative imports begin with a dot.

    Imports that only the type checker sees count as late: they cost nothing at run time but still show who knows whom.
    """
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, is_late = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + f"{node.module or ''}.{alias.name}", is_late) for alias in node.names)
        is_late = is_late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_for_types(node)
        pending.extend((child, is_late) for child in ast.iter_child_nodes(node))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _layer_breaches(source: SourceFile, package: str) -> Iterator[str]:
    if source.folder and source.folder not in LEVEL:
        yield f"folder {source.folder} has no layer"
    for name, _ in imports_of(source.tree):
        if name.startswith("."):
            yield f"relative import {name}"
        parts = name.split(".")
        other = parts[1] if parts[0] == package and len(parts) > 1 else ""
        if other in LEVEL and source.folder in LEVEL and other != source.folder:
            if LEVEL[other] > LEVEL[source.folder]:
                yield f"{source.folder} must not import {other}, which is above it"
            if LEVEL[other] == LEVEL[source.folder] and (source.folder, other) not in SIBLINGS_THAT_MEET:
                yield f"{source.folder} must not import {other}, which stands beside it"


# The command line starts pipelines: both are what the user types, and one has to call the other.
SIBLINGS_THAT_MEET = {("cli", "pipeline"), ("cli", "migrate")}


def _library_breaches(source: SourceFile, package: str) -> Iterator[str]:
    at_once, late = THIRD_PARTY.get(source.folder, (set(), set()))
    for name, is_late in imports_of(source.tree):
        top = name.split(".")[0]
        if not top or top == package or top in sys.stdlib_module_names or top in at_once:
            continue
        if top not in late:
            yield f"{source.folder or 'the top level'} must not import {top}"
        elif not is_late:
            yield f"{top} is imported at the top; import it inside the function that needs it"


def _wording_breaches(source: SourceFile, package: str) -> Iterator[str]:
    if not ast.get_docstring(source.tree):
        yield "no module docstring"
    for part in source.place.removesuffix(".py").split("/"):
        if VAGUE_NAMES & set(part.split("_")):
            yield f"{part} is a vague name"
    for line in source.text.splitlines():
        if "TODO" in line or "FIXME" in line:
            yield f"unfinished: {line.strip()}"


def _size_breaches(source: SourceFile, package: str) -> Iterator[str]:
    num_lines = source.text.count("\n")
    if num_lines > MOST_LINES:
        yield f"{num_lines} lines, more than {MOST_LINES}"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _function_breaches(source.place, node)


def _function_breaches(place: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    body_start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
    length = (node.end_lineno or node.lineno) - body_start + 1
    most = MOST_LOOP_LINES if (place, node.name) in LOOPS else MOST_FUNCTION_LINES
    if length > most:
        yield f"{node.name} has {length} lines, more than {most}"
    positional = [*node.args.posonlyargs, *node.args.args]
    is_method = bool(positional) and positional[0].arg in ("self", "cls")
    num_arguments = len(positional) + len(node.args.kwonlyargs) - is_method
    is_verb = place.startswith("cli/") and not node.name.startswith("_")  # its arguments are the options a user types
    if num_arguments > MOST_ARGUMENTS and not is_verb:
        yield f"{node.name} takes {num_arguments} arguments, more than {MOST_ARGUMENTS}"
