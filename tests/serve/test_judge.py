"""A trained reward model scores conversations as in training, whatever stands beside them; it does not chat."""

from __future__ import annotations

import pytest

import zhibei
from tests.train.pair_run import colour_pairs, pair_run
from zhibei.config.errors import UserError
from zhibei.serve.chat import open_speaker
from zhibei.serve.judge import open_judge
from zhibei.train.offline import train


def conversation(pair, side):
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_judge_prefers_what_was_preferred_and_neighbours_change_nothing(tmp_path, method):
    run_dir = train(pair_run(tmp_path, "reward", f"model.method={method}", "reward.evaluate_every=0"))
    judge = open_judge(str(run_dir.path), device="cpu")
    pairs = colour_pairs(9)
    together = judge.scores([conversation(pair, side) for pair in pairs for side in ("chosen", "rejected")])
    alone = [judge.score(conversation(pair, side)) for pair in pairs for side in ("chosen", "rejected")]
    assert together == pytest.approx(alone, abs=1e-3)
    assert sum(a > b for a, b in zip(together[::2], together[1::2], strict=True)) >= 8
    assert zhibei.judge(run_dir.path, device="cpu").score(conversation(pairs[0], "chosen")) == pytest.approx(alone[0])
    with pytest.raises(UserError, match="does not end with an answer"):
        judge.score(conversation(pairs[0], "chosen")[:1])
    with pytest.raises(UserError, match="is a reward model: it gives scores"):
        open_speaker(str(run_dir.path))


def test_a_language_model_is_no_judge(tmp_path):
    pair_run(tmp_path, "reward")
    with pytest.raises(UserError, match="is a language model"):
        open_judge(str(tmp_path / "tiny-llama"))
