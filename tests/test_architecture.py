"""The package keeps the rules of `tests/architecture.py`, and those rules bite."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import zhibei
from tests.architecture import ALLOWED, LAYERS, broken_rules
from zhibei.config.run import Source
from zhibei.config.words import leaf_fields

PACKAGE = Path(zhibei.__file__).parent
HEALTHY = '"""What it is."""\n'


def test_the_package_keeps_every_rule() -> None:
    assert [breach for breach in broken_rules(PACKAGE) if breach not in ALLOWED] == []


def test_each_allowed_breach_still_exists_and_has_a_reason() -> None:
    breaches = list(broken_rules(PACKAGE))
    assert all(breach in breaches and len(reason) > 20 for breach, reason in ALLOWED.items())


def test_every_layer_of_the_picture_is_in_the_package_docstring() -> None:
    picture = zhibei.__doc__ or ""
    there = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    for folders in LAYERS:
        assert all(folder in picture for folder in folders if folder in there)


def unread_fields(names: list[str], package: Path) -> list[str]:
    """Fields of the run file whose last name no file outside of config ever reads as an attribute."""
    read: set[str] = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] != "config":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return [name for name in names if name.rpartition(".")[2] not in read]


def test_every_field_of_the_run_file_is_read_by_someone() -> None:
    names = [name for name, _ in leaf_fields()] + [f"data.sources[].{name}" for name in Source.model_fields]
    assert unread_fields(names, PACKAGE) == []
    assert unread_fields(["sft.forgotten"], PACKAGE) == ["sft.forgotten"]


def plant(tmp_path: Path, files: dict[str, str]) -> list[str]:
    root = tmp_path / "planted"
    for place, text in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    return list(broken_rules(root))


def test_a_healthy_package_has_no_breach(tmp_path: Path) -> None:
    files = {
        "__init__.py": HEALTHY,
        "config/run.py": f"{HEALTHY}import pydantic\nimport json\n",
        "train/sft.py": f"{HEALTHY}import torch\nfrom planted.data.rows import x\nfrom planted.config import run\n",
        "data/rows.py": f"{HEALTHY}def read():\n    import pyarrow\n    return pyarrow\n",
        "cli/train.py": f"{HEALTHY}def train(*, a, b, c, d, e, f, g): ...\n",
    }
    assert plant(tmp_path, files) == []


@pytest.mark.parametrize(
    ("place", "text", "breach"),
    [
        ("train/sft.py", "from planted.doctor import watch\n", "train must not import doctor, which is above it"),
        ("train/sft.py", "from planted import doctor\n", "train must not import doctor, which is above it"),
        ("train/sft.py", "def f():\n    import planted.cli.app\n", "train must not import cli, which is above it"),
        (
            "train/sft.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted.cli import app\n",
            "train must not import cli, which is above it",
        ),
        ("serve/chat.py", "from planted.train.sft import go\n", "serve must not import train, which stands beside it"),
        ("text/a.py", "import planted.store.files\n", "text must not import store, which stands beside it"),
        ("data/a.py", "from .rows import x\n", "relative import .rows.x"),
        ("data/a.py", "from . import x\n", "relative import ..x"),
        ("losses/a.py", "import numpy\n", "losses must not import numpy"),
        ("config/a.py", "import torch.nn\n", "config must not import torch"),
        (
            "data/a.py",
            "import pyarrow\n",
            "pyarrow is imported at the top; import it inside the function that needs it",
        ),
        ("helpers/a.py", "", "folder helpers has no layer"),
        ("data/row_utils.py", "", "row_utils is a vague name"),
        ("data/a.py", "# TODO later\n", "unfinished: # TODO later"),
        ("data/a.py", "x = 1\n" * 400, "401 lines, more than 400"),
        ("data/a.py", "def f():\n" + "    x = 1\n" * 81, "f has 81 lines, more than 80"),
        ("data/a.py", "def f(a, b, c, d, *, e, f, g): ...\n", "f takes 7 arguments, more than 6"),
        ("data/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g): ...\n", "f takes 7 arguments, more than 6"),
    ],
)
def test_each_rule_bites(place: str, text: str, breach: str, tmp_path: Path) -> None:
    assert f"{place}: {breach}" in plant(tmp_path, {place: HEALTHY + text})


def test_a_missing_docstring_is_found(tmp_path: Path) -> None:
    assert plant(tmp_path, {"data/a.py": "x = 1\n"}) == ["data/a.py: no module docstring"]
