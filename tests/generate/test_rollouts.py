"""Rollouts: what a policy wrote, whatever was written beside it, with the log-probabilities it was drawn with."""

from __future__ import annotations

import torch

from tests.tiny import tiny_model, tiny_tokenizer
from zhibei.generate.options import SamplingOptions
from zhibei.generate.rollouts import grid, write_answers

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)], [1], [1, *range(100, 111)]]


def written(batch_rows: int, prompts: list[list[int]] = PROMPTS):
    options = SamplingOptions(max_new_tokens=12, temperature=0.8, seed=5, batch_rows=batch_rows)
    return write_answers(tiny_model(), prompts, options=options, stop_ids=[2, 9], pad_id=3, decode=TOKENIZER.decode)


def test_an_answer_does_not_depend_on_what_is_written_beside_it() -> None:
    whole, alone = written(64), written(1)
    assert whole.answers == alone.answers
    assert whole.finish == alone.finish
    torch.testing.assert_close(whole.grid(whole.logps), alone.grid(alone.logps), rtol=0, atol=1e-5)
    shorter = written(64, PROMPTS[:2])
    assert shorter.answers == whole.answers[:2]


def test_log_probabilities_are_those_of_the_model_at_that_temperature() -> None:
    model, rollout = tiny_model(), written(64)
    for prompt, answer, logps in zip(rollout.prompts, rollout.answers, rollout.logps, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        wanted_T = (logits_TV / 0.8).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), wanted_T, rtol=0, atol=1e-5)


def test_the_grid_and_its_mask_have_one_place_per_answer_token() -> None:
    rollout = written(64)
    assert rollout.mask_BT.sum(dim=1).tolist() == rollout.lengths
    assert [len(row) for row in rollout.rows] == [
        len(p) + n for p, n in zip(rollout.prompts, rollout.lengths, strict=True)
    ]
    assert grid([[1.0], [2.0, 3.0]]).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    ended = [answer[-1] in (2, 9) for answer in rollout.answers]
    assert [reason == "stop" for reason in rollout.finish] == ended
