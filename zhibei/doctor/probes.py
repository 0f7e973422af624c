"""The probes of a rehearsal: small experiments with the real model. Knows materials and batches, not files or screens.

Each takes the scene and returns what it saw, and what is wrong as (pitfall id, finding). Dimensions as in data.batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from zhibei.data.batches import Batch, Batches, collate_packed, collate_padded
from zhibei.doctor.hard_items import hardest
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.scene import Scene, Seen, evaluating, scene_worst
from zhibei.doctor.worst import worst_heldout
from zhibei.store.run_dir import RunDir
from zhibei.train.materials import Materials
from zhibei.train.step import NonFiniteStep, StepRecord, checksums

MOST_SKIPS = 20
GUESSING = 0.97
NEAR_GUESSING = 0.8
SUM_BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""The same for sums of losses."""


def find_worst(scene: Scene) -> Seen:
    """Which batches are the hardest."""
    scene.materials, worst = hardest(scene.materials, RunDir(scene.folder), step=0)
    scene.worst = worst
    figures = {"tokens_in_one_pass": worst.tokens, "longest_row": worst.longest, "most_passes": worst.passes}
    return Seen(worst.text, figures=figures)


def zero_rate(scene: Scene) -> Seen:
    """A step at learning rate 0 on the worst batch changes no bit of any weight."""
    stepper = scene.materials.stepper
    stepper.remember_weights()
    record, problems = _step(scene, scene_worst(scene).first, rate=0.0)
    if record is None:
        return Seen("no step was possible", problems)
    scene.first_loss = record.loss
    look = stepper.look()
    changed = look["parameters"] - look["unchanged"]
    if changed:
        problems.append(
            ("", Finding(
                what=f"a step at learning rate 0 changed {changed:,} of {look['parameters']:,} parameters",
                where="model.precision",
                to_do="set model.precision: fp32 and try again; if it stays, report it",
            ))
        )  # fmt: skip
    return Seen(f"loss {record.loss:.4f}, {look['unchanged']:,} parameters unchanged", problems, {"loss": record.loss})


def first_loss(scene: Scene) -> Seen:
    """A trained model predicts better than guessing. An untrained one (all norms still 1) may guess."""
    loss, model = scene.first_loss, scene.materials.model
    vocabulary = int(model.head.weight.shape[0])
    chance = math.log(vocabulary)
    if loss is None:
        return Seen("not known: no step was possible")
    figures = {"loss": loss, "ln_vocabulary": chance}
    detail = f"{loss:.3f} before any update; guessing has ln({vocabulary}) = {chance:.3f}"
    if loss < NEAR_GUESSING * chance:
        return Seen(detail, figures=figures)
    if _is_untrained(model):
        return Seen(f"{detail}; the model is untrained, so this is as it should be", figures=figures)
    level = "stop" if loss >= GUESSING * chance else "warning"
    finding = Finding(
        what=f"before any update the loss is {loss:.3f}; guessing among {vocabulary:,} tokens has {chance:.3f}",
        where="model.path",
        to_do="check that weights, config.json and tokenizer belong together and that the weights were read whole "
        "(zhibei verify); with another language or format of data than the model knows, set accept",
        level=level,
    )
    return Seen(detail, [("fsdp-init-random-instead-of-pretrained", finding)], figures)


def packing(scene: Scene) -> Seen:
    """A row gives the same logits among others (packed or padded) as alone."""
    import torch

    materials = scene.materials
    numbers = _short_rows(materials)
    if len(numbers) < 2:
        return Seen("one row only: nothing to compare")
    model, place = materials.model, len(numbers) // 2
    together, alone = _collated(materials, numbers), _collated(materials, numbers[place : place + 1])
    with torch.no_grad(), evaluating(model.hf):
        among = model.logits(_row_hidden(model, together, place))
        single = model.logits(_row_hidden(model, alone, 0))
    difference, scale = float((among - single).abs().max()), max(1.0, float(single.abs().max()))
    how = "packed" if materials.run.data.packing else "padded"
    detail = f"{len(numbers)} rows {how}: largest difference of logits {difference:.2g}"
    if difference <= scene.bound * scale:
        return Seen(detail, figures={"difference": difference})
    finding = Finding(
        what=f"a row's logits differ by {difference:.3g} when other rows stand beside it",
        where="data.packing" if materials.run.data.packing else "model.attention",
        to_do="set data.packing: false" if materials.run.data.packing else "set model.attention: eager",
        evidence=(f"rows {', '.join(materials.rows.train.row_ids[number] for number in numbers)}",),
    )
    return Seen(detail, [("packing-cross-contamination", finding)], {"difference": difference})


