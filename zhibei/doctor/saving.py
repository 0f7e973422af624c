"""What a rehearsal saves and measures, and what a new process is to find. Knows materials, not experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.resolve import write_resolved
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.scene import Scene, Seen, scene_worst
from zhibei.plan.memory import MemoryPlan
from zhibei.store.files import write_json_atomic
from zhibei.text.messages import Message
from zhibei.train.beginning import run_dir_of
from zhibei.train.finish import probe_row
from zhibei.train.materials import Materials

PROBE_TEXT = "Name 3 colours: red, 绿色, naïve-blue 🙂."
GIB = 2.0**30
SMALL_FILES = 2**20
MOST_OF_THE_CARD = 0.95


def _tokens(scene: Scene) -> str:
    return f"{scene.materials.run.stage}.micro_batch_tokens"


def memory(scene: Scene) -> Seen:
    """The most GPU memory that was held, against the card and against the plan."""
    import torch

    device = scene.materials.device
    if device.type != "cuda":
        return Seen("not measured: this run computes on the CPU")
    peak = torch.cuda.max_memory_reserved(device) / GIB
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    figures: dict[str, Any] = {"measured_gib": peak, "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB}
    plan = plan_of(scene)
    planned = plan.peak_gib if plan is not None else None
    detail = f"{peak:.2f} of {total:.2f} GiB"
    problems: list[tuple[str, Finding]] = []
    if planned is not None:
        figures["planned_gib"] = float(planned)
        detail += f", planned {planned:.2f}"
        if figures["allocated_gib"] > 1.1 * planned:
            problems.append(
                ("oom-estimate-tool-optimistic", Finding(
                    what=f"the worst batch held {figures['allocated_gib']:.2f} GiB, {planned:.2f} were planned",
                    where=_tokens(scene),
                    to_do=f"nothing if it fits; lower {_tokens(scene)} if memory is tight, and report the figures",
                    level="warning",
                ))
            )  # fmt: skip
    if peak > MOST_OF_THE_CARD * total:
        problems.append(
            ("oom-on-longest-batch-late", Finding(
                what=f"the worst batch takes {peak:.2f} of {total:.2f} GiB: what else happens in a run has no room",
                where=_tokens(scene),
                to_do=f"lower {_tokens(scene)}, or set model.activation_checkpointing: full",
                level="warning",
            ))
        )  # fmt: skip
    return Seen(detail, problems, figures)


def save(scene: Scene, folder: Path) -> Seen:
    """A checkpoint and the finished model as a run writes them; and what the new process is to compare with."""
    from zhibei.store.folders import whole_folder
    from zhibei.train.resume import Progress
    from zhibei.train.resume import save as save_state

    materials, model = scene.materials, scene.materials.model
    write_resolved(materials.resolved, folder / "resolved.yaml")
    state = Progress(run_id="rehearsal", key=materials.rows.key, step=2)
    checkpoint = save_state(folder / "checkpoints", materials.stepper, state)
    with whole_folder(folder / "model", purpose="the model of the rehearsal") as place:
        materials.task.write(materials, place)
    expected = sum(p.nbytes for p in model.trainable().values())
    written = sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors"))
    exported = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    probe = probe_row(materials).tolist()
    np.save(folder / "logits.npy", outputs_of(model, probe))
    # With the random states of the checkpoint: a resumed run draws the same.
    passes = materials.task.before_step(model, scene_worst(scene).first)
    after = materials.stepper.step(passes, learning_rate=0.0).loss
    write_json_atomic(folder / "request.json", {**request_of(materials, probe), "after": after})
    detail = f"checkpoint {bytes_of(checkpoint) / GIB:.3f} GiB, model {exported / GIB:.3f} GiB"
    plan = plan_of(scene)
    planned = plan.disk.checkpoint_bytes if plan is not None and plan.disk is not None else None
    figures = {"checkpoint_bytes": bytes_of(checkpoint), "planned_bytes": planned, "model_bytes": exported}
    problems = against_plan(scene, checkpoint)
    for name, size in (("checkpoint", written), ("model", exported)):
        if size < expected:
            problems.append(
                ("fsdp-save-missing-layers", Finding(
                    what=f"the {name} has {size:,} bytes of weights, the weights that learn have {expected:,}",
                    where=str(run_dir_of(materials.run).path),
                    to_do="report it: what was written is not the whole model",
                ))
            )  # fmt: skip
    return Seen(detail, problems, figures)


def plan_of(scene: Scene) -> MemoryPlan | None:
    """What was planned for this run on this machine; None where the model's sizes are not known."""
    search = scene.materials.plan.search
    return search.chosen.memory if search is not None else None


def against_plan(scene: Scene, checkpoint: Path) -> list[tuple[str, Finding]]:
    """A checkpoint that is larger than planned fills the disk before anybody expects it."""
    plan, written = plan_of(scene), bytes_of(checkpoint)
    if plan is None or plan.disk is None or written <= 1.05 * plan.disk.checkpoint_bytes + SMALL_FILES:
        return []
    finding = Finding(
        what=f"a checkpoint has {written / GIB:.3f} GiB, {plan.disk.checkpoint_bytes / GIB:.3f} were planned",
        where=f"{scene.materials.run.stage}.keep_checkpoints",
        to_do="see that the disk has room for what is kept, and report the figures",
        level="warning",
    )
    return [("disk-full-at-checkpoint", finding)]


def request_of(materials: Materials, probe: list[int]) -> dict[str, Any]:
    """What the new process is asked, and what it should find."""
    from zhibei.model.locate import locate
    from zhibei.train.step import checksums

    model, tokenizer = materials.model, materials.tokenizer
    parameters = dict(model.trainable())
    messages = [Message("user", PROBE_TEXT)]
    return {
        "kind": materials.task.described.get("kind", "language model"),
        "device": str(materials.device),
        "precision": materials.precision,
        "base": locate(materials.run.model.path).weights if model.hf is not model.inner else None,
        "quantize": materials.run.model.held_as,
        "checksums": dict(zip(parameters, checksums(parameters).tolist(), strict=True)),
        "probe_tokens": probe,
        "probe_text": PROBE_TEXT,
        "probe_ids": tokenizer.encode(PROBE_TEXT),
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "prompt": tokenizer.encode(materials.template.render(messages, answer_next=True).text),
        "stop_ids": list(tokenizer.stop_ids(materials.template.terminator)),
        "tokenizer": tokenizer.fingerprint,
    }


def outputs_of(model: Any, probe: list[int]) -> np.ndarray:
    """Logits of a row of tokens, or of a reward model its score; fp32."""
    import torch

    with torch.no_grad(), model.sampling() as hf:
        tokens = torch.as_tensor(probe, device=model.device)[None]
        found = hf(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return found.logits[0].float().cpu().numpy()


def bytes_of(folder: Path) -> int:
    """All files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
