"""The reference of a preference run: where its log-probabilities come from, that they are right, and how they are kept.

Knows log-probabilities of rows, not losses. Dimensions: R rows, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from zhibei.config.errors import RunStopped, UserError
from zhibei.config.run import RunFile
from zhibei.data.batches import Batch, Batches
from zhibei.data.pair_rows import mismatched
from zhibei.losses.preference import kto_baseline
from zhibei.losses.tokens import TokenLoss
from zhibei.model.language_model import LanguageModel
from zhibei.store.files import read_json, sha256_of, write_json_atomic
from zhibei.store.folders import whole_folder
from zhibei.store.run_dir import RunDir
from zhibei.store.shards import read_tensors, save_tensors
from zhibei.train.answer_logps import all_row_logps, row_logps

if TYPE_CHECKING:
    from zhibei.train.materials import Materials

NUDGE = 0.05
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest difference of log-probabilities that are the same but for rounding, as a share of their size."""
FILE = "reference.safetensors"


def uses_adapters_off(run: RunFile) -> bool:
    """Whether the reference is the base under the adapters: only fresh adapters learn, or the run file says so."""
    if run.dpo.reference != "auto":
        return run.dpo.reference == "adapters_off"
    return run.model.method != "full" and run.lora.adapter is None and not run.lora.modules_to_save


def make_prepare(shape: TokenLoss, *, adapters_off: bool) -> Callable[[Materials, RunDir, int], Materials]:
    """What a run needs to know of its reference before its first step; a resumed run finds it in its directory."""

    def prepare(materials: Materials, run_dir: RunDir, step: int) -> Materials:
        sets = reference_sets(materials)
        # With adapters off the training rows are asked when their turn comes, and nothing has to be kept.
        wanted = {name: rows for name, rows in sets.items() if not (adapters_off and name.startswith("train"))}
        if adapters_off:
            with materials.model.without_adapters():
                found = computed(materials.model, wanted, shape)
        elif run_dir.reference.is_dir():
            found = read_reference(run_dir, materials.rows.key, wanted)
        elif step:
            raise UserError(
                "the reference log-probabilities of the run are gone, and its weights have moved on",
                expected=f"{run_dir.reference}, which the run wrote before its first step",
                fix="put the folder back, or start a new run",
                where=str(run_dir.path),
            )
        else:
            found = computed(materials.model, wanted, shape)
            write_reference(run_dir, materials.rows.key, found)
        materials = carrying(materials, sets, found)
        if "train_mismatched" not in sets:
            return materials
        others = with_reference(sets["train_mismatched"], found.get("train_mismatched"))
        return replace(materials, task=replace(materials.task, before_step=step_baseline(others, shape)))

    return prepare


def reference_sets(materials: Materials) -> dict[str, Batches]:
    """The sets whose rows the reference is asked about."""
    sets = {"train": materials.batches}
    if materials.heldout is not None:
        sets["heldout"] = materials.heldout
    if materials.run.dpo.loss == "kto":
        sets |= {f"{name}_mismatched": other_answers(materials, batches) for name, batches in list(sets.items())}
    return sets


def other_answers(materials: Materials, batches: Batches) -> Batches:
    """The same prompts, each with an answer to another one."""
    run = materials.run
    rows = mismatched(batches.rows, seed=run.seed, longest=run.data.max_tokens)
    return Batches(rows, batches.plan)


def computed(model: LanguageModel, sets: Mapping[str, Batches], shape: TokenLoss) -> dict[str, torch.Tensor]:
    """Log-probabilities of all rows of each set under the model as it is now."""
    return {
        name: all_row_logps(model, batches, shape, most_items=batches.num_items).sums_R
        for name, batches in sets.items()
    }


def carrying(materials: Materials, sets: Mapping[str, Batches], found: Mapping[str, torch.Tensor]) -> Materials:
    """The materials whose batches carry what the reference gave their rows, where that is known beforehand."""
    known = {name: with_reference(batches, found.get(name)) for name, batches in sets.items()}
    return replace(
        materials,
        batches=known["train"],
        heldout=known.get("heldout"),
        mismatched_heldout=known.get("heldout_mismatched"),
    )


def with_reference(batches: Batches, sums_R: torch.Tensor | None) -> Batches:
    """The same steps, whose batches carry one value per item and side."""
    if sums_R is None:
        return batches
    values_R = sums_R.numpy()
    if batches.plan.rows_per_item == 1:
        return batches.with_columns({"reference": values_R})
    return batches.with_columns(
        {"reference_chosen": values_R[0::2].copy(), "reference_rejected": values_R[1::2].copy()}
    )


