"""Answers beside those of transformers and of a plain loop, alone and in a batch, and no traces left."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.generate.draws import uniform
from zhibei.generate.engine import STEPS_IN_FLIGHT
from zhibei.generate.filters import draw, shape_scores
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import Answer, generate, stream
from zhibei.model.answering import answering

TOKENIZER = tiny_tokenizer()
GREEDY = SamplingOptions(max_new_tokens=24, temperature=0)
PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)], [1], [1, *range(100, 111)], [1, 7, 8, 9]]


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def reference(model, prompt: list[int], options: SamplingOptions, row: int, stop_ids=()) -> Answer:
    """The answer without cache, batch and padding: the whole text through the model for every token."""
    tokens: list[int] = []
    logps: list[float] = []
    model_logps: list[float] = []
    draws = uniform(options.seed, [row], start=0, count=options.max_new_tokens)
    while len(tokens) < options.max_new_tokens and not (tokens and tokens[-1] in stop_ids):
        ids = torch.tensor([prompt + tokens])
        with torch.no_grad():
            logits_BV = model(ids).logits[:, -1].float()
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, ids, True)
        scores_BV = shape_scores(logits_BV, options, seen_BV)
        greedy = options.temperature == 0
        token = int(scores_BV.argmax() if greedy else draw(scores_BV, draws[:, len(tokens)])[0])
        tokens.append(token)
        logps.append(0.0 if greedy else float(scores_BV.log_softmax(-1)[0, token]))
        model_logps.append(float(logits_BV.log_softmax(-1)[0, token]))
    stopped = tokens[-1] in stop_ids
    return Answer(tokens, logps, model_logps, "stop" if stopped else "length", len(tokens) - stopped)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_answers_in_a_batch_are_those_of_transformers_one_by_one(family):
    model = tiny_model(family)
    answers = generate(model, PROMPTS, options=GREEDY, stop_ids=[2], pad_id=3)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=3
        )
        assert answer.tokens == theirs[0, len(prompt) :].tolist()
        assert answer.finish == ("stop" if answer.tokens[-1] == 2 else "length")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sampled_answers_in_a_batch_are_those_of_the_plain_loop(family):
    model = tiny_model(family)
    options = SamplingOptions(
        max_new_tokens=20, temperature=0.8, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=5
    )
    answers = generate(model, PROMPTS, options=options, stop_ids=[2, 9], pad_id=3)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        expected = reference(model, prompt, options, row, stop_ids=(2, 9))
        assert answer.tokens == expected.tokens
        assert (answer.finish, answer.num_content_tokens) == (expected.finish, expected.num_content_tokens)
        assert np.allclose(answer.logps, expected.logps, atol=1e-4)
        assert np.allclose(answer.model_logps, expected.model_logps, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_answers_do_not_depend_on_how_many_rows_run_at_once(batch_rows):
    model = tiny_model()
    options = SamplingOptions(max_new_tokens=20, temperature=1.0, seed=1)
    whole = generate(model, PROMPTS, options=options, stop_ids=[2, 9, 30], pad_id=3)
    parts = generate(
        model, PROMPTS, options=SamplingOptions(**{**vars(options), "batch_rows": batch_rows}), stop_ids=[2, 9, 30]
    )
    assert [answer.tokens for answer in whole] == [answer.tokens for answer in parts]
    assert len({len(answer.tokens) for answer in whole}) > 1, "rows must end at different times for this test to bite"


def test_looking_at_tokens_less_often_changes_nothing(monkeypatch):
    """On a GPU rows run on for a few steps after their end, even beyond the context; none of that may show."""
    model = tiny_model()
    prompts = [*PROMPTS, [1] + [40 + index % 50 for index in range(249)]]
    options = SamplingOptions(max_new_tokens=20, temperature=1.0, seed=1, overflow="fewer_tokens")
    often = generate(model, prompts, options=options, stop_ids=[2, 9, 30], decode=decode)
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", 4)
    rarely = generate(model, prompts, options=options, stop_ids=[2, 9, 30], decode=decode)
    assert [(a.tokens, a.finish, a.text) for a in often] == [(a.tokens, a.finish, a.text) for a in rarely]


def test_equal_prompts_get_different_draws_and_equal_seeds_equal_ones():
    model = tiny_model()
    first, again, other = (
        generate(model, [PROMPTS[0]] * 4, options=SamplingOptions(max_new_tokens=20, seed=seed), stop_ids=[])
        for seed in (3, 3, 4)
    )
    assert first == again
    assert len({tuple(answer.tokens) for answer in [*first, *other]}) == 8


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_real_models_give_the_golden_greedy_tokens_and_log_probabilities(shared, name):
    from transformers import AutoModelForCausalLM

    folder = shared("data", "models", name)
    golden = json.loads((folder / "golden.json").read_text())["prompts"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [entry["input_ids"] for entry in golden]
    longest = max(len(entry["greedy_ids"]) - len(entry["input_ids"]) for entry in golden)
    options = SamplingOptions(max_new_tokens=longest, temperature=0)
    for entry, answer in zip(golden, generate(model, prompts, options=options, stop_ids=[2]), strict=True):
        expected = entry["greedy_ids"][len(entry["input_ids"]) :]
        assert answer.tokens[: len(expected)] == expected
        logprobs = entry["greedy_logprobs"][-len(expected) :]
        assert np.allclose(answer.model_logps[: len(expected)], logprobs, atol=2e-3)


def test_random_state_and_training_state_are_left_alone():
    model = tiny_model()
    model.train()
    frozen = model.model.layers[1]
    frozen.eval()
    flags = [module.training for module in model.modules()]
    states = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    generate(model, PROMPTS, options=SamplingOptions(max_new_tokens=5), stop_ids=[2])
    list(stream(model, PROMPTS[0], options=SamplingOptions(max_new_tokens=5), stop_ids=[2], decode=decode))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]
    assert [module.training for module in model.modules()] == flags


def test_state_is_restored_after_an_error_and_after_an_abandoned_stream():
    model = tiny_model().train()
    with pytest.raises(UserError):
        generate(model, [[1] * 250], options=SamplingOptions(max_new_tokens=50), stop_ids=[])
    assert model.training
    pieces = stream(model, PROMPTS[0], options=SamplingOptions(max_new_tokens=20), stop_ids=[], decode=decode)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert model.training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_answers_are_the_same_in_every_gradient_mode_and_training_goes_on(mode):
    model = tiny_model().train()
    with mode():
        answers = generate(model, PROMPTS, options=GREEDY, stop_ids=[2])
    assert [answer.tokens for answer in answers] == [
        answer.tokens for answer in generate(tiny_model(), PROMPTS, options=GREEDY, stop_ids=[2])
    ]
    model(torch.tensor([PROMPTS[2]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_off_while_answering():
    model = tiny_model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    quiet = generate(tiny_model(), PROMPTS, options=GREEDY, stop_ids=[2])
    assert [a.tokens for a in generate(model, PROMPTS, options=GREEDY, stop_ids=[2])] == [a.tokens for a in quiet]


def test_attention_for_packed_rows_is_swapped_out_while_answering():
    from transformers import AttentionInterface

    def useless(*_: object, **__: object) -> None:
        raise AssertionError("attention for packed rows cannot use a cache")

    AttentionInterface.register("test_packed_only", useless)
    model = tiny_model()
    expected = generate(model, PROMPTS, options=GREEDY, stop_ids=[2])
    model.config._attn_implementation = "test_packed_only"
    answers = generate(model, PROMPTS, options=GREEDY, stop_ids=[2])
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert model.config._attn_implementation == "test_packed_only"


def test_an_adapter_model_answers_through_its_wrapper():
    from peft import LoraConfig, get_peft_model

    plain = generate(tiny_model(), PROMPTS, options=GREEDY, stop_ids=[2])
    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=True))
    same = generate(wrapped, PROMPTS, options=GREEDY, stop_ids=[2])
    assert [answer.tokens for answer in same] == [answer.tokens for answer in plain]
    torch.nn.init.ones_(wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)  # type: ignore[union-attr,index]
    other = generate(wrapped, PROMPTS, options=GREEDY, stop_ids=[2])
    assert [answer.tokens for answer in other] != [answer.tokens for answer in plain]


def test_stop_strings_end_the_row_they_appear_in_only():
    model = tiny_model()
    free = generate(model, PROMPTS, options=GREEDY, stop_ids=[2], decode=decode)
    stop = "o"
    assert {stop in str(answer.text) for answer in free} == {True, False}
    options = SamplingOptions(max_new_tokens=24, temperature=0, stop_strings=(stop,))
    for before, after in zip(free, generate(model, PROMPTS, options=options, stop_ids=[2], decode=decode), strict=True):
        assert before.text is not None
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
            assert after.finish == "stop"
            assert after.tokens == before.tokens[: len(after.tokens)]
            assert stop in decode(after.tokens)
            assert stop not in decode(after.tokens[:-1])
        else:
            assert (after.tokens, after.text, after.finish) == (before.tokens, before.text, before.finish)


def test_stream_is_generate_in_pieces():
    model = tiny_model()
    for options in (GREEDY, SamplingOptions(max_new_tokens=30, temperature=1.3, seed=2, stop_strings=("t",))):
        for prompt in PROMPTS:
            pieces = list(stream(model, prompt, options=options, stop_ids=[2], decode=decode))
            whole = generate(model, [prompt], options=options, stop_ids=[2], decode=decode)[0]
            assert [piece.answer for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            answer = pieces[-1].answer
            assert answer is not None
            assert (answer.tokens, answer.finish) == (whole.tokens, whole.finish)
            assert "".join(piece.text for piece in pieces) == answer.text


def test_stop_token_is_kept_with_its_log_probability_but_is_no_content():
    model = tiny_model()
    first = generate(model, [PROMPTS[0]], options=GREEDY, stop_ids=[])[0]
    answer = generate(model, [PROMPTS[0]], options=GREEDY, stop_ids=[first.tokens[3]], decode=decode)[0]
    end = first.tokens.index(first.tokens[3]) + 1
    assert answer.tokens == first.tokens[:end]
    assert len(answer.logps) == len(answer.model_logps) == end
    assert answer.content_tokens == first.tokens[: end - 1]
    assert answer.text == decode(answer.content_tokens)


class TestContext:
    """Prompt and answer beyond the 256 positions of the tiny model."""

    long_prompt = [1] + [40 + index % 50 for index in range(239)]

    def test_is_an_error_by_default_that_names_the_row(self):
        with pytest.raises(
            UserError, match="240 prompt tokens and 24 new ones exceed the model's context of 256"
        ) as error:
            generate(tiny_model(), [[1, 2], self.long_prompt], options=GREEDY, stop_ids=[])
        assert error.value.where == "prompt 1"

    def test_fewer_tokens_gives_what_fits_and_says_so(self):
        options = SamplingOptions(max_new_tokens=24, temperature=0, overflow="fewer_tokens")
        short, long = generate(tiny_model(), [[1, 7], self.long_prompt], options=options, stop_ids=[])
        assert (len(short.tokens), short.notice) == (24, "")
        assert len(long.tokens) == 16
        assert "16 new tokens instead of 24" in long.notice
        assert short.tokens == generate(tiny_model(), [[1, 7]], options=options, stop_ids=[])[0].tokens

    def test_cut_prompt_leaves_out_the_oldest_tokens_and_says_so(self):
        options = SamplingOptions(max_new_tokens=24, temperature=0, overflow="cut_prompt")
        cut = generate(tiny_model(), [self.long_prompt], options=options, stop_ids=[])[0]
        assert cut.tokens == generate(tiny_model(), [self.long_prompt[8:]], options=options, stop_ids=[])[0].tokens
        assert "oldest 8 tokens" in cut.notice

    def test_a_prompt_that_fills_the_context_is_an_error_in_every_case(self):
        for overflow in ("error", "fewer_tokens"):
            options = SamplingOptions(max_new_tokens=24, overflow=overflow)  # type: ignore[arg-type]
            with pytest.raises(UserError, match="exceed"):
                generate(tiny_model(), [[1] * 256], options=options, stop_ids=[])

    def test_exactly_full_is_fine(self):
        answer = generate(tiny_model(), [self.long_prompt[:232]], options=GREEDY, stop_ids=[])[0]
        assert (len(answer.tokens), answer.notice) == (24, "")


def test_logits_that_are_not_finite_are_refused():
    model = tiny_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    for options in (GREEDY, SamplingOptions(max_new_tokens=5)):
        with pytest.raises(UserError, match="not finite"):
            generate(model, PROMPTS, options=options, stop_ids=[2])


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        generate(tiny_model(), [[1], []], options=GREEDY, stop_ids=[2])


def test_no_prompts_no_answers():
    assert generate(tiny_model(), [], options=GREEDY, stop_ids=[2]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -1},
        {"top_k": 1.5},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"seed": -1},
        {"stop_strings": ("",)},
        {"overflow": "ignore"},
    ],
)
def test_options_out_of_range_are_refused_by_name(change):
    name = next(iter(change))
    with pytest.raises(UserError, match=name.replace("stop_strings", "stop string")):
        SamplingOptions(**change)


def test_answering_nests():
    model = tiny_model().train()
    with answering(model), answering(model):
        assert not model.training
    assert model.training
