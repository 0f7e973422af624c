"""Talking to a GGUF file: the same answers as the folder it was made from, the same manners as every speaker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.export.gguf.export import export_gguf
from zhibei.export.gguf.source import open_source
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import open_base, open_speaker
from zhibei.serve.gguf_speaker import GgufSpeaker, open_gguf
from zhibei.text.messages import Message

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ASKED = [Message("user", "Add the numbers.")]
GREEDY = SamplingOptions(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    source = open_source(str(folder), template="alpaca")
    (made,) = export_gguf(source, folder.parent / "model.gguf", types=["F32"])
    return made.paths[0]


@pytest.fixture
def speaker(file: Path) -> Iterator[GgufSpeaker]:
    opened = open_speaker(str(file))
    yield opened
    opened.close()


def test_greedy_answers_are_those_of_the_folder(folder: Path, speaker: GgufSpeaker) -> None:
    other = open_speaker(str(folder), template="alpaca", device="cpu")
    prompt = speaker.prompt(ASKED, GREEDY)
    assert prompt.tokens == other.prompt(ASKED, GREEDY).tokens
    (mine,), (theirs,) = speaker.answer([prompt], GREEDY), other.answer([prompt], GREEDY)
    assert (mine.tokens, mine.text, mine.finish) == (theirs.tokens, theirs.text, theirs.finish)
    assert mine.model_logps == pytest.approx(theirs.model_logps, abs=0.02)


def test_a_stream_is_the_answer_in_pieces_and_a_seed_repeats_it(speaker: GgufSpeaker) -> None:
    options = SamplingOptions(max_new_tokens=30, temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=4)
    prompt = speaker.prompt(ASKED, options)
    pieces = list(speaker.stream(prompt, options))
    (answer,) = speaker.answer([prompt], options)
    last = pieces[-1].answer
    # Logits of a prompt that is read again in one piece differ in the last digits.
    assert last is not None
    assert (last.tokens, last.text, last.finish) == (answer.tokens, answer.text, answer.finish)
    assert "".join(piece.text for piece in pieces) == answer.text
    other = SamplingOptions(max_new_tokens=30, temperature=1.5, seed=5)
    assert speaker.answer([prompt], other)[0].tokens != answer.tokens


def test_what_was_said_before_is_not_read_again(speaker: GgufSpeaker, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = speaker.prompt(ASKED, GREEDY)
    (first,) = speaker.answer([prompt], GREEDY)
    assert speaker._context is not None
    read: list[int] = []
    feed = type(speaker._context).feed
    monkeypatch.setattr(
        type(speaker._context), "feed", lambda self, tokens: (read.append(len(tokens)), feed(self, tokens))[1]
    )
    (again,) = speaker.answer([prompt], GREEDY)
    assert again.tokens == first.tokens
    assert read[0] == 1


def test_a_stream_that_is_left_does_no_harm(speaker: GgufSpeaker) -> None:
    prompt = speaker.prompt(ASKED, GREEDY)
    (whole,) = speaker.answer([prompt], GREEDY)
    stream = speaker.stream(prompt, GREEDY)
    next(stream)
    del stream
    assert speaker.answer([prompt], GREEDY)[0].tokens == whole.tokens


def test_a_long_history_loses_its_oldest_turns_visibly(speaker: GgufSpeaker) -> None:
    turn = [Message("user", "the cat and the dog " * 4), Message("assistant", "in the water " * 4)]
    prompt = speaker.prompt([*turn * 6, *ASKED], GREEDY)
    assert prompt.num_dropped
    assert "no longer fit" in prompt.notice
    with pytest.raises(UserError, match="too long"):
        speaker.prompt([Message("user", "cat " * 500)], GREEDY)


def test_the_template_of_the_file_ends_an_answer(speaker: GgufSpeaker) -> None:
    assert speaker.template.name == "alpaca"
    assert speaker.template.stop_strings == ("### Instruction:",)
    assert 2 in speaker.stop_ids


def test_another_template_is_used_when_asked_for_and_said(file: Path) -> None:
    opened = open_gguf(str(file), template="vicuna_v1.1")
    assert opened.template.name == "vicuna_v1.1"
    assert "template of its own" in opened.notes[0]
    opened.close()


def test_what_a_file_cannot_do_is_refused(file: Path, tmp_path: Path, speaker: GgufSpeaker) -> None:
    with pytest.raises(UserError, match="there is no file"):
        open_speaker(str(tmp_path / "nothing.gguf"))
    with pytest.raises(UserError, match="--quantize nf4"):
        open_speaker(str(file), quantize="nf4")
    with pytest.raises(UserError, match="built for the CPU"):
        open_speaker(str(file), device="cuda")
    with pytest.raises(UserError, match="not known which base"):
        open_base(speaker)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(UserError, match="cannot read this file"):
        open_speaker(str(broken))
    (tmp_path / "words.gguf").write_text("no model")
    with pytest.raises(UserError, match="cannot read this file"):
        open_speaker(str(tmp_path / "words.gguf"))
