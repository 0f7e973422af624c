"""The command as a user meets it: help without heavy imports, and every error as a message with its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import zhibei
from zhibei.cli import app as app_module
from zhibei.cli.app import COMMANDS, run_command
from zhibei.config.errors import RunInterrupted, RunStopped, SeveralErrors, UserError

HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "peft",
    "huggingface_hub",
    "safetensors",
    "pydantic",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "zhibei", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", ["import zhibei", "import zhibei.cli.app", "HELP"])
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    if code == "HELP":
        code = "from zhibei.cli.app import run_command; assert run_command(['--help']) == 0"
    names = f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_the_check_of_heavy_imports_bites() -> None:
    code = f"import sys, zhibei.config.run; print([name for name in {HEAVY} if name in sys.modules])"
    assert "pydantic" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_lists_every_verb_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, (_, purpose) in COMMANDS.items():
        assert f"{name} {purpose}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_verb_exists_and_its_help_has_the_purpose_and_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, purpose = COMMANDS[name]
    module, _, attribute = target.partition(":")
    verb = getattr(import_module(module), attribute)
    docstring = verb.__doc__ if callable(verb) and not hasattr(verb, "help") else verb.help
    assert docstring.strip().splitlines()[0].rstrip(".").startswith(purpose.rstrip("."))
    assert run_command([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: zhibei {name}")
    assert f"zhibei {name} " in out.split("\n", 1)[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == zhibei.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["confg"], 'Did you mean "config"?'),
        (["config", "--jsno"], "--json"),
        (["train"], "RUN"),
        (["config", "--explain"], "--explain"),
    ],
)
def test_wrong_usage_exits_2_and_helps(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert "--help" in captured.err


def plant(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, result: object = None) -> None:
    """Give the command one verb, `fail`, that raises `error` or returns `result`."""

    def fail(*, json: bool = False) -> object:
        """Fail."""
        if error:
            raise error
        return result

    monkeypatch.setitem(sys.modules, "zhibei_planted", SimpleNamespace(fail=fail))
    monkeypatch.setattr(app_module, "COMMANDS", {"fail": ("zhibei_planted:fail", "Fail.")})


def fault(kind: type[UserError] = UserError) -> UserError:
    return kind("what [came]", expected="what was wanted", fix="what to do", where="a.json, record 3")


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RunStopped, 3), (RunInterrupted, 130)])
def test_user_errors_are_shown_whole_and_keep_their_exit_code(
    kind: type[UserError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, fault(kind))
    assert run_command(["fail"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == str(fault(kind)) + "\n"


def test_several_errors_are_all_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    both = SeveralErrors([fault(), fault(RunStopped)], what="2 faults")
    plant(monkeypatch, both)
    assert run_command(["fail"]) == 2
    assert capsys.readouterr().err == str(both) + "\n"


def test_user_errors_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, fault())
    assert run_command(["fail", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out) == {"error": {**fault().as_dict(), "exit_code": 2}}


@pytest.mark.parametrize("switch", ["", "--debug", "ZHIBEI_DEBUG"])
def test_our_faults_are_called_ours_and_leave_a_traceback_in_a_file(
    switch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("ZHIBEI_DEBUG", raising=False)
    if switch == "ZHIBEI_DEBUG":
        monkeypatch.setenv("ZHIBEI_DEBUG", "1")
    plant(monkeypatch, ZeroDivisionError("ours"))
    assert run_command(["fail"] + ([switch] if switch == "--debug" else [])) == 1
    captured = capsys.readouterr()
    assert "This is our fault, not yours: ZeroDivisionError: ours" in captured.err
    assert ("Traceback" in captured.err) == bool(switch)
    (file,) = tmp_path.glob("zhibei-error-*.txt")
    assert file.name in captured.err
    assert "ZeroDivisionError: ours" in file.read_text()


def test_our_faults_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plant(monkeypatch, ZeroDivisionError("ours"))
    assert run_command(["fail", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 1


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, KeyboardInterrupt())
    assert run_command(["fail"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (2, 2), (True, 0), ("text", 0)])
def test_a_verb_returns_its_exit_code_or_nothing(result: object, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, None, result)
    assert run_command(["fail"]) == code


def test_the_process_leaves_with_the_code_and_no_traceback(tmp_path: Path) -> None:
    done = run("config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_terminal_without_unicode_still_gets_the_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zhibei", "config", str(tmp_path / "指北.yaml")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert r"\u6307\u5317.yaml: no such file" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m zhibei config --schema | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_whose_reader_has_gone_still_gives_its_exit_code():
    process = subprocess.Popen(
        [sys.executable, "-m", "zhibei", "train", "no-such-file.yaml", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == 2


@pytest.mark.parametrize(("words", "code"), [(["pitfalls"], 0), (["plan", "absent.yaml"], 2)])
def test_a_reader_that_goes_away_changes_no_exit_code(words: list[str], code: int) -> None:
    """As in `zhibei pitfalls | head -1`, with a reader that has gone before the first word."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "zhibei", *words], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False)
