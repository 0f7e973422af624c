"""The prompt of the server is the prompt of chat is the beginning of the row that training learned from."""

from __future__ import annotations

import numpy as np
import pytest

from tests.serve.live import serving
from tests.serve.test_api import opened
from tests.tiny import tiny_model_folder
from zhibei.data.encode import Wording, encode_records
from zhibei.data.records import Conversation, Origin
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import open_speaker
from zhibei.serve.opening import Wanted
from zhibei.text.messages import Message

pytest.importorskip("uvicorn")
TURNS = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital is Paris."),
    Message("user", "  And 中国的?\nAnswer briefly. "),
]


def trained_tokens(speaker, messages, *, system: str | None) -> list[int]:
    """The row that training makes of these messages with an answer, up to the first token of the answer."""
    wording = Wording(speaker.tokenizer, speaker.template, system, 512, "stop", "answers", "keep", "stop")
    record = Conversation((*messages, Message("assistant", "It is")), Origin("rows.json", 0))
    chunk = encode_records([(0, 0, record)], wording)
    last_answer = int(np.flatnonzero(np.diff(chunk.supervised.astype(int)) == 1)[-1]) + 1
    return chunk.tokens[:last_answer].tolist()


def as_json(messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("template", ["vicuna_v1.1", "chatml", "alpaca"])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_train_chat_and_server_agree_on_every_token(tmp_path, template, system):
    turns = TURNS[-1:] if template == "alpaca" else TURNS
    messages = [*([Message("system", system)] if system and template != "alpaca" else []), *turns]
    folder = tiny_model_folder(tmp_path)
    hosted = opened(Wanted("tiny", str(folder)), template=template)
    speaker = open_speaker(str(folder), template=template, device="cpu")
    trained = trained_tokens(speaker, messages, system=None)
    assert speaker.prompt(messages, SamplingOptions(max_new_tokens=1)).tokens == trained
    assert hosted["tiny"].chat_prompt(messages) == trained
    with serving(hosted) as live:
        said = live.post(
            "/v1/chat/completions", {"model": "tiny", "messages": as_json(messages), "max_tokens": 1, "temperature": 0}
        )
        assert said.json()["usage"]["prompt_tokens"] == len(trained)


def test_the_system_prompt_of_the_run_is_asked_with_where_a_conversation_brings_none(tmp_path):
    from tests.serve.test_chat import run_folder

    run = run_folder(tmp_path, "vicuna_v1.1")
    with open(run / "resolved.yaml", "a", encoding="utf-8") as file:
        file.write("  system: Answer in one word.\n")
    hosted = opened(Wanted("run", str(run)), template="vicuna_v1.1")["run"]
    trained = trained_tokens(hosted.speaker, TURNS, system="Answer in one word.")
    assert hosted.chat_prompt(TURNS) == trained
    own = [Message("system", "Be kind."), *TURNS]
    assert hosted.chat_prompt(own) == trained_tokens(hosted.speaker, own, system="Answer in one word.") != trained
    hosted.worker.stop()
