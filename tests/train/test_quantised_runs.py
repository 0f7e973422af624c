"""Runs whose base is held in few bits: they learn, resume bit for bit, prove themselves, and keep the 16-bit base."""

import json
import signal

import pytest
import torch

import zhibei

pytest.importorskip("bitsandbytes")

from tests.train.pair_run import pair_run
from tests.train.small_policy import small_policy
from tests.train.small_run import small_run
from tests.train.test_sft import StopAfter, heldout, losses, model_bytes
from zhibei.config.errors import RunInterrupted, UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model.load import Need, load_for_inference
from zhibei.model.quantized import is_quantized
from zhibei.model.roles import Cast, load_roles
from zhibei.model.score_model import load_score_model
from zhibei.store.manifest import model_fingerprint
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.loops import LOOPS
from zhibei.train.offline import train

QLORA = ("model.method=qlora",)
INT8 = ("model.method=lora", "model.quantize=int8")


@pytest.mark.parametrize("settings", [QLORA, INT8])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_leaves_an_adapter(tmp_path, settings):
    straight = train(small_run(tmp_path, *settings, "name=straight"))
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path, *settings, "name=cut"), watch=StopAfter(6, signal.SIGTERM))
    cut = RunDir(straight.path.with_name("cut"))
    train(small_run(tmp_path, *settings, "name=cut"), resume=cut)
    assert losses(cut) == losses(straight)
    assert heldout(cut) == heldout(straight)
    assert model_bytes(cut) == model_bytes(straight)
    assert heldout(straight)[-1][1] < heldout(straight)[0][1]
    assert all(proof["passed"] for proof in json.loads(straight.proofs.read_text()))
    assert sorted(path.name for path in straight.model.glob("*.safetensors")) == ["adapter_model.safetensors"]
    manifest = json.loads(straight.manifest.read_text())
    assert manifest["settings"]["model"]["quantize"] == ("nf4" if settings == QLORA else "int8")
    assert manifest["base"]["fingerprint"] == model_fingerprint(tmp_path / "tiny-llama"), "of the weights on disk"
    asked = torch.arange(5, 25)[None]
    on_whole_base = load_for_inference(str(straight.path), device="cpu")
    assert not is_quantized(on_whole_base.hf)
    kind = manifest["settings"]["model"]["quantize"]
    on_packed_base = load_for_inference(str(straight.path), device="cpu", quantize=kind)
    with torch.no_grad():
        difference = (on_whole_base.inner(asked).logits - on_packed_base.inner(asked).logits).abs().max()
    assert is_quantized(on_packed_base.hf)
    assert is_quantized(zhibei.load(straight.path, device="cpu", quantize=kind).model.hf)
    assert difference > 0


def test_a_run_in_other_bits_does_not_resume(tmp_path):
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path, *QLORA), watch=StopAfter(5, signal.SIGTERM))
    with pytest.raises(UserError, match="quantize"):
        train(small_run(tmp_path, *QLORA, "model.quantize=int8"), resume=RunDir(tmp_path / "runs/small"))


def test_a_reward_model_on_a_4_bit_base_learns_with_its_head_in_full_precision(tmp_path):
    need = Need(torch.device("cpu"), "bf16", packing=True, longest_row=64)
    run = pair_run(tmp_path, "reward", *QLORA)
    model = load_score_model(run.run.model, LoraSection(), need)
    assert is_quantized(model.hf)
    assert model.head.weight.dtype == torch.float32
    run_dir = train(run)
    curve = heldout(run_dir)
    assert curve[-1][1] < curve[0][1]
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))


def test_dpo_on_a_4_bit_base_takes_its_reference_from_that_base_with_adapters_off(tmp_path):
    run_dir = train(pair_run(tmp_path, "dpo", *QLORA, "dpo.reference=adapters_off"))
    first = next(record for record in read_metrics(run_dir.metrics) if record["kind"] == "heldout")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "the policy begins as its reference"
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_shared_roles_lie_on_one_packed_base(tmp_path, quantize):
    small_policy(tmp_path, "ppo")
    need = Need(torch.device("cpu"), "fp32", packing=False, longest_row=64)
    section = ModelSection(path=str(tmp_path / "tiny-llama"), method="qlora", quantize=quantize)
    roles = load_roles(section, LoraSection(), need, Cast(has_critic=True, is_shared=True))
    tokens = torch.arange(5, 40)[None]
    base = load_for_inference(section.path, device="cpu", quantize=quantize).inner(tokens).logits
    for name, parameter in roles.policy.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    with torch.no_grad():
        assert not torch.allclose(roles.policy.inner(tokens).logits, base, atol=1e-3)
        with roles.as_reference() as reference:
            assert torch.equal(reference.inner(tokens).logits, base)
    assert roles.critic is not None
    assert roles.critic.head.weight.dtype == torch.float32


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_policies_learn_on_a_4_bit_base(tmp_path, stage):
    run_dir = LOOPS[stage](small_policy(tmp_path, stage, *QLORA))
    iterations = [record for record in read_metrics(run_dir.metrics) if record["kind"] == "iteration"]
    assert len(iterations) == 3
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))
