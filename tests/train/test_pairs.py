"""Reward models and preference losses end to end: they learn, resume bit for bit, and stop when they cannot work."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.train.pair_run import colour_pairs, judged_rows, pair_run
from tests.train.test_sft import StopAfter, heldout, losses, model_bytes
from zhibei.config.errors import RunInterrupted, RunStopped, UserError
from zhibei.config.read import read_run
from zhibei.model.language_model import LanguageModel
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.store.verify import verify_folder
from zhibei.train.offline import train

LORA = ("model.method=lora",)


def evaluations(run_dir: RunDir) -> list[dict]:
    return [record for record in read_metrics(run_dir.metrics) if record["kind"] == "heldout"]


def test_a_reward_model_learns_and_is_what_transformers_loads(tmp_path):
    run_dir = train(pair_run(tmp_path, "reward"))
    first, *_, last = evaluations(run_dir)
    assert last["accuracy"] > 0.9 > first["accuracy"]
    assert last["loss"] < 0.2 < first["loss"]
    manifest = json.loads(run_dir.manifest.read_text())
    assert manifest["kind"] == "reward"
    assert manifest["head"]["name"] == "score.weight"
    assert manifest["finished"]["heldout"]["accuracy"] == last["accuracy"]
    assert verify_folder(run_dir.path) == []
    model = AutoModelForSequenceClassification.from_pretrained(run_dir.model)
    tokenizer = AutoTokenizer.from_pretrained(run_dir.model)
    pair = colour_pairs()[5]
    chats = [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
        for side in ("chosen", "rejected")
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    scores = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            scores[side] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert scores["left"][0] > scores["left"][1]
    torch.testing.assert_close(scores["left"], scores["right"], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("reward", ()),
        ("reward", LORA),
        ("reward", ("model.precision=bf16",)),
        ("dpo", ()),
        ("dpo", LORA),
        ("dpo", ("dpo.loss=kto", *LORA)),
        ("dpo", ("dpo.loss=kto", "dpo.reference=precomputed")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stage, settings):
    settings = [*settings, f"{stage}.max_steps=6", f"{stage}.evaluate_every=3"]
    straight = train(pair_run(tmp_path, stage, *settings, "name=straight"))
    with pytest.raises(RunInterrupted):
        train(pair_run(tmp_path, stage, *settings, "name=cut"), watch=StopAfter(4, signal.SIGTERM))
    cut = RunDir(straight.path.with_name("cut"))
    train(pair_run(tmp_path, stage, *settings, "name=cut"), resume=cut)
    assert losses(cut) == losses(straight)
    assert heldout(cut) == heldout(straight)
    assert model_bytes(cut) == model_bytes(straight)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_every_loss_raises_held_out_reward_accuracy(tmp_path, loss):
    rows = judged_rows() if loss == "kto" else None
    settings = [f"dpo.loss={loss}", "dpo.max_steps=8", "dpo.sample_tokens=0", "dpo.learning_rate=1e-3"]
    first, *_, last = evaluations(train(pair_run(tmp_path, "dpo", *settings, rows=rows)))
    assert last["accuracy"] > 0.9 > first["accuracy"]
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]


@pytest.mark.parametrize("method", [(), LORA])
def test_at_step_0_the_margin_is_0_and_afterwards_it_is_not(tmp_path, method):
    run_dir = train(pair_run(tmp_path, "dpo", *method, "dpo.max_steps=2", "dpo.evaluate_every=1", "dpo.warmup_steps=0"))
    start, one, _ = evaluations(run_dir)
    assert start["margin"] == 0
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert one["margin"] != 0
    step = next(record for record in read_metrics(run_dir.metrics) if record["kind"] == "train")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_adapters_off_and_precomputed_are_the_same_reference(tmp_path):
    settings = [*LORA, "dpo.max_steps=4"]
    off = train(pair_run(tmp_path, "dpo", *settings, "name=off", "dpo.reference=adapters_off"))
    kept = train(pair_run(tmp_path, "dpo", *settings, "name=kept", "dpo.reference=precomputed"))
    assert not off.reference.exists()
    assert kept.reference.is_dir()
    for (_, one), (_, other) in zip(losses(off), losses(kept), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_pair_is_two_judged_answers_for_kto(tmp_path):
    settings = ["dpo.loss=kto", "dpo.max_steps=2", "dpo.sample_tokens=0", "data.validation=0", "data.shuffle=false"]
    settings += ["dpo.global_batch=64", "dpo.warmup_steps=0"]
    pairs = train(pair_run(tmp_path, "dpo", *settings, "name=pairs", rows=colour_pairs(32)))
    judged = train(pair_run(tmp_path, "dpo", *settings, "name=judged", rows=judged_rows(32)))
    assert dict(losses(pairs)) == pytest.approx(dict(losses(judged)))
    assert losses(pairs)[-1][1] < 0.5


def test_a_reference_that_is_gone_or_damaged_is_not_made_again_from_moved_weights(tmp_path):
    run = ["dpo.max_steps=6", "dpo.sample_tokens=0"]
    with pytest.raises(RunInterrupted):
        train(pair_run(tmp_path, "dpo", *run), watch=StopAfter(4, signal.SIGTERM))
    run_dir = RunDir(tmp_path / "runs/small")
    file = run_dir.reference / "reference.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="are damaged"):
        train(pair_run(tmp_path, "dpo", *run), resume=run_dir)
    file.unlink()
    (run_dir.reference / "index.json").unlink()
    run_dir.reference.rmdir()
    with pytest.raises(UserError, match="are gone"):
        train(pair_run(tmp_path, "dpo", *run), resume=run_dir)


def test_a_reference_that_moves_with_the_policy_stops_the_run(tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(LanguageModel, "without_adapters", lambda self: nullcontext())
    with pytest.raises(RunStopped, match="the reference moves with the policy"):
        train(pair_run(tmp_path, "dpo", *LORA))


def test_margins_and_ties_change_the_loss_and_missing_margins_are_refused(tmp_path):
    settings = ["reward.max_steps=2", "data.validation=0", "reward.global_batch=32"]
    plain = [row | {"margin": 2.0 if i % 2 else 0} for i, row in enumerate(colour_pairs(32))]
    seen = {}
    for name, more in (("ties", []), ("pairs", ["reward.ties=as_pairs"]), ("margin", ["reward.margin=true"])):
        run = pair_run(tmp_path, "reward", *settings, *more, f"name={name}", rows=plain)
        seen[name] = losses(train(run))[0][1]
    assert len(set(seen.values())) == 3
    with pytest.raises(UserError, match="no pair has a margin"):
        train(pair_run(tmp_path, "reward", *settings, "reward.margin=true", "name=none"))


def test_log_sig_and_log_exp_are_one_function(tmp_path):
    settings = ["reward.max_steps=3", "data.validation=0"]
    names = ("log_sig", "log_exp")
    runs = [train(pair_run(tmp_path, "reward", *settings, f"name={n}", f"reward.loss={n}")) for n in names]
    assert losses(runs[0]) == losses(runs[1])


def test_a_reward_model_begins_with_an_adapter_run_merged_and_learns_on(tmp_path):
    dpo = train(pair_run(tmp_path, "dpo", *LORA, "dpo.max_steps=2", "dpo.sample_tokens=0", "name=dpo"))
    short = ["reward.max_steps=2", "reward.evaluate_every=0"]
    first = train(pair_run(tmp_path, "reward", *short, "name=first", f"model.path={dpo.path}"))
    started = next(r for r in read_metrics(first.metrics) if r.get("event") == "started")
    learning, everything = re.findall(r"([\d,]+) of ([\d,]+) parameters learn", started["text"])[0]
    assert learning == everything, "an adapter that is merged leaves nothing frozen"
    again = train(pair_run(tmp_path, "reward", *short, "name=again", f"model.path={first.path}"))
    start = evaluations(again)[0]["loss"]
    assert start == pytest.approx(evaluations(first)[-1]["loss"], rel=1e-4)
    with pytest.raises(UserError, match="adapter"):
        train(pair_run(tmp_path, "reward", *LORA, "name=no", f"model.path={dpo.path}"))
    with pytest.raises(UserError, match="is a reward model"):
        train(pair_run(tmp_path, "dpo", "name=no", f"model.path={first.path}"))


def test_judged_answers_are_refused_by_losses_over_pairs(tmp_path):
    with pytest.raises(UserError, match="learns from pairs") as caught:
        train(pair_run(tmp_path, "dpo", rows=judged_rows()))
    assert "kto" in caught.value.fix


@pytest.mark.parametrize(("recipe", "stage"), [("coati-7b-rm", "reward"), ("dpo-7b-lora", "dpo")])
def test_the_recipes_over_pairs_run_on_a_tiny_model(tmp_path, recipe, stage):
    pair_run(tmp_path, stage)
    places = [f"runs={tmp_path / 'runs'}", f"model.path={tmp_path / 'tiny-llama'}"]
    places += [f"data.sources=[{tmp_path / 'pairs.json'}]", "data.max_tokens=240", "data.validation=0.2"]
    small = ["model.precision=fp32", f"{stage}.max_steps=2", f"{stage}.global_batch=4", f"{stage}.evaluate_every=1"]
    assert train(read_run(recipe, [*places, *small])).model.is_dir()
