"""What must not change a preference loss: how rows are cut into passes, packed or padded, and where padding stands."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import FAMILIES, tiny_model_folder
from tests.train.pair_run import judged_rows, pair_run
from zhibei.config.preference import DpoSection
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.batches import Batch, BatchPlan, collate_packed, collate_padded
from zhibei.data.pair_rows import answer_begins, interleaved, mismatched
from zhibei.data.prepared import PreparedRows
from zhibei.losses.intervals import wilson
from zhibei.model.load import Need
from zhibei.model.score_model import load_score_model, row_scores
from zhibei.store.run_dir import RunDir
from zhibei.train.answer_logps import RowLogps
from zhibei.train.materials import gather
from zhibei.train.preferences import PAIR_LOSSES, Compared, rightness
from zhibei.train.score_figures import Scored, calibration_error, score_figures
from zhibei.train.step import Stepper

CPU = torch.device("cpu")
STAGES = [
    ("reward", ("reward.centring=0.01",)),
    ("dpo", ("dpo.label_smoothing=0.1",)),
    ("dpo", ("dpo.loss=ipo",)),
    ("dpo", ("dpo.loss=simpo",)),
    ("dpo", ("dpo.loss=orpo",)),
    ("dpo", ("dpo.loss=kto",)),
    ("dpo", ("model.method=lora",)),
]


def loss_and_gradients(folder: Path, stage: str, *overrides: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The first step's mean loss and its gradients, of weights that differ from the reference."""
    rows = judged_rows(12) if "dpo.loss=kto" in overrides else None
    settings = ["data.validation=0", "data.shuffle=false", f"{stage}.global_batch=12"]
    materials = gather(pair_run(folder, stage, *settings, *overrides, rows=rows))
    materials = materials.task.prepare(materials, RunDir(folder / "none" / "-".join(overrides)), 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in materials.model.trainable().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    seen: dict[str, torch.Tensor] = {}

    class Keeping:
        parameters = materials.stepper.optimizer.parameters

        def step(self, gradients, *, learning_rate, scale):
            seen.update({name: gradient.clone() for name, gradient in gradients.items()})

    stepper = Stepper(materials.model, Keeping(), materials.task.step_loss, max_grad_norm=0)  # type: ignore[arg-type]
    passes = materials.task.before_step(materials.model, materials.batches.micro_batches(0))
    return stepper.step(passes, learning_rate=0.0).loss, seen


@pytest.mark.parametrize(("stage", "settings"), STAGES)
def test_passes_packing_and_padding_change_neither_loss_nor_gradients(tmp_path, stage, settings):
    ways = {
        "whole": [f"{stage}.micro_batch_tokens=9000"],
        "pair by pair": [f"{stage}.micro_batch_tokens=320"],
        "padded": [f"{stage}.micro_batch_tokens=900", "data.packing=false"],
    }
    loss, gradients = loss_and_gradients(tmp_path, stage, *settings, *ways.pop("whole"))
    assert math.isfinite(loss)
    for way in ways.values():
        other_loss, other = loss_and_gradients(tmp_path, stage, *settings, *way)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, atol=2e-5, rtol=1e-3)


def random_rows(lengths: list[int]) -> PreparedRows:
    random = np.random.default_rng(3)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(4, 300, borders[-1]).astype(np.int32)
    supervised = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    return PreparedRows(tokens, supervised, borders, [f"f#{i}" for i in range(len(lengths))])


def padded_left(batch: Batch) -> Batch:
    """The same rows with their padding on the left."""
    assert batch.mask_BT is not None
    width = batch.tokens_BT.shape[1]
    shifts = [width - length for length in batch.row_lengths]
    roll = lambda x: torch.stack([row.roll(shift) for row, shift in zip(x, shifts, strict=True)])  # noqa: E731
    mask_BT = roll(batch.mask_BT)
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    return replace(batch, tokens_BT=roll(batch.tokens_BT), positions_BT=positions_BT, mask_BT=mask_BT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_depends_on_its_row_only(tmp_path, family):
    lengths = [9, 30, 4, 17]
    rows, numbers, plan = random_rows(lengths), [0, 1, 2, 3], BatchPlan(8, 512, pad_multiple=16, pad_token=3)
    section = ModelSection(path=str(tiny_model_folder(tmp_path, family=family)))
    model = load_score_model(section, LoraSection(), Need(CPU, "fp32", longest_row=64))
    plain = load_score_model(section, LoraSection(), Need(CPU, "fp32", packing=False, longest_row=64))
    assert model.head.weight.dtype == torch.float32
    beside = collate_padded(rows, numbers, plan)
    with torch.no_grad():
        alone = torch.cat([row_scores(model, collate_packed(rows, [n], BatchPlan(8, 512)), 1) for n in numbers])
        found = {
            "packed": row_scores(model, collate_packed(rows, numbers, plan), 4),
            "right": row_scores(plain, beside, 4),
            "left": row_scores(plain, padded_left(beside), 4),
        }
    for scores in found.values():
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)
    assert len(set(alone.tolist())) == 4


