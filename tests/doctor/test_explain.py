"""Logs in, the pitfall behind them out: in the words of many programs, in any encoding, and silent where nothing is."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.explain import rates
from tests.doctor.failed_logs import ELASTIC, LAUNCH, LOGS, NOISE, TRACE
from tests.doctor.failed_logs_more import LOGS as MORE
from tests.doctor.messages_of_others import MESSAGES
from tests.doctor.sound_logs import SOUND, UNKNOWN
from zhibei.cli.app import run_command
from zhibei.doctor.error_patterns import PatternIndex, required_literals
from zhibei.doctor.explain import explain_stream
from zhibei.doctor.log_figures import MEANINGS
from zhibei.doctor.log_lines import read_pieces
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.verdict import CONSEQUENCES, HARMLESS, HINTS, RELATED, Explanation

CATALOGUE = load_catalogue()
ALL = LOGS | MORE
OOM = "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB\n"


def explained(log: str | bytes) -> Explanation:
    data = log.encode() if isinstance(log, str) else log
    return explain_stream(io.BytesIO(data), "log", CATALOGUE)


def named(log: str | bytes) -> str:
    explanation = explained(log)
    return explanation.cause.pitfall.id if explanation.cause else explanation.verdict


def surrounded(program: str, lines: str, after: str = "") -> str:
    return "\n".join([*NOISE[program] * 3, lines.rstrip("\n"), *([after] if after else []), ""])


@pytest.mark.parametrize("name", ALL)
def test_the_cause_is_named_in_the_noise_of_its_program(name: str) -> None:
    accepted, program, lines = ALL[name]
    log = surrounded(program, lines)
    explanation = explained(log)
    assert explanation.cause is not None, explanation.verdict
    assert explanation.cause.pitfall.id in accepted
    evidence = explanation.cause.evidence[0]
    shown = " ".join(log.split("\n")[evidence.line - 1].split())
    assert evidence.text[:40] in shown, "the line number is that of the line"


@pytest.mark.parametrize("name", ALL)
def test_what_follows_an_error_does_not_hide_it(name: str) -> None:
    accepted, program, lines = ALL[name]
    assert named(surrounded(program, lines, after=LAUNCH + ELASTIC)) in accepted


@pytest.mark.parametrize(("message", "accepted"), MESSAGES)
def test_a_message_alone_is_enough(message: str, accepted: tuple[str, ...]) -> None:
    assert named(message) in accepted


def test_the_words_in_which_people_reported_known_pits_are_recognised(shared: Callable[..., Path]) -> None:
    lines = shared("pitfalls.jsonl").read_text("utf-8").splitlines()
    found = rates([json.loads(line) for line in lines], CATALOGUE)
    assert found["all"]["wrong"] <= 0.02
    assert found["with_message"]["wrong"] <= 0.03
    assert found["with_message"]["found"] >= 0.8


@pytest.mark.parametrize("name", SOUND)
def test_sound_logs_name_nothing(name: str) -> None:
    explanation = explained(SOUND[name])
    found = explanation.cause.pitfall.id if explanation.cause else explanation.verdict
    assert found == "nothing", explanation.cause or explanation.unknown


def test_harmless_messages_are_said_to_be_harmless() -> None:
    for name in ("transformers", "rotary buffers of an old checkpoint"):
        assert explained(SOUND[name]).harmless


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_errors_are_said_to_be_unknown(name: str) -> None:
    log, word = UNKNOWN[name]
    explanation = explained("loading\n" * 50 + log)
    assert explanation.verdict == "unknown"
    assert word in explanation.unknown[0].text
    assert explanation.unknown[0].line > 50


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda log: log.replace("\n", "\r\n").encode(),
        lambda log: log.encode("utf-16"),
        lambda log: log.encode("utf-16-le"),
        lambda log: b"\xef\xbb\xbf" + log.encode(),
        lambda log: log.rstrip("\n").encode(),
        lambda log: b"\xff\xfe\x00\x80\n".join([b"\x9c\xff", b"", log.encode()]),
        lambda log: log.replace("RuntimeError", "\x1b[1;31mRuntimeError\x1b[0m").encode(),
        lambda log: ("  5%|5 | 1/20\r 10%|# | 2/20\r" * 50 + log).encode(),
        lambda log: log.replace("RuntimeError", "[rank7]: RuntimeError").encode(),
        lambda log: log.replace("RuntimeError", "(RayWorker pid=811, ip=10.0.0.3) RuntimeError").encode(),
        lambda log: log.replace("RuntimeError", "[1,5]<stderr>:RuntimeError").encode(),
        lambda log: log.replace("RuntimeError", "x" * 3_000_000 + "\nRuntimeError").encode(),
        lambda log: log.replace("CUDA out", "│ CUDA out").encode(),
    ],
)
def test_the_form_of_a_log_does_not_matter(spoiled: Callable[[str], bytes]) -> None:
    assert named(spoiled("starting\n" + TRACE + OOM)) == "gpu-memory-too-small"


def test_lines_are_numbered_as_editors_do() -> None:
    log = "a\r\nb\r\n" + " 1%|\r 2%|\r 3%|\n" * 4 + OOM
    explanation = explained(log)
    assert explanation.cause is not None
    assert explanation.cause.evidence[0].line == 7


def test_a_million_lines_of_figures_hide_nothing() -> None:
    figures = "".join(f"{{'loss': {1 + step % 97 / 100}, 'grad_norm': 0.{step}}}\n" for step in range(40_000))
    explanation = explained(figures + OOM + figures)
    assert explanation.cause is not None
    assert (explanation.cause.pitfall.id, explanation.cause.evidence[0].line) == ("gpu-memory-too-small", 40_001)
    assert explanation.num_lines == 80_001


def test_an_exit_code_among_many_of_the_same_shape_is_read() -> None:
    lines = "".join(f"worker {n} exited with exit code 0\n" for n in range(500))
    assert named(lines + "[ERROR] ['python', 'train.py'] exits with return code = -9\n") != "nothing"


def test_pieces_lose_no_line_and_repeat_none() -> None:
    log = "".join(f"line {n} of words {n * 7919 % 1013}\n" for n in range(150_000)).encode()
    seen = [
        (number, line)
        for piece in read_pieces(io.BytesIO(log), "log")
        for number, line in list(zip(piece.numbers, piece.lines, strict=True))[piece.start : piece.stop]
    ]
    assert [line for _, line in seen] == log.rstrip(b"\n").split(b"\n")
    assert [number for number, _ in seen] == list(range(1, 150_001))


def test_the_first_of_two_errors_is_the_cause() -> None:
    full = TRACE + "OSError: [Errno 28] No space left on device\n"
    first, second = named(full + OOM), named(OOM + full)
    assert first in ("no-space-left", "disk-full-at-checkpoint")
    assert second == "gpu-memory-too-small"


def test_what_zhibei_said_itself_is_repeated() -> None:
    explanation = explained("run.yaml:3: data.limit is 0\n  expected: a whole number\n  to do:    remove it\n")
    assert explanation.verdict == "own"
    assert (explanation.own[0].fix, explanation.own[0].line) == ("remove it", 1)


def test_findings_of_a_check_in_a_log_are_named() -> None:
    finding = (
        "STOP     bf16-on-pre-ampere  precision, costs a launch\n  model.precision: bf16\n  more:   zhibei pitfalls"
    )
    assert named(f"{finding} bf16-on-pre-ampere\n1 finding stops the run\n") == "bf16-on-pre-ampere"
    assert named('{"error": {"what": "x", "pitfall": "bf16-on-pre-ampere"}}') == "bf16-on-pre-ampere"
    assert named("see  zhibei pitfalls no-such-name\n") == "nothing"


def test_a_description_is_answered_with_pages_that_sound_like_it() -> None:
    explanation = explained("The saved adapter after LoRA training has lora_B tensors that are all zero\n")
    assert explanation.verdict == "nothing"
    assert any("lora" in one.id for one, _ in explanation.resembling)
    assert not explained("the weather is nice\n").resembling


def test_every_pitfall_that_the_rules_name_exists() -> None:
    for names in (CONSEQUENCES, HARMLESS, HINTS, RELATED.keys()):
        assert names - CATALOGUE.keys() == set()
    assert {name for pitfalls, _, _ in MEANINGS.values() for name in pitfalls} - CATALOGUE.keys() == set()


def test_every_pattern_has_a_literal_so_that_large_logs_stay_fast() -> None:
    index = PatternIndex({one.id: one.errors for one in CATALOGUE.values()})
    assert [(one.owner, one.regex.pattern) for one in index.everywhere] == []


def test_no_pattern_matches_nothing_or_anything() -> None:
    for pitfall in CATALOGUE.values():
        for pattern in pitfall.errors:
            assert not pattern.search(""), (pitfall.id, pattern.pattern)
            assert not pattern.search("INFO step 17 of 100, all is well"), (pitfall.id, pattern.pattern)


@pytest.mark.parametrize(
    ("source", "literals"),
    [
        (r"CUDA (?:error|exception): out of memory", (": out of memory",)),
        (r"return code = -9|exitcode\s*: -9", ("return code = -9", "exitcode")),
        (r"setup doesn't support bf16", ("t support bf16",)),
        (r"\d+ [a-z]+", ()),
    ],
)
def test_literals_are_what_any_match_contains(source: str, literals: tuple[str, ...]) -> None:
    assert required_literals(source) == literals


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 40))
def test_random_bytes_never_crash_it(noise: bytes, copies: int) -> None:
    explained(noise * copies)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_text_around_an_error_does_not_hide_it(before: str, after: str) -> None:
    explanation = explained(f"{before}\n{OOM}{after}")
    ids = [one.pitfall.id for one in (explanation.cause, *explanation.others) if one]
    assert "gpu-memory-too-small" in ids


def test_the_command_reads_files_pipes_and_gzip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = tmp_path / "a.log", tmp_path / "b.log.gz"
    plain.write_text(TRACE + OOM)
    packed.write_bytes(gzip.compress((TRACE + "KeyError: 'blorp'\n").encode()))
    assert run_command(["explain", str(packed), str(plain), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["pitfall"]) == ("known", "gpu-memory-too-small")
    assert [one["verdict"] for one in document["logs"]] == ["unknown", "known"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(OOM.encode())))
    assert run_command(["explain", "-", "--lang", "zh"]) == 0
    assert "显存" in capsys.readouterr().out


def test_what_cannot_be_read_is_said_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "missing.log"):
        assert run_command(["explain", str(path)]) == 2
        assert "to do:" in capsys.readouterr().err
    assert run_command(["explain"]) == 2
    torn = tmp_path / "torn.gz"
    torn.write_bytes(gzip.compress(b"words " * 9999)[:60])
    assert run_command(["explain", str(torn)]) == 2
    empty = tmp_path / "empty.log"
    empty.touch()
    assert run_command(["explain", str(empty)]) == 0
    assert "nothing known found" in capsys.readouterr().out
