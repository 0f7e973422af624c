"""The end of a run: the best weights, written as a model folder, read back and proved. Knows no loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zhibei.config.errors import RunStopped
from zhibei.model.across import as_whole, written_by_first
from zhibei.model.language_model import LanguageModel
from zhibei.model.load import load_for_inference
from zhibei.model.locate import locate
from zhibei.model.quantized import held_bytes
from zhibei.model.ranks import current
from zhibei.model.save import whole_tensors, write_weights
from zhibei.model.wording import add_stop_ids
from zhibei.store.checkpoint import load_checkpoint
from zhibei.store.files import write_json_atomic
from zhibei.store.folders import whole_folder
from zhibei.store.manifest import finish_manifest
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.store.shards import LazyTensor, Writable
from zhibei.text.tokenizer import load_hugging_face_tokenizer, load_tokenizer
from zhibei.train.beginning import tokenizer_place
from zhibei.train.opening import checkpoint_path
from zhibei.train.record import Recorder
from zhibei.train.resume import Progress, load_weights
from zhibei.train.task import Proof

if TYPE_CHECKING:
    from zhibei.train.materials import Materials

PROBE_TOKENS = 64


def finish(materials: Materials, run_dir: RunDir, progress: Progress, recorder: Recorder) -> None:
    """Write runs/NAME/model and prove it. Raises RunStopped (exit code 3) when a proof fails; the checkpoint stays."""
    chosen = progress.step
    best = checkpoint_path(run_dir, progress.best_step) if materials.run.training.keep_best else None
    if best is not None and progress.best_step != progress.step:
        groups, _ = load_checkpoint(best)
        load_weights(materials.model, groups["model"], where=best)
        chosen = progress.best_step or chosen
    write_finished(materials, run_dir)
    proofs = materials.task.prove(materials, run_dir.model)
    if current().is_first:
        write_json_atomic(run_dir.proofs, [asdict(proof) for proof in proofs])
    failed = [proof for proof in proofs if not proof.passed]
    if failed:
        recorder.event(progress.step, "stopped", f"proof failed: {failed[0].name}: {failed[0].detail}")
        raise RunStopped(
            f"the written model is not the trained one: {failed[0].name}: {failed[0].detail}",
            expected="the same tensors and logits after reading it back",
            fix=f"the checkpoints in {run_dir.checkpoints} are sound; report this with {run_dir.proofs}",
            where=str(run_dir.model),
        )
    if not current().is_first:
        return
    figures = {
        "steps": progress.step,
        "model_step": chosen,
        **best_of(materials, progress),
        "tokens": progress.tokens,
        "learned_tokens": progress.learned_tokens,
        "training_seconds": round(progress.seconds, 3),
        "heldout": heldout_of(run_dir, chosen),
    }
    finish_manifest(run_dir.path, figures)
    why = f" (best held-out {materials.task.judged_by})" if chosen != progress.step else ""
    recorder.event(
        progress.step,
        "finished",
        f"{run_dir.model} holds step {chosen}{why}",
        model_step=chosen,
    )


def write_finished(materials: Materials, run_dir: RunDir) -> None:
    """runs/NAME/model, whole or not at all; written by rank 0, with the parts that the others hold."""

    def write(tensors: Mapping[str, Writable]) -> None:
        with whole_folder(run_dir.model, purpose="the finished model") as folder:
            materials.task.write(replace(materials, whole=tensors), folder)

    written_by_first(current(), whole_tensors(materials.model), write)


def best_of(materials: Materials, progress: Progress) -> dict[str, float | None]:
    """The best held-out figure by its name; a reward is kept as a loss while the run goes on."""
    best = progress.best_loss
    if materials.task.judged_by == "reward":
        return {"best_heldout_reward": None if best is None else -best}
    return {"best_heldout_loss": best}


def heldout_of(run_dir: RunDir, step: int) -> dict[str, Any] | None:
    """Figures of the evaluation whose weights the model holds; later stages ask for them (a reward model's accuracy).
    None when there was none at that step."""
    kinds = ("heldout", "evaluation")
    found = [r for r in read_metrics(run_dir.metrics) if r.get("kind") in kinds and r.get("step") == step]
    left_out = ("kind", "step", "time", "is_best", "samples", "seconds")
    return {name: value for name, value in found[-1].items() if name not in left_out} if found else None


def write_model(materials: Materials, folder: Path) -> None:
    """The folder a run leaves: weights, tokenizer with its template, where answers end; all of it on the disk."""
    write_weights(materials.model, folder, materials.whole)
    write_tokenizer(materials, folder)
    add_stop_ids(folder, materials.tokenizer.stop_ids(materials.template.terminator))
    sync_files(folder)


def write_tokenizer(materials: Materials, folder: Path) -> None:
    """The tokenizer as transformers saves it, with the template this run trained on as its chat template."""
    path, options = tokenizer_place(materials.run)
    tokenizer = load_hugging_face_tokenizer(path, **options)
    tokenizer.chat_template = materials.template.as_jinja()
    tokenizer.save_pretrained(str(folder))


def sync_files(folder: Path) -> None:
    """Flush what other libraries wrote, before the folder gets its final name."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def prove(materials: Materials, folder: Path) -> list[Proof]:
    """Read the written model back and compare tensors, logits, tokenizer and template with the ones in memory."""
    model = materials.model
    tokens_BT = torch.as_tensor(probe_row(materials), device=materials.device)[None]
    with torch.no_grad(), model.sampling() as trained:
        mine = trained(tokens_BT, use_cache=False).logits.float().cpu()
    base = locate(materials.run.model.path).weights if model.hf is not model.inner else None

    def read_back() -> LanguageModel:
        place, precision = place_to_read_back(materials)
        kind = materials.run.model.held_as
        return load_for_inference(str(folder), device=place, precision=precision, base=base, quantize=kind)

    def compare(again: LanguageModel) -> list[Proof]:
        with torch.no_grad(), again.sampling() as loaded:
            theirs = loaded(tokens_BT.to(again.device), use_cache=False).logits.float().cpu()
        difference = (mine - theirs).abs().max().item()
        bound = 1e-4 if materials.precision == "fp32" else 5e-2 * max(1.0, mine.abs().max().item())
        written = load_tokenizer(str(folder))
        same = written.fingerprint == materials.tokenizer.fingerprint
        return [
            Proof("logits", difference <= bound, f"largest difference {difference:.3g}", difference),
            finite(again),
            Proof("tokenizer", same, "fingerprint " + ("equal" if same else "differs")),
        ]

    return proved(model, read_back, compare, is_whole=base is None)


def proved(
    model: LanguageModel,
    read_back: Callable[[], LanguageModel],
    compare: Callable[[LanguageModel], list[Proof]],
    *,
    is_whole: bool,
) -> list[Proof]:
    """The proofs of a written model, on every rank; read back and compared by rank 0, with the parts of the others."""
    learning = model.trainable()
    held = as_whole({name: p.data for name, p in learning.items()}, learning, dtype=model.dtype)

    def look(tensors: Mapping[str, Writable]) -> list[dict[str, Any]]:
        again = read_back()
        names = set(dict(model.hf.named_parameters()))
        proofs = [compare_tensors(tensors, names, again, is_whole=is_whole), *compare(again)]
        return [asdict(proof) for proof in proofs]

    return [Proof(**told) for told in written_by_first(current(), held, look)]


def finite(model: LanguageModel) -> Proof:
    """No weight of a model that was read back is NaN or infinite."""
    is_finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.hf.parameters())
    return Proof("finite", is_finite, "every weight is finite" if is_finite else "NaN or infinity in the weights")


