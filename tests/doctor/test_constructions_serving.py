"""What cannot happen when a model of ours is asked: each test would fail if it could."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_model
from zhibei.cli.app import run_command
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate

PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)]]


@pytest.mark.parametrize("option", ["--cutoff-len", "--cutoff_len", "--max-seq-length"])
def test_an_option_that_does_nothing_while_talking_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["chat", "anywhere", option, "512"]) == 2
    assert option in capsys.readouterr().err


def test_generation_config_does_not_change_how_answers_are_drawn() -> None:
    model = tiny_model("llama")
    options = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=7)
    plain = generate(model, PROMPTS, options=options, stop_ids=[2], pad_id=3)
    settings = {"repetition_penalty": 1.8, "top_k": 1, "top_p": 0.1, "temperature": 0.05, "do_sample": True}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    again = generate(model, PROMPTS, options=options, stop_ids=[2], pad_id=3)
    assert [one.tokens for one in again] == [one.tokens for one in plain]
    assert [one.logps for one in again] == [one.logps for one in plain]
