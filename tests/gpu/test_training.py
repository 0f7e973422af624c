"""What only a CUDA device can show: the varlen kernel, compiled layers, fp16 with its scaler, resume on a GPU."""

import json

import pytest
import torch

from tests.tiny import tiny_model_folder
from tests.train.small_run import small_run
from tests.train.test_sft import StopAfter, heldout, losses
from tests.train.test_step import some_rows
from zhibei.config.errors import RunInterrupted
from zhibei.config.run import LoraSection, ModelSection, SftSection
from zhibei.data.batches import Batches, BatchPlan
from zhibei.losses.tokens import TokenLoss
from zhibei.model import attention
from zhibei.model.load import Need, load_for_training
from zhibei.model.savings import checkpoint_activations, compile_layers
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.run_dir import RunDir
from zhibei.train.offline import train
from zhibei.train.optimizer import make_optimizer
from zhibei.train.split_adamw import SplitAdamW
from zhibei.train.step import Stepper
from zhibei.train.token_loss import token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Head width 32 or more: the flash kernels want multiples of 8, which the CPU tests' width of 8 is, but compiled
# layers and tensor cores are then exercised on realistic tiles.
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def step_on_gpu(folder, how: str, *, compiled: bool = False, saving: str = "none", precision: str = "bf16"):
    section = ModelSection(path=str(folder), attention=how)
    need = Need(torch.device("cuda", 0), precision, longest_row=64)
    model = load_for_training(section, LoraSection(), need)
    was_compiled = compile_layers(model, compiled)
    checkpoint_activations(model, saving, compiled=was_compiled)
    optimizer = make_optimizer(model.trainable(), SftSection(learning_rate=1e-3))
    stepper = Stepper(model, optimizer, token_loss(TokenLoss(compiled=was_compiled)), max_grad_norm=1.0)
    plan = BatchPlan(global_batch=16, micro_batch_tokens=512, pad_multiple=64)
    records = [stepper.step(Batches(some_rows(), plan).micro_batches(i), learning_rate=1e-3) for i in range(3)]
    return model, records


@pytest.mark.parametrize("family", FAMILIES)
def test_the_varlen_kernel_equals_attention_row_by_row(tmp_path, family):
    folder = tiny_model_folder(tmp_path, family=family)
    fast_model, fast = step_on_gpu(folder, "varlen")
    slow_model, slow = step_on_gpu(folder, "documents")
    assert fast_model.attention_name == attention.VARLEN
    assert slow_model.attention_name == attention.DOCUMENTS
    for a, b in zip(fast, slow, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-2)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=3e-2)


@pytest.mark.parametrize("saving", ["none", "selective", "full"])
def test_compiled_layers_and_saved_memory_train_like_plain_ones(tmp_path, saving):
    folder = tiny_model_folder(tmp_path, family="llama")
    _, plain = step_on_gpu(folder, "varlen")
    _, compiled = step_on_gpu(folder, "varlen", compiled=True, saving=saving)
    for a, b in zip(plain, compiled, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-2)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=3e-2)


def test_the_compiled_update_equals_the_plain_one():
    torch.manual_seed(0)
    start = torch.randn(300, 70).bfloat16()
    gradients = [torch.randn(300, 70) for _ in range(5)]
    masters = []
    for device in ("cpu", "cuda"):
        parameter = torch.nn.Parameter(start.clone().to(device))
        optimizer = SplitAdamW({"w": parameter}, SftSection(weight_decay=0.1))
        for gradient in gradients:
            optimizer.step({"w": gradient.to(device)}, learning_rate=1e-3, scale=0.7)
        masters.append(optimizer.master("w").cpu())
    torch.testing.assert_close(*masters, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fp16_learns_with_its_loss_scale(tmp_path, method):
    run_dir = train(small_run(tmp_path, "model.precision=fp16", f"model.method={method}", "model.compile=false"))
    curve = heldout(run_dir)
    assert curve[-1][1] < 0.8 * curve[0][1]
    _, state = load_checkpoint(run_dir.checkpoint(12))
    assert state["stepper"]["loss_scale"] > 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_on_a_gpu_follows_the_uninterrupted_one(tmp_path, method):
    settings = [f"model.method={method}", "model.compile=false"]
    straight = train(small_run(tmp_path, *settings, "name=straight"))
    with pytest.raises(RunInterrupted):
        train(small_run(tmp_path, *settings, "name=cut"), watch=StopAfter(6, 15))
    cut = train(small_run(tmp_path, *settings, "name=cut"), resume=RunDir(tmp_path / "runs/cut"))
    for (step, a), (same, b) in zip(losses(straight), losses(cut), strict=True):
        assert step == same
        assert a == pytest.approx(b, rel=1e-2)


def test_a_gpu_run_proves_its_model_and_reports_its_memory(tmp_path):
    run_dir = train(small_run(tmp_path))
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    assert all(record["peak_gib"] > 0 for record in records if record["kind"] == "train")
