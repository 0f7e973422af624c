"""Losses and gradients of GRPO, Dr. GRPO and RLOO equal TRL's own loss functions on the same answers and advantages.

What TRL 1.16 lacks or has otherwise: it has no PPO with a critic, no REINFORCE++ and no RAFT. By default it weighs the
KL to the reference by the ratio, which arXiv:2402.03300, eq. 3, does not, and which is switched off here. Its RLOO
weighs whole answers by the ratio of their probabilities, ours every token by its own; at the first step (ratio 1) the
gradients are the same but for the longest answer's length, which ours divides by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity.trl_pairs import (
    PLAN,
    as_rows,
    assert_same,
    assert_same_gradients,
    gradients,
    ours,
    rows_of_pairs,
    two_folders,
)
from zhibei.config.policy import GrpoSection
from zhibei.losses.policy import GROUP_ADVANTAGES
from zhibei.model.language_model import LanguageModel
from zhibei.train.experience import Experience, on_grid
from zhibei.train.grpo import weights_of
from zhibei.train.policy_loss import head_of, log_probabilities, policy_loss, shape_of

trl = pytest.importorskip("trl", minversion="1.16", reason="needs TRL 1.16")
pytestmark = pytest.mark.parity
ROWS, PROMPTS = rows_of_pairs()
LENGTHS = [len(row) - prompt for row, prompt in zip(ROWS, PROMPTS, strict=True)]
MASK_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
TEMPERATURE, LONGEST = 0.8, 12
GRADES_QG = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 0.3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_folders(tmp_path_factory.mktemp("trl"))[0]


def theirs_of(kind: str, folder: Path, out: Path, **settings: Any) -> tuple[Any, Any]:
    """TRL's trainer and its model."""
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = {"GRPO": trl.GRPOConfig, "RLOO": trl.RLOOConfig}[kind]
    trainer = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}[kind](
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(
            output_dir=str(out), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, num_generations=2,
            per_device_train_batch_size=2, gradient_checkpointing=False, temperature=TEMPERATURE,
            max_completion_length=LONGEST, **settings,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]),
    )  # fmt: skip
    model.eval()
    return trainer, model


def inputs_of(advantages_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, answers on the right."""
    widest = max(PROMPTS)
    prompts = [[*[0] * (widest - prompt), *row[:prompt]] for row, prompt in zip(ROWS, PROMPTS, strict=True)]
    answers = [
        [*row[prompt:], *[0] * (MASK_BT.shape[1] - len(row) + prompt)]
        for row, prompt in zip(ROWS, PROMPTS, strict=True)
    ]
    return {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": (torch.arange(widest) >= widest - torch.tensor(PROMPTS)[:, None]).long(),
        "completion_ids": torch.tensor(answers),
        "completion_mask": MASK_BT.long(),
        "advantages": advantages_B,
    }


def logps_of(model: LanguageModel) -> torch.Tensor:
    def compute(batch: Any) -> torch.Tensor:
        return log_probabilities(model, batch, head_of(model), TEMPERATURE)[0]

    return on_grid(as_rows(ROWS, PROMPTS), MASK_BT, PLAN, compute)


def our_loss(model: LanguageModel, section: GrpoSection, figures: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of one step over all answers."""
    weights_BT, units_B = weights_of(MASK_BT, section)
    experience = Experience(as_rows(ROWS, PROMPTS), MASK_BT, figures, weights_BT, units_B)
    in_loss = section.kl_coefficient if section.method in ("grpo", "dr_grpo") else 0.0
    loss = policy_loss(shape_of(section, model, kl_in_loss=in_loss))
    passes = experience.passes(range(len(ROWS)), PLAN)
    outcomes = [loss(model, batch) for batch in passes]
    sums = [outcome[0] if isinstance(outcome, tuple) else outcome for outcome in outcomes]
    return torch.stack(sums).sum() / sum(batch.num_units for batch in passes)


def section_of(method: Any, kl_coefficient: float) -> GrpoSection:
    return GrpoSection(
        method=method, kl_coefficient=kl_coefficient, temperature=TEMPERATURE, max_new_tokens=LONGEST, clip_high=0.28
    )


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("method", ["grpo", "dr_grpo"])
def test_grpo_and_dr_grpo(method: str, kl_coefficient: float, folder: Path, tmp_path: Path) -> None:
    trainer, model = theirs_of(
        "GRPO", folder, tmp_path, loss_type=method, beta=kl_coefficient, epsilon=0.2, epsilon_high=0.28,
        use_bias_correction_kl=False,
    )  # fmt: skip
    mine = ours(folder)
    advantages_B = GROUP_ADVANTAGES[method](GRADES_QG).view(-1)
    generator = torch.Generator().manual_seed(4)
    # The policy has moved since the answers were written, some tokens beyond the bounds of the ratio.
    old_BT, reference_BT = (logps_of(mine) + 0.3 * torch.randn(MASK_BT.shape, generator=generator) for _ in range(2))
    inputs = inputs_of(advantages_B)
    inputs |= {"old_per_token_logps": old_BT, "ref_per_token_logps": reference_BT}
    theirs = trainer._compute_loss(model, inputs)
    figures = {"old_logps": old_BT, "reference": reference_BT, "advantages": advantages_B[:, None] * MASK_BT}
    assert_same(our_loss(mine, section_of(method, kl_coefficient), figures), mine, theirs, model)


def test_rloo_at_the_first_step(folder: Path, tmp_path: Path) -> None:
    trainer, model = theirs_of("RLOO", folder, tmp_path, beta=0.0)
    mine = ours(folder)
    advantages_B = GROUP_ADVANTAGES["rloo"](GRADES_QG).view(-1)
    others_B = torch.stack([GRADES_QG[:, 1], GRADES_QG[:, 0]], dim=1).view(-1)
    torch.testing.assert_close(advantages_B, GRADES_QG.view(-1) - others_B)
    old_BT = logps_of(mine)
    theirs = trainer._compute_loss(model, {**inputs_of(advantages_B), "old_logps": (old_BT * MASK_BT).sum(dim=1)})
    theirs.backward()
    figures = {"old_logps": old_BT, "advantages": advantages_B[:, None] * MASK_BT}
    (our_loss(mine, section_of("rloo", 0.0), figures) * LONGEST).backward()
    assert_same_gradients(gradients(mine.hf), gradients(model))
