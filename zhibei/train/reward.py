"""Reward models as a task of the offline loop: loss, held-out figures, what is written. Knows one method and no loop.

Dimensions: P pairs of a batch, R = 2 P rows (chosen, rejected, chosen, ...).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zhibei.config.run import RewardSection, RunFile
from zhibei.data.batches import Batch, Batches, collate_padded
from zhibei.data.pair_rows import answer_tokens
from zhibei.losses.reward import centring_sum, pair_loss_sum, tie_loss_sum
from zhibei.losses.tokens import TokenLoss
from zhibei.model.language_model import LanguageModel
from zhibei.model.locate import locate
from zhibei.model.ranks import current
from zhibei.model.save import write_weights
from zhibei.model.score_model import HEAD_TENSOR, load_score_model_for_inference, row_scores
from zhibei.text.tokenizer import load_hugging_face_tokenizer, load_tokenizer
from zhibei.train.beginning import tokenizer_place
from zhibei.train.finish import finite, place_to_read_back, proved, sync_files
from zhibei.train.score_figures import Scored, score_figures
from zhibei.train.step import LossSum, StepLoss
from zhibei.train.task import HeldoutFigures, Proof, Task

if TYPE_CHECKING:
    from zhibei.train.materials import Materials

PROBE_ITEMS = 4
PROBE_TEXT = "Name 3 colours: red, 绿色, naïve-blue 🙂."
HEAD_PLACE = {"name": HEAD_TENSOR, "reads": "the last token of a row, its terminator included"}
"""How the manifest describes the head."""


def reward_task(run: RunFile, _plain: TokenLoss) -> Task:
    """Scores of chosen answers above those of rejected ones."""
    section = run.reward
    return Task(
        unit="pair",
        step_loss=step_loss(section),
        plain_loss=plain_loss(section),
        evaluate=evaluate,
        write=write_score_model,
        prove=prove_score_model,
        described={"kind": "reward", "head": HEAD_PLACE},
    )


def pair_losses(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, margin_P: torch.Tensor, section: RewardSection
) -> torch.Tensor:
    """Sum over pairs, ties and margins as the run file says; `margin_P` is NaN where the data gives none."""
    is_tie_P = (margin_P == 0) if section.ties == "equal" else torch.zeros_like(margin_P, dtype=torch.bool)
    wanted_P = torch.nan_to_num(margin_P, nan=0.0) if section.margin else torch.zeros_like(margin_P)
    ordered = ~is_tie_P
    total = pair_loss_sum(chosen_P[ordered], rejected_P[ordered], margin_P=wanted_P[ordered])
    return total + tie_loss_sum(chosen_P[is_tie_P], rejected_P[is_tie_P])


def plain_loss(section: RewardSection) -> LossSum:
    """The loss without centring."""

    def loss_sum(model: LanguageModel, batch: Batch) -> torch.Tensor:
        chosen_P, rejected_P = sides(row_scores(model, batch, len(batch.row_numbers)))
        return pair_losses(chosen_P, rejected_P, batch.columns_I["margin"], section)

    return loss_sum


def step_loss(section: RewardSection) -> StepLoss:
    """The loss of a step, with accuracy and score gap of its pairs."""

    def loss_sum(model: LanguageModel, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        chosen_P, rejected_P = sides(row_scores(model, batch, len(batch.row_numbers)))
        total = pair_losses(chosen_P, rejected_P, batch.columns_I["margin"], section)
        if section.centring:
            total = total + section.centring * centring_sum(chosen_P, rejected_P)
        gap_P = (chosen_P - rejected_P).detach()
        return total, {"accuracy": (gap_P > 0).sum(), "margin": gap_P.sum()}

    return loss_sum


def sides(values_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of chosen and of rejected rows."""
    return values_R[0::2], values_R[1::2]


def all_scores(model: LanguageModel, batches: Batches, *, most_items: int) -> torch.Tensor:
    """Scores of the rows of the first `most_items` items, in their order, on the CPU."""
    num_rows = min(most_items, batches.num_items) * batches.plan.rows_per_item
    scores_R, is_known_R = torch.zeros(num_rows), torch.zeros(num_rows)
    was_training = model.hf.training
    model.hf.eval()
    with torch.no_grad():
        for batch in batches.all_rows(most_items):
            numbers = list(batch.row_numbers)
            scores_R[numbers] = row_scores(model, batch.to(model.device), len(numbers)).cpu()
            is_known_R[numbers] = 1
    model.hf.train(was_training)
    return current().put_together(scores_R, is_known_R)