def step_baseline(others: Batches, shape: TokenLoss) -> Callable[[LanguageModel, Sequence[Batch]], Sequence[Batch]]:
    """KTO's baseline: a mean over all answers of the step, however they are cut into passes (arXiv:2402.01306, 4.2)."""

    def before_step(model: LanguageModel, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        gains = []
        with torch.no_grad():
            for batch in micro_batches:
                other = others.batch_of(batch.row_numbers).to(model.device)
                reference_R = reference_rows(model, other, shape)
                gains.append(row_logps(model, other, shape).sums_R - reference_R)
        baseline = kto_baseline(torch.cat(gains)).cpu()
        return [
            replace(batch, columns_I={**batch.columns_I, "baseline": baseline.expand(len(batch.row_numbers))})
            for batch in micro_batches
        ]

    return before_step


def reference_rows(model: LanguageModel, batch: Batch, shape: TokenLoss) -> torch.Tensor:
    """log pi_ref of each row: what the batch carries, else computed with adapters off."""
    columns = batch.columns_I
    if "reference" in columns:
        return columns["reference"]
    if "reference_chosen" in columns:
        return torch.stack([columns["reference_chosen"], columns["reference_rejected"]], dim=1).reshape(-1)
    with torch.no_grad(), model.without_adapters():
        return row_logps(model, batch, shape).sums_R


def write_reference(run_dir: RunDir, key: str, found: Mapping[str, torch.Tensor]) -> None:
    """Keep the log-probabilities by row, whole or not at all."""
    with whole_folder(run_dir.reference, purpose="the reference log-probabilities") as folder:
        written = save_tensors(folder, found, stem="reference")
        write_json_atomic(folder / "index.json", {"prepared_key": key, "sha256": written[0].sha256})


def read_reference(run_dir: RunDir, key: str, sets: Mapping[str, Batches]) -> dict[str, torch.Tensor]:
    """What `write_reference` kept. Raises UserError when it is damaged or belongs to other rows."""
    index = read_json(run_dir.reference / "index.json")
    file = run_dir.reference / FILE
    is_sound = file.is_file() and sha256_of(file) == index.get("sha256")
    if not is_sound or index.get("prepared_key") != key:
        raise UserError(
            "the reference log-probabilities of the run " + ("belong to other rows" if is_sound else "are damaged"),
            expected="the folder as the run wrote it before its first step",
            fix="put it back from a copy, or start a new run",
            where=str(run_dir.reference),
        )
    tensors = read_tensors(run_dir.reference, stem="reference")
    return {name: tensors[name] for name in sets}


def probe_reference(shape: TokenLoss, *, adapters_off: bool) -> Callable[[Materials], None]:
    """Policy and reference agree before the first step, and the reference stays where it is when the policy moves.

    Else the margin would be 0 for ever, or its zero somewhere else; nothing would fail, and nothing would be learned.
    """

    def probe(materials: Materials) -> None:
        model = materials.model
        batch = materials.batches.micro_batches(0)[0].to(model.device)
        policy_R, reference_R = _both(model, batch, shape)
        difference, size = float((policy_R - reference_R).abs().max()), max(1.0, float(policy_R.abs().max()))
        if difference > BOUNDS[materials.precision] * size:
            raise _stopped(
                f"before the first step policy and reference differ by {difference:.3g} nats: the reference is not "
                "what the run starts from"
            )
        if not adapters_off:
            return
        with nudged(model):
            moved_R, still_R = _both(model, batch, shape)
        if not torch.equal(still_R, reference_R):
            raise _stopped("the reference moves with the policy: something outside of the adapters learns")
        if torch.equal(moved_R, policy_R):
            raise _stopped("the policy does not depend on what learns: with adapters on or off it is the same")

    return probe


def _both(model: LanguageModel, batch: Batch, shape: TokenLoss) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return row_logps(model, batch, shape).sums_R, reference_rows(model, batch, shape)


@contextmanager
def nudged(model: LanguageModel) -> Iterator[None]:
    """Every parameter that learns is another one inside, and bit for bit as before afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in model.trainable().items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in model.trainable().values():
                noise = torch.randn(parameter.shape, generator=generator) * NUDGE
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                parameter.copy_(before[name])


def _stopped(what: str) -> RunStopped:
    return RunStopped(
        what,
        expected="a reference that is the model the run starts from, and stays it",
        fix="set dpo.reference: precomputed; if it stays, report it with the run file",
        where="dpo.reference",
    )