def split(scene: Scene) -> Seen:
    """The loss is the same sum however rows are cut into passes."""
    import torch

    materials = scene.materials
    model, loss_sum = materials.model, materials.task.plain_loss
    numbers = _short_rows(materials) if materials.task.unit == "token" else _short_items(materials)
    with torch.no_grad(), evaluating(model.hf):
        together = materials.task.before_step(model, [materials.batches.batch_of(numbers)])
        parts = materials.task.before_step(model, [materials.batches.batch_of([number]) for number in numbers])
        whole = sum(float(loss_sum(model, part.to(model.device))) for part in together)
        cut = sum(float(loss_sum(model, part.to(model.device))) for part in parts)
    share = abs(whole - cut) / max(abs(whole), 1e-9)
    named = f"{len(numbers)} {'rows' if materials.task.unit == 'token' else 'items'}"
    detail = f"{named} in one pass and one by one: {share:.1e} apart"
    if share <= SUM_BOUNDS[materials.precision]:
        return Seen(detail, figures={"difference": share})
    finding = Finding(
        what=f"{named} have a loss of {whole:.5g} in one pass and of {cut:.5g} one by one",
        where=f"{materials.run.stage}.micro_batch_tokens",
        to_do="set data.packing: false and model.attention: eager; if it stays, report this model family",
    )
    return Seen(detail, [("", finding)], {"difference": share})


def two_steps(scene: Scene) -> Seen:
    """Two real steps at the full rate: every parameter is reached by a gradient, and changes."""
    materials = scene.materials
    stepper, worst = materials.stepper, scene_worst(scene)
    rate = materials.run.training.learning_rate or 0.0
    before = state_sums(materials)
    stepper.remember_weights()
    problems: list[tuple[str, Finding]] = []
    losses = []
    for batches in (worst.first, worst.second):
        record, found = _step(scene, batches, rate=rate)
        problems += found
        if record is None:
            return Seen("a step was not possible", problems)
        losses.append(record.loss)
    scene.step_loss = losses[0]
    if not _is_random(materials) and scene.first_loss is not None:
        problems += _same_loss(scene.first_loss, losses[0])
    look = stepper.look()
    unreached = set(look["without_gradient_names"]) if look["without_gradient"] else set()
    if look["without_gradient"]:
        problems.append(
            ("gc-lora-silent-partial-training", Finding(
                what=f"{look['without_gradient']:,} of {look['parameters']:,} parameters that should learn got no "
                f"gradient, e.g. {look['without_gradient_names'][0]}",
                where="model.activation_checkpointing",
                to_do="set model.activation_checkpointing: none, or leave these layers out (lora.targets)",
                evidence=tuple(look["without_gradient_names"]),
            ))
        )  # fmt: skip
    after = state_sums(materials)
    still = [name for name in before if before[name] == after[name] and name not in unreached]
    if still and not look["without_gradient"] > len(unreached):
        problems.append(
            ("ds-fp16-all-steps-skipped", Finding(
                what=f"two steps at rate {rate:.3g} left {len(still):,} parameters as they were, e.g. {still[0]}",
                where=f"{materials.run.stage}.learning_rate",
                to_do=f"raise the learning rate, or set {materials.run.stage}.optimizer: adamw",
                evidence=tuple(still[:8]),
            ))
        )  # fmt: skip
    moved = len(before) - len(still)
    return Seen(f"losses {losses[0]:.4f}, {losses[1]:.4f}; {moved:,} of {len(before):,} parameters moved", problems,
                {"losses": losses, "moved": moved})  # fmt: skip


