"""How long an answer may become is what was asked, not what a model's files say."""

from __future__ import annotations

from tests.tiny import tiny_model
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate


def test_a_max_length_of_the_model_limits_no_answer() -> None:
    model = tiny_model()
    model.generation_config.max_length = 20
    options = SamplingOptions(max_new_tokens=40, temperature=0)
    (answer,) = generate(model, [[1, *range(40, 65)]], options=options, stop_ids=())
    assert len(answer.tokens) == 40
