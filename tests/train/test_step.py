"""One optimiser step is one mean over its learned tokens, however it is cut; bad steps change nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection, SftSection
from zhibei.data.batches import Batches, BatchPlan
from zhibei.data.prepared import PreparedRows
from zhibei.losses.tokens import TokenLoss
from zhibei.model.load import Need, load_for_training
from zhibei.model.savings import checkpoint_activations
from zhibei.train.optimizer import make_optimizer
from zhibei.train.step import NonFiniteStep, Stepper
from zhibei.train.token_loss import token_loss

CPU = torch.device("cpu")


def some_rows(num_rows: int = 48, seed: int = 0) -> PreparedRows:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 60, num_rows)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(4, 300, borders[-1]).astype(np.int32)
    return PreparedRows(tokens, random.random(borders[-1]) < 0.6, borders, [f"rows#{i}" for i in range(num_rows)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("step"), family="llama")


def stepper(folder: Path, *, method: str = "full", precision: str = "fp32", packing: bool = True, **sft) -> Stepper:
    section = ModelSection(path=str(folder), method=method)
    need = Need(CPU, precision, packing=packing, longest_row=64)
    model = load_for_training(section, LoraSection(dropout=0.0), need)
    if method == "lora":
        random = torch.Generator().manual_seed(5)
        for name, parameter in model.trainable().items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=random)
    run = SftSection(learning_rate=1e-2, **sft)
    return Stepper(model, make_optimizer(model.trainable(), run), token_loss(TokenLoss()), max_grad_norm=1.0)


def weights(steps: Stepper) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in steps.model.trainable().items()}


def plan(**changes) -> BatchPlan:
    return dataclasses.replace(BatchPlan(global_batch=16, micro_batch_tokens=2048, seed=3), **changes)


CUTS = {
    "one pass": plan(),
    "many small passes": plan(micro_batch_tokens=64),
    "padded": plan(packing=False),
    "padded, row by row": plan(packing=False, micro_batch_tokens=60),
    "packed with padding": plan(pad_multiple=64),
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("cut", [name for name in CUTS if name != "one pass"])
def test_however_a_step_is_cut_it_is_the_same_step(folder, method, cut):
    results = []
    for name in ("one pass", cut):
        steps = stepper(folder, method=method, packing=CUTS[name].packing)
        batches = Batches(some_rows(), CUTS[name])
        records = [steps.step(batches.micro_batches(i), learning_rate=1e-2) for i in range(3)]
        results.append((records, weights(steps)))
    (first, first_weights), (second, second_weights) = results
    for a, b in zip(first, second, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=2e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-5)
        assert (a.num_units, a.num_tokens) == (b.num_units, b.num_tokens)
    for name, value in first_weights.items():
        torch.testing.assert_close(value, second_weights[name], atol=2e-4, rtol=1e-3)


def test_the_identity_bites_when_micro_batches_are_averaged(folder):
    """The mistake the identity guards against: a mean per micro-batch, averaged, weighs tokens unequally."""
    steps = stepper(folder)
    batches = Batches(some_rows(), plan(micro_batch_tokens=64)).micro_batches(0)
    with torch.no_grad():
        sums = [steps.loss_sum(steps.model, batch).item() for batch in batches]
    units = [batch.num_units for batch in batches]
    mean_of_means = np.mean([s / n for s, n in zip(sums, units, strict=True) if n])
    assert abs(mean_of_means - sum(sums) / sum(units)) > 50 * 2e-6 * mean_of_means


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(folder, how):
    records = []
    for mode in ("none", how):
        steps = stepper(folder)
        checkpoint_activations(steps.model, mode)
        records.append(steps.step(Batches(some_rows(), plan()).micro_batches(0), learning_rate=1e-2))
    assert records[0] == records[1]


def test_the_update_is_adamw_with_clipping_written_out_in_numpy(folder):
    steps = stepper(folder, weight_decay=0.1)
    before = weights(steps)
    batch = Batches(some_rows(), plan()).micro_batches(0)
    loss_sum = steps.loss_sum(steps.model, batch[0])
    (loss_sum / batch[0].num_units).backward()
    gradients = {name: p.grad.double().numpy() for name, p in steps.model.trainable().items() if p.grad is not None}
    for parameter in steps.model.trainable().values():
        parameter.grad = None
    record = steps.step(batch, learning_rate=1e-2)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert record.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, after in weights(steps).items():
        g = gradients[name] * min(1.0, 1.0 / (norm + 1e-6))
        first, second = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)
        start = before[name].double().numpy()
        decay = 0.1 if start.ndim >= 2 else 0.0
        expected = start * (1 - 1e-2 * decay) - 1e-2 * first / (np.sqrt(second) + 1e-8)
        np.testing.assert_allclose(after.numpy(), expected, atol=2e-5)


def test_bf16_training_keeps_small_updates_in_its_masters(folder):
    """Updates far below bf16's spacing vanish without masters; with them they add up."""
    steps = stepper(folder, precision="bf16")
    name = next(name for name, p in steps.model.trainable().items() if p.ndim >= 2)
    parameter, master = steps.model.trainable()[name], steps.optimizer.master(name)
    assert parameter.dtype == torch.bfloat16
    assert master.dtype == torch.float32
    for i in range(4):
        steps.step(Batches(some_rows(), plan()).micro_batches(i % 3), learning_rate=1e-6)
    moved = steps.optimizer.master(name)
    assert 0 < (moved - master).abs().max() <= 4.1e-6
    assert (parameter.data.float() - moved).abs().max() <= (moved.abs() * 2**-8).max()


