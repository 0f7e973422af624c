"""Bases in few bits on a CUDA device: kernels, compiled layers, what loading takes, a whole run."""

import json
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")

from tests.model.test_quantized import with_unpacked_base
from tests.tiny import tiny_model_folder
from tests.train.small_run import small_run
from tests.train.test_sft import heldout
from tests.train.test_step import some_rows
from zhibei.config.run import LoraSection, ModelSection, SftSection
from zhibei.data.batches import Batches, BatchPlan
from zhibei.losses.tokens import TokenLoss
from zhibei.model.load import Need, load_for_inference, load_for_training
from zhibei.model.quantized import FEW_ROWS, held_bytes, quantised_layers
from zhibei.model.savings import checkpoint_activations, compile_layers
from zhibei.train.offline import train
from zhibei.train.optimizer import make_optimizer
from zhibei.train.step import Stepper
from zhibei.train.token_loss import token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS: Any = ("nf4", "int8")


def wide_model_folder(folder):
    """Large enough that its 16-bit weights show in the allocator's peak, and kernels meet real tiles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "wide")  # pyright: ignore[reportArgumentType]
    return folder / "wide"


def steps(folder, kind: Any, *, compiled=False, saving="none", unpack=False):
    need = Need(torch.device("cuda", 0), "bf16", longest_row=64)
    model = load_for_training(ModelSection(path=str(folder), method="qlora", quantize=kind), LoraSection(), need)
    if unpack:
        plain = with_unpacked_base(model)
        plain.hf.to("cuda", torch.bfloat16)
        model = plain
    was_compiled = compile_layers(model, compiled)
    checkpoint_activations(model, saving, compiled=was_compiled)
    optimizer = make_optimizer(model.trainable(), SftSection(learning_rate=1e-3))
    stepper = Stepper(model, optimizer, token_loss(TokenLoss(compiled=was_compiled)), max_grad_norm=1.0)
    plan = BatchPlan(global_batch=16, micro_batch_tokens=512, pad_multiple=64)
    return [stepper.step(Batches(some_rows(), plan).micro_batches(i), learning_rate=1e-3) for i in range(3)]


@pytest.mark.parametrize(("kind", "saving"), [("nf4", "selective"), ("int8", "full")])
def test_packed_and_compiled_training_equals_that_on_the_unpacked_base(tmp_path, kind, saving):
    folder = wide_model_folder(tmp_path)
    expected = steps(folder, kind, unpack=True)
    for records in (steps(folder, kind), steps(folder, kind, compiled=True, saving=saving)):
        for record, other in zip(records, expected, strict=True):
            assert record.loss == pytest.approx(other.loss, rel=1e-2)
            assert record.grad_norm == pytest.approx(other.grad_norm, rel=5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_for_few_rows_give_the_same_product(tmp_path, kind):
    model = load_for_inference(str(wide_model_folder(tmp_path)), device="cuda", precision="bf16", quantize=kind)
    for layer in list(quantised_layers(model.inner).values())[:7]:
        rows = torch.randn(FEW_ROWS, layer.in_features, device="cuda", dtype=torch.bfloat16)
        exact = rows.float() @ layer.weight.float().T
        with torch.no_grad():
            few, one = layer(rows), layer(rows[:1])
            many = layer(torch.cat([rows, rows, rows]))[:FEW_ROWS]
        size = exact.abs().max()
        for found, expected in ((few, exact), (one, exact[:1]), (many, exact)):
            assert (found.float() - expected).abs().max() < 1.5e-2 * size


@pytest.mark.parametrize("kind", KINDS)
def test_loading_never_holds_the_16_bit_model(tmp_path, kind):
    folder = wide_model_folder(tmp_path)
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    load_for_inference(str(tiny_model_folder(tmp_path)), device="cuda", quantize=kind)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_for_inference(str(folder), device="cuda", precision="bf16", quantize=kind)
    peak = torch.cuda.max_memory_allocated() - before
    assert held_bytes(model.inner) < {"nf4": 0.32, "int8": 0.56}[kind] * whole
    # One matrix in 16 bits at a time; in a model as small as this, the largest is a large part of it.
    assert peak < held_bytes(model.inner) + 0.3 * whole


@pytest.mark.parametrize("settings", [["model.quantize=nf4"], ["model.quantize=int8", "model.precision=fp16"]])
def test_a_run_learns_and_its_adapter_reads_back_the_same(tmp_path, settings):
    run_dir = train(small_run(tmp_path, "model.method=qlora", "model.compile=false", *settings))
    curve = heldout(run_dir)
    assert curve[-1][1] < curve[0][1]
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))
