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


def test_a_generation_config_of_the_model_changes_no_option() -> None:
    model, prompt = tiny_model(), [1, *range(40, 65)]
    options = SamplingOptions(max_new_tokens=20, temperature=0)
    (before,) = generate(model, [prompt], options=options, stop_ids=())
    config = model.generation_config
    config.do_sample, config.top_k, config.repetition_penalty, config.eos_token_id = True, 1, 9.0, before.tokens[0]
    config.min_new_tokens, config.no_repeat_ngram_size, config.suppress_tokens = 3, 1, [before.tokens[0]]
    (after,) = generate(model, [prompt], options=options, stop_ids=())
    assert after.tokens == before.tokens
