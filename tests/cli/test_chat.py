"""`zhibei chat` as a user meets it: prompts, a pipe, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model_folder
from zhibei.cli import console
from zhibei.cli.app import run_command
from zhibei.cli.chat_commands import COMMANDS, SETTABLE
from zhibei.cli.chat_screen import Screen, visible
from zhibei.generate.sampler import Answer, Piece

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_model_folder(tmp_path)


@pytest.fixture
def endless(folder) -> Path:
    """A model whose answers do not end before a key can be pressed: room for thousands of tokens, and an end whose
    logit of 0 is never among the likeliest twenty."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][config["eos_token_id"]] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def pipe(folder, monkeypatch, capsys):
    """Run one session whose input is a pipe; exit code, stdout, stderr."""

    def run(lines: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = run_command(["chat", str(folder), "--template", "vicuna_v1.1", "--max-new-tokens", "8", *flags])
        return code, *capsys.readouterr()

    return run


def document(out: str) -> dict:
    return json.loads(out)


def test_prompts_are_answered_each_for_itself_as_one_document(pipe):
    code, out, _ = pipe("", "--prompt", "Hi", "--prompt", "Ho", "--prompt", "Hi", "--json", "--seed", "4")
    found = document(out)
    assert code == 0
    assert [turn["prompt"] for turn in found["turns"]] == ["Hi", "Ho", "Hi"]
    texts = [turn["answers"][0]["text"] for turn in found["turns"]]
    assert texts[0] == texts[2] != texts[1]
    assert found["template"] == "vicuna_v1.1"
    assert found["options"]["seed"] == 4
    answer = found["turns"][0]["answers"][0]
    assert answer["num_tokens"] == 8
    assert answer["tokens_per_s"] > 0
    assert answer["finish"] == "length"


def test_beams_need_no_temperature_and_refuse_another(pipe):
    code, out, _ = pipe("", "--prompt", "Hi", "--json", "--beams", "3")
    found = document(out)
    assert code == 0
    assert (found["options"]["beams"], found["options"]["temperature"]) == (3, 0)
    greedy = document(pipe("", "--prompt", "Hi", "--json", "--temperature", "0")[1])
    best, plain = (one["turns"][0]["answers"][0]["mean_logp"] for one in (found, greedy))
    assert best >= plain - 1e-6
    code, _, err = pipe("", "--prompt", "Hi", "--beams", "3", "--temperature", "0.5")
    assert code == 2
    assert "beams is 3 and temperature 0.5" in err
    _, out, err = pipe("/set beams 2\n", "--temperature", "0")
    assert "beams is 2 now" in err


def test_a_pipe_is_a_conversation_answers_on_stdout_remarks_on_stderr(pipe):
    code, out, err = pipe("Hi\nHo\n/tokens\n", "--json", "--temperature", "0")
    turns = document(out)["turns"]
    assert code == 0
    assert [turn["prompt"] for turn in turns] == ["Hi", "Ho"]
    assert "4 messages" in err
    code, out, err = pipe("Hi\nHo\n", "--temperature", "0")
    assert [line.strip() for line in out.splitlines()] == [turn["answers"][0]["text"].strip() for turn in turns]
    assert "tokens/s" in err
    assert "tokens/s" not in out


def test_a_backslash_joins_lines_into_one_message(pipe):
    _, out, _ = pipe("one \\\ntwo\n", "--json")
    assert [turn["prompt"] for turn in document(out)["turns"]] == ["one \ntwo"]


def test_regenerate_says_something_else_and_undo_forgets(pipe):
    _, out, err = pipe("Hi\n/regenerate\n/undo\n/tokens\n", "--json", "--temperature", "1.5")
    first, second = document(out)["turns"]
    assert first["prompt"] == second["prompt"] == "Hi"
    assert first["answers"][0]["text"] != second["answers"][0]["text"]
    assert "0 tokens of 256 in 0 messages" in err


def test_the_same_seed_gives_the_same_session(pipe):
    runs = [pipe("Hi\nHo\n", "--json", "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    texts = [[turn["answers"][0]["text"] for turn in document(out)["turns"]] for out in runs]
    assert texts[0] == texts[1] != texts[2]


def test_set_changes_the_answers_and_options_shows_it(pipe):
    _, out, err = pipe("/set temperature 0\n/set max-new-tokens 3\n/options\nHi\n", "--json")
    assert document(out)["turns"][0]["answers"][0]["num_tokens"] == 3
    assert re.search(r"max_new_tokens +3\n", err)


def test_a_system_prompt_reaches_the_model(pipe):
    texts = []
    for lines in ("Hi\n", "/system Talk like a pirate.\nHi\n", "/system Talk.\n/system -\nHi\n"):
        _, out, _ = pipe(lines, "--json", "--temperature", "0")
        texts.append(document(out)["turns"][0]["answers"][0]["text"])
    assert texts[0] == texts[2] != texts[1]
    _, out, _ = pipe("Hi\n", "--json", "--temperature", "0", "--system", "Talk like a pirate.")
    assert document(out)["turns"][0]["answers"][0]["text"] == texts[1]


def test_a_conversation_saved_and_loaded_goes_on_where_it_was(pipe, tmp_path):
    file = tmp_path / "talk.json"
    _, out, _ = pipe(f"Hi\n/save {file}\nHo\n", "--json", "--temperature", "0")
    _, again, _ = pipe(f"/load {file}\nHo\n", "--json", "--temperature", "0")
    assert document(again)["turns"][0]["answers"][0]["text"] == document(out)["turns"][1]["answers"][0]["text"]


def test_two_models_answer_and_each_remembers_its_own_words(pipe, tmp_path):
    other = tiny_model_folder(tmp_path, seed=5, name="other")
    _, out, _ = pipe("Hi\nHo\n", "--json", "--temperature", "0", "--compare", str(other))
    turns = document(out)["turns"]
    assert [answer["model"] for answer in turns[0]["answers"]][1] == str(other)
    _, alone, _ = pipe("Hi\nHo\n", "--json", "--temperature", "0")
    assert [turn["answers"][0]["text"] for turn in turns] == [
        turn["answers"][0]["text"] for turn in document(alone)["turns"]
    ]
    assert turns[0]["answers"][0]["text"] != turns[0]["answers"][1]["text"]
    _, out, _ = pipe("Hi\n/compare off\nHo\n", "--json", "--compare", str(other))
    assert [len(turn["answers"]) for turn in document(out)["turns"]] == [2, 1]


def test_what_no_longer_fits_is_said(pipe):
    lines = "\n".join(["A message of some length, to fill the context of this model."] * 6) + "\n"
    code, out, err = pipe(lines, "--json", "--temperature", "0")
    assert code == 0
    assert re.search(r"the oldest \d messages no longer fit into 256 tokens", err)
    assert "no longer fit" in document(out)["turns"][-1]["answers"][0]["notice"]


def test_control_tokens_in_a_message_are_pointed_out(pipe):
    _, _, err = pipe("Say </s> please\n")
    assert "the message spells </s>" in err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/rest\n", "did you mean /reset?"),
        ("/xyzzy\n", "/help explains them"),
        ("/undo\n", "nothing was said yet"),
        ("/regenerate\n", "nothing was said yet"),
        ("/save\n", "no file is named"),
        ("/set temprature 1\n", "did you mean temperature?"),
        ("/set temperature warm\n", "a number"),
        ("/set temperature -1\n", "a number from 0"),
        ("/set top_k 1.5\n", "a whole number"),
        ("/compare maybe\n", "/compare on or /compare off"),
        ("/reset now\n", "takes nothing"),
        ("word " * 400 + "\n", "message is too long"),
        ("broken \udcff byte\n", "not UTF-8"),
    ],
)
def test_what_goes_wrong_in_a_pipe_ends_it_with_code_2_and_a_remedy(pipe, lines, message):
    code, _, err = pipe(lines)
    assert code == 2
    assert message in err


def test_errors_are_json_when_asked_for(pipe):
    code, out, _ = pipe("/rest\n", "--json")
    assert code == 2
    assert "did you mean /reset?" in document(out)["error"]["fix"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "0", "--top-p", "0.5"], "--top-p has no effect"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--compare", "/no/such/model"], "/no/such/model"),
        (["--compare", "base"], "not known which base"),
    ],
)
def test_flags_that_cannot_work_are_explained(pipe, flags, message):
    code, _, err = pipe("Hi\n", *flags)
    assert code == 2
    assert message in err