def adapters(scene: Scene) -> Seen:
    """Two tensors for each target layer, none of them empty, and no lora_B still at zero."""
    model = scene.materials.model
    if model.hf is model.inner:
        return Seen("no adapters in this run")
    layers = [name for name, module in model.hf.named_modules() if getattr(module, "lora_A", None)]
    tensors = {name: p for name, p in model.trainable().items() if ".lora_A." in name or ".lora_B." in name}
    problems: list[tuple[str, Finding]] = []

    def wrong(what: str, to_do: str, names: Sequence[str]) -> None:
        finding = Finding(what=what, where="lora.targets", to_do=to_do, evidence=tuple(names[:8]))
        problems.append(("zero3-lora-empty-adapter", finding))

    if not layers or len(tensors) != 2 * len(layers):
        wrong(
            f"{len(tensors)} adapter tensors learn for {len(layers)} target layers, two each were expected",
            "look at lora.targets; a frozen adapter of lora.adapter may have been loaded",
            layers,
        )
    if empty := [name for name, tensor in tensors.items() if tensor.numel() == 0]:
        wrong(f"{len(empty)} adapter tensors are empty", "train without sharding of frozen weights", empty)
    if idle := [name for name, tensor in tensors.items() if ".lora_B." in name and not bool(tensor.any())]:
        wrong(
            f"after two steps {len(idle)} lora_B tensors are all zero, e.g. {idle[0]}: these adapters learn nothing",
            "raise the learning rate, or take these layers out of lora.targets",
            idle,
        )
    return Seen(f"{len(tensors)} tensors on {len(layers)} layers", problems, {"tensors": len(tensors)})


def evaluation(scene: Scene) -> Seen:
    """One evaluation pass over the longest held-out rows."""
    import torch

    materials = scene.materials
    if materials.heldout is None:
        return Seen("no held-out rows in this run")
    if materials.task.unit != "token":
        return _judged_evaluation(materials, materials.heldout)
    batch = worst_heldout(materials.heldout)
    with torch.no_grad(), evaluating(materials.model.hf):
        total = float(materials.task.plain_loss(materials.model, batch.to(materials.model.device)))
    loss = total / max(1, batch.num_units)
    detail = f"{batch.tokens_BT.numel():,} tokens, loss {loss:.4f}"
    if math.isfinite(loss):
        return Seen(detail, figures={"loss": loss})
    names = [materials.rows.heldout.row_ids[number] for number in batch.row_numbers]
    return Seen(detail, [("", _not_finite(f"the held-out loss of the longest rows is {loss}", names))])


def _judged_evaluation(materials: Materials, heldout: Batches) -> Seen:
    """Pairs and judged answers are evaluated together: accuracy and margins are figures of all of them."""
    seen = materials.task.evaluate(materials, heldout)
    detail = f"{heldout.num_items} of the longest held-out items, loss {seen.loss:.4f}"
    if math.isfinite(seen.loss):
        return Seen(detail, figures={"loss": seen.loss})
    return Seen(detail, [("", _not_finite(f"the held-out loss of the longest is {seen.loss}", heldout.rows.row_ids))])


def reference(scene: Scene) -> Seen:
    """Policy and reference are one before the first step, and the reference stays when the policy moves."""
    scene.materials.task.probe(scene.materials)
    return Seen("the reference is what the run starts from, and stays it")


def _not_finite(what: str, row_ids: Sequence[str]) -> Finding:
    return Finding(
        what=what,
        where=row_ids[0],
        to_do="set model.precision: bf16 or fp32; look at the rows with zhibei data show",
        evidence=tuple(row_ids[:8]),
    )


def state_sums(materials: Materials) -> dict[str, tuple[int, ...]]:
    """One number per learning parameter and its fp32 master, so that updates below bf16's spacing are seen too."""
    parameters = dict(materials.model.trainable())
    masters = {
        name: tensor
        for name, tensor in materials.stepper.optimizer.tensors().items()
        if name.endswith(("::low", "::master"))
    }
    own = checksums(parameters).tolist()
    theirs = dict(zip(masters, checksums(masters).tolist(), strict=True)) if masters else {}
    return {
        name: (value, *(theirs[key] for key in (f"{name}::low", f"{name}::master") if key in theirs))
        for name, value in zip(parameters, own, strict=True)
    }