def test_bf16_gradients_of_many_passes_are_summed_in_fp32(folder):
    """Forty passes of one row each: the summed gradient must be as close to fp32 as a single pass is."""
    norms = {}
    for precision, budget in (("fp32", 2048), ("bf16", 2048), ("bf16", 60)):
        steps = stepper(folder, precision=precision)
        cut = plan(global_batch=40, micro_batch_tokens=budget)
        norms[precision, budget] = steps.step(Batches(some_rows(), cut).micro_batches(0), learning_rate=0.0).grad_norm
    exact = norms["fp32", 2048]
    assert abs(norms["bf16", 60] - exact) < 2 * abs(norms["bf16", 2048] - exact) + 0.01 * exact


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_8bit"])
def test_an_optimiser_put_back_continues_bit_for_bit(folder, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    batches = Batches(some_rows(), plan())
    straight = stepper(folder, optimizer=name)
    for i in range(3):
        last = straight.step(batches.micro_batches(i), learning_rate=1e-3)
    first = stepper(folder, optimizer=name)
    for i in range(2):
        first.step(batches.micro_batches(i), learning_rate=1e-3)
    second = stepper(folder, optimizer=name)
    for key, value in weights(first).items():
        second.model.trainable()[key].data.copy_(value)
    second.optimizer.load({key: value.clone() for key, value in first.optimizer.tensors().items()})
    assert second.step(batches.micro_batches(2), learning_rate=1e-3) == last
    for key, value in weights(straight).items():
        assert torch.equal(value, weights(second)[key])


def test_a_foreign_optimiser_state_is_refused(folder):
    steps = stepper(folder)
    with pytest.raises(UserError, match="other parameters"):
        steps.optimizer.load({"some.layer::exp_avg": torch.zeros(1)})


def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(folder):
    steps = stepper(folder)
    before = weights(steps)
    steps.model.head.weight.data[7, 3] = float("nan")
    before["lm_head.weight"] = steps.model.head.weight.detach().clone()
    batch = Batches(some_rows(), plan()).micro_batches(0)
    with pytest.raises(NonFiniteStep) as caught:
        steps.step(batch, learning_rate=1e-2)
    assert caught.value.row_numbers == sorted(batch[0].row_numbers)
    assert caught.value.exit_code == 3
    for name, value in weights(steps).items():
        assert torch.equal(value.nan_to_num(nan=99.0), before[name].nan_to_num(nan=99.0))


def test_fp16_overflow_halves_the_scale_and_skips_the_step(folder):
    steps = stepper(folder)
    steps.scale.enabled, steps.scale.value = True, 2.0**127
    before = weights(steps)
    record = steps.step(Batches(some_rows(), plan()).micro_batches(0), learning_rate=1e-2)
    assert record.was_skipped
    assert steps.scale.value == 2.0**126
    assert all(torch.equal(value, before[name]) for name, value in weights(steps).items())
    steps.scale.value = 2.0**10
    good = steps.step(Batches(some_rows(), plan()).micro_batches(0), learning_rate=1e-2)
    reference = stepper(folder).step(Batches(some_rows(), plan()).micro_batches(0), learning_rate=1e-2)
    assert good.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)


def test_a_step_with_nothing_to_learn_is_an_error(folder):
    rows = some_rows()
    silent = dataclasses.replace(rows, supervised=np.zeros_like(rows.supervised))
    with pytest.raises(UserError, match="no token of a whole optimiser step"):
        stepper(folder).step(Batches(silent, plan()).micro_batches(0), learning_rate=1e-2)