def test_rows_are_interleaved_side_by_side():
    first, second = random_rows([3, 5, 2]), random_rows([4, 1, 6])
    both = interleaved([first, second])
    assert both.lengths.tolist() == [3, 4, 5, 1, 2, 6]
    for number, (side, row) in enumerate((side, row) for row in range(3) for side in (first, second)):
        mine = slice(both.borders[number], both.borders[number + 1])
        theirs = slice(side.borders[row], side.borders[row + 1])
        assert both.tokens[mine].tolist() == side.tokens[theirs].tolist()
        assert both.supervised[mine].tolist() == side.supervised[theirs].tolist()


def test_mismatched_rows_keep_their_prompt_and_take_another_answer():
    rows = random_rows([8, 10, 6, 12])
    other, begins = mismatched(rows, seed=1, longest=9), answer_begins(rows)
    assert answer_begins(other).tolist() == begins.tolist()
    assert other.lengths.max() <= 9
    for row in range(len(rows)):
        mine = rows.tokens[rows.borders[row] : rows.borders[row + 1]]
        theirs = other.tokens[other.borders[row] : other.borders[row + 1]]
        assert theirs[: begins[row]].tolist() == mine[: begins[row]].tolist()
        assert theirs[begins[row] :].tolist() != mine[begins[row] :][: len(theirs) - begins[row]].tolist()


def test_figures_of_scores_equal_a_few_lines_of_numpy():
    random = np.random.default_rng(0)
    chosen, rejected = random.normal(0.4, 1, 200), random.normal(0, 1, 200)
    tokens = random.integers(5, 60, 400)
    scored = Scored(
        torch.tensor(chosen), torch.tensor(rejected), torch.tensor(tokens[:200]), torch.tensor(tokens[200:]),
        ["a"] * 150 + ["b"] * 50,
    )  # fmt: skip
    found = score_figures(scored)
    scores = np.concatenate([chosen, rejected])
    assert found["accuracy"] == pytest.approx((chosen > rejected).mean())
    assert found["margin"] == pytest.approx((chosen - rejected).mean())
    assert found["length_correlation"] == pytest.approx(np.corrcoef(tokens, scores)[0, 1])
    assert found["length_slope"] == pytest.approx(100 * np.polyfit(tokens, scores, 1)[0])
    shorter = tokens[:200] < tokens[200:]
    assert found["accuracy_chosen_shorter"] == pytest.approx((chosen > rejected)[shorter].mean())
    assert found["by_source"]["a"]["total"] == 150
    gap = chosen - rejected
    sure, bins = 1 / (1 + np.exp(-np.abs(gap))), np.minimum((1 / (1 + np.exp(-np.abs(gap))) - 0.5) * 20, 9).astype(int)
    error = sum(abs(sure[bins == b].mean() - (gap > 0)[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert found["calibration_error"] == pytest.approx(error)
    assert calibration_error(torch.full((50,), 20.0)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.full((50,), -20.0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo"])
def test_pair_losses_equal_a_few_lines_of_numpy(loss):
    """The formulas as their papers write them, from log-probabilities and lengths alone."""
    random = np.random.default_rng(2)
    policy, reference = -random.uniform(5, 60, 12), -random.uniform(5, 60, 12)
    counts = random.integers(3, 40, 12).astype(float)
    section = DpoSection(loss=loss, beta=0.3)
    rows = Compared(RowLogps(torch.tensor(policy), torch.tensor(counts)), torch.tensor(reference))
    gain, mean = policy - reference, policy / counts

    def minus_log_sigmoid(x: np.ndarray) -> np.ndarray:
        return np.log1p(np.exp(-x))

    def log_odds(logp: np.ndarray) -> np.ndarray:
        return logp - np.log(1 - np.exp(logp))

    expected = {
        "dpo": minus_log_sigmoid(0.3 * (gain[::2] - gain[1::2])),
        "ipo": ((gain / counts)[::2] - (gain / counts)[1::2] - 1 / 0.6) ** 2,
        "simpo": minus_log_sigmoid(0.3 * (mean[::2] - mean[1::2]) - section.gamma),
        "orpo": -mean[::2] + section.odds_weight * minus_log_sigmoid(log_odds(mean[::2]) - log_odds(mean[1::2])),
    }
    assert float(PAIR_LOSSES[loss](rows, section)) == pytest.approx(expected[loss].sum(), rel=1e-5)


def test_a_tie_is_half_right() -> None:
    assert rightness(torch.tensor([0.3, 0.0, -0.2, 0.0])).tolist() == [1.0, 0.5, 0.0, 0.5]
    share = wilson(1.5, 3)
    assert share.score == 0.5
    assert 0 < share.low < 0.5 < share.high < 1