def _step(scene: Scene, batches: list[Batch], *, rate: float) -> tuple[StepRecord | None, list[tuple[str, Finding]]]:
    """One step; with fp16 as many tries as the loss scale needs to settle."""
    materials = scene.materials
    try:
        for _ in range(MOST_SKIPS):
            passes = materials.task.before_step(materials.model, batches)
            record = materials.stepper.step(passes, learning_rate=rate)
            if not record.was_skipped:
                return record, []
    except NonFiniteStep as problem:
        rows = [materials.batches.rows.row_ids[number] for number in problem.row_numbers]
        finding = _not_finite(f"{problem.what} on the worst batch", rows)
        return None, [("fp16-on-bf16-pretrained-nan" if materials.precision == "fp16" else "", finding)]
    finding = Finding(
        what=f"all of {MOST_SKIPS} steps were skipped: gradients overflow at every loss scale",
        where="model.precision",
        to_do="set model.precision: bf16 where the GPU has it, else fp32",
    )
    return None, [("ds-fp16-all-steps-skipped", finding)]


def _same_loss(first: float, again: float) -> list[tuple[str, Finding]]:
    if abs(first - again) <= 1e-3 * max(1.0, abs(first)):
        return []
    finding = Finding(
        what=f"the same batch with the same weights had a loss of {first:.5g} and then of {again:.5g}",
        where="model.precision",
        to_do="set model.precision: fp32 and compile: false to see which of them it is, and report it",
    )
    return [("fp16-bf16-llama-neox-wrong-weights-map", finding)]


def _is_random(materials: Materials) -> bool:
    """Dropout or noise: the same batch has another loss each time."""
    import torch

    dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in materials.model.hf.modules())
    config = materials.model.config.to_dict()
    attention = any(_is_rate(value) and value > 0 for key, value in config.items() if key.endswith("dropout"))
    return dropout or attention or materials.run.sft.neftune_alpha > 0


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_untrained(model: Any) -> bool:
    """Every norm still has the constant it was made with; training moves them in its first steps."""
    norms = [
        p.detach() for name, p in model.inner.named_parameters() if p.ndim == 1 and "norm" in name and "weight" in name
    ]
    return bool(norms) and all(float(norm.min()) == float(norm.max()) and float(norm.max()) in (0, 1) for norm in norms)


def _short_rows(materials: Materials) -> list[int]:
    """Three short rows that learn something and fit into one pass together."""
    rows, budget = materials.rows.train, materials.batches.plan.micro_batch_tokens
    chosen: list[int] = []
    total = 0
    for number in np.argsort(rows.lengths, kind="stable")[len(rows) // 10 :]:
        part = slice(int(rows.borders[number]), int(rows.borders[number + 1]))
        if len(chosen) == 3 or total + int(rows.lengths[number]) > budget // 2:
            break
        if rows.supervised[part][1:].any():
            chosen.append(int(number))
            total += int(rows.lengths[number])
    return chosen


def _short_items(materials: Materials) -> list[int]:
    """A few short items that fit into one pass together."""
    lengths, plan = materials.batches.item_lengths, materials.batches.plan
    shortest = np.argsort(lengths, kind="stable")[:3]
    room = plan.micro_batch_tokens // (1 if plan.packing else plan.rows_per_item)
    return [int(n) for n in shortest[: max(1, min(3, room // max(1, int(lengths[shortest].max()))))]]


def _collated(materials: Materials, numbers: Sequence[int]) -> Batch:
    collate = collate_packed if materials.run.data.packing else collate_padded
    return collate(materials.rows.train, list(numbers), materials.batches.plan)


def _row_hidden(model: Any, batch: Batch, place: int) -> Any:
    """Hidden states of one row of a batch."""
    hidden_ND = model.hidden(batch.to(model.device))
    length = batch.row_lengths[place]
    start = sum(batch.row_lengths[:place]) if batch.borders is not None else place * batch.tokens_BT.shape[1]
    return hidden_ND[start : start + length]