def test_an_unknown_template_names_the_nearest_as_a_flag(folder, capsys):
    assert run_command(["chat", str(folder), "--template", "alpaka", "--prompt", "Hi"]) == 2
    assert "--template alpaca" in capsys.readouterr().err


def test_every_command_is_in_the_help_and_every_option_in_the_list(pipe):
    _, _, err = pipe("/help\n/options\n")
    assert all(name in err for name in [*COMMANDS, *SETTABLE])


def test_control_characters_are_spelled_out_and_words_are_not():
    assert visible("a\x1b[2Jb\x07\x9b\tc\n") == "a\\x1b[2Jb\\x07\\x9b\tc\n"
    assert visible("naïve 你好 👩‍👩‍👧 \u00a0 \u200f") == "naïve 你好 👩‍👩‍👧 \u00a0 \u200f"


def test_columns_show_every_character_of_a_long_word_in_the_end(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(
        console, "stdout", Console(file=file, width=120, height=12, force_terminal=True, soft_wrap=True)
    )
    answer = Answer([1], [0.0], [-1.0], "stop", 1)
    streams = [(name, lambda sign=sign: iter([Piece(sign * 1500), Piece("", answer)])) for name, sign in ("aQ", "bZ")]
    Screen(is_terminal=True, as_json=False).show(streams)
    whole = ANSI.sub("", file.getvalue()[file.getvalue().rindex("\u2501") :])
    assert (whole.count("Q"), whole.count("Z")) == (1500, 1500)


class Terminal:
    """A `zhibei` process that believes to sit in a terminal."""

    def __init__(self, arguments: list[str], *, columns: int) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zhibei", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            # COLUMNS (set for parallel test workers) would win over the size of this terminal.
            env={
                **{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")},
                "TERM": "xterm",
                "OMP_NUM_THREADS": "1",
            },
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Everything seen up to the pattern; what was seen is then forgotten."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._own], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; seen: {self.seen!r}"
            try:
                self.seen += ANSI.sub("", os.read(self._own, 65536).decode(errors="replace"))
            except OSError as error:  # the other end is closed
                raise AssertionError(f"{pattern!r} did not come before the end; seen: {self.seen!r}") from error
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self._own)
        return code


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminals of this kind are Unix")
def test_a_conversation_at_a_terminal(endless):
    terminal = Terminal(["chat", str(endless), "--template", "vicuna_v1.1", "--top-k", "20"], columns=90)
    terminal.wait_for(r"/help for help(.|\n)*you> ")
    terminal.type("/set max_new_tokens 5\n")
    terminal.wait_for(r"max_new_tokens is 5 now\s+you> ")
    terminal.type("Hello\n")
    assert "model> " in terminal.wait_for(r"5 tokens, [\d,]+ tokens/s, cut off\s+you> ")

    terminal.type("/nonsense\n")
    assert "there is no command /nonsense" in terminal.wait_for("you> ")

    terminal.type("/set max_new_tokens 3000\n")
    terminal.wait_for("you> ")
    terminal.type("Talk on and on\n")
    terminal.wait_for("model> .")
    terminal.type("\x03")
    terminal.wait_for(r"stopped\s+you> ")

    terminal.type("/tokens\n")
    assert "in 4 messages" in terminal.wait_for("you> ")
    # CPython misses a signal between showing the prompt and waiting for keys; no person is that quick.
    time.sleep(0.5)
    terminal.type("half a line\x03")
    terminal.wait_for(r"leaves\s+you> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminals of this kind are Unix")
def test_two_models_stand_side_by_side_in_a_wide_terminal(folder, tmp_path):
    other = tiny_model_folder(tmp_path, seed=5, name="o")
    arguments = ["chat", str(folder), "--template", "vicuna_v1.1", "--temperature", "0", "--max-new-tokens", "5"]
    terminal = Terminal([*arguments, "--compare", str(other)], columns=200)
    terminal.wait_for("you> ")
    terminal.type("Hello\n")
    seen = terminal.wait_for("5 tokens, [^\n]*5 tokens, [^\n]*\n(.|\n)*you> ")
    assert re.search(f"{re.escape(str(folder))} .*{re.escape(str(other))}", seen)
    terminal.type("/exit\n")
    assert terminal.end() == 0