def compare_tensors(
    trained: Mapping[str, Writable], names: set[str], read_back: LanguageModel, *, is_whole: bool
) -> Proof:
    """Every tensor that was trained is there with the same bits; `is_whole`: and there are no others than `names`."""
    theirs = dict(read_back.hf.named_parameters())

    def is_same(name: str, held: Writable) -> bool:
        value = held.read() if isinstance(held, LazyTensor) else held
        return name in theirs and torch.equal(value.to(theirs[name].data), theirs[name].data)

    differing = [name for name, held in trained.items() if not is_same(name, held)]
    return Proof(
        "tensors",
        not differing and (not is_whole or names == set(theirs)),
        f"{len(trained):,} trained tensors are equal bit for bit"
        if not differing
        else f"{len(differing)} tensors differ, e.g. {differing[0]}",
    )


def place_to_read_back(materials: Materials) -> tuple[str, str]:
    """Device and precision for a second copy of the model: where it trained if there is room, else the processor.

    A run on a full card must not die of its own proof. A processor has no fp16 arithmetic; fp32 holds fp16 exactly.
    """
    device = materials.device
    if device.type == "cuda":
        hf = materials.model.hf
        largest = max(parameter.numel() for parameter in hf.parameters())
        needed = held_bytes(hf) + 8 * largest
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] + unused < 1.1 * needed:
            return "cpu", "fp32" if materials.precision == "fp16" else materials.precision
    return str(device), materials.precision


def probe_row(materials: Materials) -> Any:
    rows = materials.rows.train
    return rows.tokens[: min(int(rows.borders[1]), PROBE_TOKENS)].astype("int64")
