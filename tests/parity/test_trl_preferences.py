"""Losses and gradients of reward models and of DPO and its kin equal TRL's own loss functions on the same rows.

What TRL 1.16 lacks or has otherwise: it has no plain cDPO (its `robust` divides by 1 - 2 e), so that is held against
the same formula in its CPO trainer; its ORPO takes the cross-entropy over prompt and answer and over all tokens of a
batch at once, so only the odds ratio is compared; its SimPO is the `simpo` loss of CPO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.parity.trl_pairs import (
    assert_same,
    chosen_first,
    ours,
    packed,
    padded,
    rows_of_pairs,
    two_folders,
)
from zhibei.config.preference import DpoSection, RewardSection
from zhibei.config.run import ModelSection
from zhibei.data.batches import Batch
from zhibei.losses.preference import kto_baseline
from zhibei.losses.tokens import TokenLoss
from zhibei.model.load import Need
from zhibei.model.score_model import load_whole_score_model
from zhibei.train.answer_logps import row_logps
from zhibei.train.preferences import judged_step, paired_step
from zhibei.train.reward import step_loss

trl = pytest.importorskip("trl", minversion="1.16", reason="needs TRL 1.16")
pytestmark = pytest.mark.parity
HEAD = TokenLoss()
ROWS, PROMPTS = rows_of_pairs()
NUM_PAIRS = len(ROWS) // 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_folders(tmp_path_factory.mktemp("trl"))


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 2,
    }  # fmt: skip


def with_reference(batch: Batch, folder: Path) -> Batch:
    """The batch with what the reference gives to each row."""
    with torch.no_grad():
        reference_R = row_logps(ours(folder), batch, HEAD).sums_R
    columns = {"reference_chosen": reference_R[0::2], "reference_rejected": reference_R[1::2], "reference": reference_R}
    return replace(batch, columns_I={**batch.columns_I, **columns})


def summed(outcome: Any) -> torch.Tensor:
    return outcome[0] if isinstance(outcome, tuple) else outcome


@pytest.mark.parametrize(
    ("section", "loss_type"), [({"loss": "dpo", "beta": 0.3}, "sigmoid"), ({"loss": "ipo", "beta": 0.3}, "ipo")]
)
def test_dpo_and_ipo(section: dict[str, Any], loss_type: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    from datasets import Dataset

    policy, reference = folders
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=trl.DPOConfig(loss_type=[loss_type], beta=0.3, **options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )
    model.eval()
    theirs = trainer.compute_loss(model, padded(chosen_first(ROWS), chosen_first(PROMPTS)))
    mine = ours(policy)
    batch = with_reference(packed(ROWS, PROMPTS), reference)
    loss = paired_step(DpoSection(**section), HEAD, has_reference=True)
    assert_same(summed(loss(mine, batch)) / NUM_PAIRS, mine, theirs, model)


def plain_logps(model: Any, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of chosen and rejected answers with transformers alone."""
    inputs = padded(ROWS, PROMPTS)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].float()
    logps = (
        logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * inputs["completion_mask"][:, 1:]
    )
    rows = logps.sum(1) / (inputs["completion_mask"].sum(1) if mean else 1)
    return rows[0::2], rows[1::2]


def cpo(**settings: Any) -> Callable[..., torch.Tensor]:
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    itself = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, **settings)
    return lambda chosen, rejected: trainer.cpo_loss(itself, chosen, rejected)[0].mean()


def orpo(**settings: Any) -> Callable[..., torch.Tensor]:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    itself = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    return lambda chosen, rejected: -chosen.mean() - trainer.odds_ratio_loss(itself, chosen, rejected)[0].mean()


SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0}
CONSERVATIVE = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1}
CASES = {
    "simpo": ({"beta": 2.0, "gamma": 0.5}, True, lambda: cpo(**SIMPO)),
    "orpo": ({"odds_weight": 0.2}, True, lambda: orpo(beta=0.2)),
    "dpo": ({"beta": 0.3, "label_smoothing": 0.1}, False, lambda: cpo(**CONSERVATIVE)),
}


@pytest.mark.parametrize("loss", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_simpo_orpo_and_conservative_dpo(loss: str, folders: tuple[Path, Path]) -> None:
    settings, mean, make = CASES[loss]
    policy, reference = folders
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    chosen, rejected = plain_logps(model, mean=mean)
    if loss == "dpo":
        with torch.no_grad():
            other = plain_logps(AutoModelForCausalLM.from_pretrained(reference).eval(), mean=False)
        chosen, rejected = chosen - other[0], rejected - other[1]
    theirs = make()(chosen, rejected)
    mine = ours(policy)
    batch = with_reference(packed(ROWS, PROMPTS), reference)
    step = paired_step(DpoSection(loss=loss, **settings), HEAD, has_reference=loss == "dpo")  # type: ignore[arg-type]
    assert_same(summed(step(mine, batch)) / NUM_PAIRS, mine, theirs, model)


def test_kto(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from datasets import Dataset

    policy, reference = folders
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(reference),
        args=trl.KTOConfig(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, **options(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)]),
    )
    model.eval()
    # Mismatched answers: each row's answer behind the next row's prompt.
    turned = [ROWS[n][: PROMPTS[n]] + ROWS[n - 1][PROMPTS[n - 1] :] for n in range(len(ROWS))]
    inputs: dict[str, Any] = {
        **padded(ROWS, PROMPTS),
        **{f"KL_{name}": value for name, value in padded(turned, PROMPTS).items()},
        "label": torch.tensor([True, False] * NUM_PAIRS),
    }
    theirs = trainer.compute_loss(model, inputs)
    mine = ours(policy)
    other = packed(turned, PROMPTS)
    with torch.no_grad():
        gain_A = row_logps(mine, other, HEAD).sums_R - row_logps(ours(reference), other, HEAD).sums_R
    batch = with_reference(packed(ROWS, PROMPTS), reference)
    columns = {
        "reference": batch.columns_I["reference"],
        "is_good": inputs["label"],
        "baseline": kto_baseline(gain_A)[None],
    }
    loss = judged_step(DpoSection(loss="kto", beta=0.3, good_weight=1.2, bad_weight=0.7), HEAD)
    assert_same(summed(loss(mine, replace(batch, columns_I=columns))) / len(ROWS), mine, theirs, model)


@pytest.mark.parametrize("settings", [{}, {"margin": True}, {"centring": 0.01}])
def test_reward_model(settings: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path) -> None:
    from datasets import Dataset

    policy, _ = folders
    torch.manual_seed(2)
    judge = tmp_path / "judge"
    scorer = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = 0
    scorer.save_pretrained(judge)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.save_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(center_rewards_coefficient=settings.get("centring"), **options(tmp_path)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"chosen": "a b", "rejected": "a c"}]),
    )
    model.eval()
    model.config.pad_token_id = 0
    margin = torch.tensor([0.5, 1.0, 0.0])
    inputs = padded(chosen_first(ROWS), chosen_first(PROMPTS))
    inputs.pop("completion_mask")
    if settings.get("margin"):
        inputs["margin"] = margin
    theirs = trainer.compute_loss(model, inputs)
    need = Need(device=torch.device("cpu"), precision="fp32", longest_row=64)
    mine = load_whole_score_model(str(judge), ModelSection(path=str(judge)), need)
    section = RewardSection(ties="as_pairs", **settings)
    batch = replace(packed(ROWS, PROMPTS), columns_I={"margin": margin})
    assert_same(summed(step_loss(section)(mine, batch)) / NUM_PAIRS, mine, theirs, model)