def evaluate(materials: Materials, heldout: Batches) -> HeldoutFigures:
    """Held-out loss without centring, accuracy with its interval and by source, length bias, calibration."""
    started = time.monotonic()
    section = materials.run.reward
    scores_R = all_scores(materials.model, heldout, most_items=section.evaluate_rows)
    chosen_P, rejected_P = sides(scores_R)
    num_pairs = len(chosen_P)
    margin_P = torch.as_tensor(heldout.columns_I["margin"][:num_pairs])
    loss = float(pair_losses(chosen_P, rejected_P, margin_P, section)) / num_pairs
    tokens_R = torch.as_tensor(answer_tokens(heldout.rows)[: len(scores_R)])
    sources = [name.rsplit("#", 1)[0] for name in heldout.rows.row_ids[: len(scores_R) : 2]]
    scored = Scored(chosen_P, rejected_P, *sides(tokens_R), sources)
    return HeldoutFigures(loss, time.monotonic() - started, score_figures(scored))


def write_score_model(materials: Materials, folder: Path) -> None:
    """A folder that transformers (or PEFT) loads as a sequence classifier with one output, and its tokenizer.

    transformers finds the last token of a row as the last one that is not padding. So the padding token named in the
    folder is one that no row ends with: with EOS as padding, a row's own EOS would be passed over.
    """
    path, options = tokenizer_place(materials.run)
    tokenizer = load_hugging_face_tokenizer(path, **options)
    tokenizer.chat_template = materials.template.as_jinja()
    padding = padding_id(materials)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    materials.model.config.pad_token_id = padding
    write_weights(materials.model, folder, materials.whole)
    tokenizer.save_pretrained(str(folder))
    sync_files(folder)


def padding_id(materials: Materials) -> int:
    """The tokenizer's padding where no row ends with it, else another control token, else any id."""
    rows = materials.rows.train
    ends = {int(rows.tokens[border - 1]) for border in rows.borders[1:]}
    ends |= set(materials.tokenizer.stop_ids(materials.template.terminator))
    tokenizer = materials.tokenizer
    specials = [int(number) for number in tokenizer.is_special_id.nonzero()[0]]
    candidates = [tokenizer.pad_id, tokenizer.bos_id, *specials, *range(len(tokenizer))]
    return next(number for number in candidates if number is not None and number not in ends)


def prove_score_model(materials: Materials, folder: Path) -> list[Proof]:
    """Read the written model back and compare tensors, scores, tokenizer with the ones in memory."""
    model = materials.model
    base = locate(materials.run.model.path).weights if model.hf is not model.inner else None
    probe = materials.batches if materials.heldout is None else materials.heldout
    mine_R = probe_scores(model, probe)

    def read_back() -> LanguageModel:
        place, precision = place_to_read_back(materials)
        kind = materials.run.model.held_as
        return load_score_model_for_inference(str(folder), device=place, precision=precision, base=base, quantize=kind)

    def compare(again: LanguageModel) -> list[Proof]:
        difference = float((mine_R - probe_scores(again, probe)).abs().max())
        bound = 1e-4 if materials.precision == "fp32" else 5e-2 * max(1.0, float(mine_R.abs().max()))
        same = load_tokenizer(str(folder)).encode(PROBE_TEXT) == materials.tokenizer.encode(PROBE_TEXT)
        return [
            Proof("scores", difference <= bound, f"largest difference {difference:.3g}", difference),
            finite(again),
            Proof("tokenizer", same, "ids " + ("equal" if same else "differ")),
        ]

    return proved(model, read_back, compare, is_whole=base is None)


def probe_scores(model: LanguageModel, batches: Batches) -> torch.Tensor:
    """Scores of a few rows, one by one, as the model answers (no packing, so that any attention does)."""
    scores = []
    with torch.no_grad(), model.sampling():
        for number in range(min(PROBE_ITEMS, len(batches.rows))):
            batch = collate_padded(batches.rows, [number], batches.plan)
            scores.append(row_scores(model, batch.to(model.device), 1).float().cpu())
    return torch.cat(scores)
