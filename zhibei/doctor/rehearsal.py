"""The rehearsal of a run: real weights, the worst batch, two steps, a save, and everything read back in a new process.

What it writes lies in a temporary folder beside the run directory (the same disk) and is gone afterwards. Knows what
to try and in which order; the experiments are in probes.py; fresh.py reads back, readback.py judges.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.resolve import ResolvedRun, write_resolved
from zhibei.doctor.checkup import Checkup, Found, found_of
from zhibei.doctor.pitfall import Finding
from zhibei.doctor.pitfalls import load_catalogue
from zhibei.doctor.probes import (
    Scene,
    Seen,
    adapters,
    evaluation,
    find_worst,
    first_loss,
    packing,
    scene_worst,
    split,
    two_steps,
    zero_rate,
)  # fmt: skip
from zhibei.doctor.readback import generated, reload, resumed
from zhibei.plan.memory import MemoryPlan
from zhibei.store.files import write_json_atomic
from zhibei.text.messages import Message
from zhibei.train.beginning import require_writable, run_dir_of
from zhibei.train.finish import probe_row, write_model
from zhibei.train.materials import Materials, gather

PROBE_TEXT = "Name 3 colours: red, 绿色, naïve-blue 🙂."
GIB = 2.0**30
SMALL_FILES = 2**20
REHEARSED_STAGE = "sft"
MOST_OF_THE_CARD = 0.95
IN_MEMORY: dict[str, Callable[[Scene], Seen]] = {
    "worst batch": find_worst,
    "zero rate": zero_rate,
    "first loss": first_loss,
    "packing": packing,
    "split": split,
    "two steps": two_steps,
    "adapters": adapters,
    "evaluation": evaluation,
}
NEEDED = ("worst batch", "zero rate")
"""Steps without which the later ones say nothing."""
STEPS = ("load", *IN_MEMORY, "memory", "save", "reload", "generate", "resume")
"""The names of all steps, in their order; pitfalls of kind `rehearsal` name one of them in `by`."""


@dataclass(frozen=True)
class Step:
    """One step of a rehearsal: how long it took, what it saw, what it found."""

    name: str
    seconds: float
    detail: str
    findings: tuple[Found, ...] = ()
    figures: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return not any(found.blocks for found in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "detail": self.detail,
            "figures": dict(self.figures or {}),
        }


@dataclass(frozen=True)
class Rehearsal:
    """Every step that was taken. `checkup` holds the findings in the form of `zhibei check`."""

    steps: tuple[Step, ...]
    checkup: Checkup

    def as_dict(self) -> dict[str, Any]:
        """What `zhibei rehearse --json` prints and rehearsal.json holds."""
        return {
            "passed": not self.checkup.blocks,
            "seconds": round(sum(step.seconds for step in self.steps), 3),
            "steps": [step.as_dict() for step in self.steps],
            **self.checkup.as_dict(),
        }


def rehearse(resolved: ResolvedRun, *, on_step: Callable[[str, Step | None], None] = lambda *_: None) -> Rehearsal:
    """Try the run. `on_step` hears the name of each step when it begins, and again with its outcome.

    A step that fails does not stop the others, unless they need it. Raises UserError for stages whose steps it does
    not know.
    """
    if resolved.run.stage != REHEARSED_STAGE:
        raise UserError(
            f"a run of stage {resolved.run.stage} cannot be rehearsed by this version",
            expected=f"stage: {REHEARSED_STAGE}",
            fix="set rehearse: auto or never; `zhibei check` and `zhibei plan` know this stage",
            where="stage",
        )
    stage = _Stage(resolved, on_step)
    with _temporary_folder(resolved) as folder:
        if _first_half(stage, folder):
            # The new process needs the card; nothing of this one holds the model any more.
            _empty_gpu()
            answer: dict[str, Any] = {}
            stage.take("reload", lambda: reload(folder, answer))
            stage.take("generate", lambda: generated(folder, answer))
            stage.take("resume", lambda: resumed(folder, answer))
    return stage.outcome()


def _first_half(stage: _Stage, folder: Path) -> bool:
    """Everything that needs the model in memory. Whether it was saved in the end."""
    scenes: list[Scene] = []

    def load() -> Seen:
        materials = gather(stage.resolved)
        scenes.append(Scene(materials))
        learning, everything = materials.model.num_parameters()
        return Seen(f"{learning:,} of {everything:,} parameters learn, {materials.precision} on {materials.device}")

    if not stage.take("load", load):
        return False
    scene = scenes[0]
    for name, probe in IN_MEMORY.items():
        passed = stage.take(name, functools.partial(probe, scene))
        if not passed and name in NEEDED:
            return False
    stage.take("memory", lambda: memory(scene))
    return stage.take("save", lambda: save(scene, folder))


class _Stage:
    """Takes steps, times them, and turns whatever goes wrong into findings."""

    def __init__(self, resolved: ResolvedRun, on_step: Callable[[str, Step | None], None]) -> None:
        self.resolved, self.on_step = resolved, on_step
        self.steps: list[Step] = []
        self.catalogue = load_catalogue()

    def take(self, name: str, work: Callable[[], Seen]) -> bool:
        """Whether the step went through; what it found is kept either way."""
        self.on_step(name, None)
        started = time.monotonic()
        found: list[Found] = []
        try:
            seen = work()
            found = [self._found(pitfall, finding) for pitfall, finding in seen.problems]
        except UserError as error:
            seen, found = Seen(error.what), [found_of(error, self.catalogue)]
        except Exception as error:
            seen = Seen(f"{type(error).__name__}: {error}")
            found = [self._found(*_failure(error, name))]
        wanted = self.resolved.run.accept
        kept = tuple(one for one in found if one.id not in wanted or not one.id)
        step = Step(name, time.monotonic() - started, seen.detail, kept, seen.figures)
        self.steps.append(step)
        self.on_step(name, step)
        return step.passed

    def _found(self, pitfall: str, finding: Finding) -> Found:
        entry = self.catalogue.get(pitfall)
        if entry is None:
            return Found("", "rehearsal", "launch", finding)
        return Found(entry.id, entry.area, entry.cost, finding, entry.english.title, entry.english.why)

    def outcome(self) -> Rehearsal:
        findings = tuple(found for step in self.steps for found in step.findings)
        return Rehearsal(tuple(self.steps), Checkup(findings, num_checks=len(self.steps)))


def _failure(error: Exception, step: str) -> tuple[str, Finding]:
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        text = str(error).splitlines()[0]
        return "oom-on-longest-batch-late", Finding(
            what=f"out of memory at step '{step}' of the rehearsal: {text}",
            where="sft.micro_batch_tokens",
            to_do="lower sft.micro_batch_tokens or data.max_tokens, set model.activation_checkpointing: full, "
            "or ask zhibei plan for what fits",
        )
    return "", Finding(
        what=f"step '{step}' of the rehearsal failed: {type(error).__name__}: {error}",
        where="rehearsal",
        to_do="report it with this message; rehearse: never goes without",
    )


def memory(scene: Scene) -> Seen:
    """The most GPU memory that was held, against the card and against the plan."""
    import torch

    device = scene.materials.device
    if device.type != "cuda":
        return Seen("not measured: this run computes on the CPU")
    peak = torch.cuda.max_memory_reserved(device) / GIB
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    figures: dict[str, Any] = {"measured_gib": peak, "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB}
    plan = _plan_of(scene)
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
                    where="sft.micro_batch_tokens",
                    to_do="nothing if it fits; lower sft.micro_batch_tokens if memory is tight, and report the figures",
                    level="warning",
                ))
            )  # fmt: skip
    if peak > MOST_OF_THE_CARD * total:
        problems.append(
            ("oom-on-longest-batch-late", Finding(
                what=f"the worst batch takes {peak:.2f} of {total:.2f} GiB: what else happens in a run has no room",
                where="sft.micro_batch_tokens",
                to_do="lower sft.micro_batch_tokens, or set model.activation_checkpointing: full",
                level="warning",
            ))
        )  # fmt: skip
    return Seen(detail, problems, figures)


def save(scene: Scene, folder: Path) -> Seen:
    """A checkpoint and the finished model as a run writes them; and what the new process is to compare with."""
    import torch

    from zhibei.store.folders import whole_folder
    from zhibei.train.resume import Progress
    from zhibei.train.resume import save as save_state

    materials, model = scene.materials, scene.materials.model
    write_resolved(materials.resolved, folder / "resolved.yaml")
    state = Progress(run_id="rehearsal", key=materials.rows.key, step=2)
    checkpoint = save_state(folder / "checkpoints", materials.stepper, state)
    with whole_folder(folder / "model", purpose="the model of the rehearsal") as place:
        write_model(materials, place)
    expected = sum(p.nbytes for p in model.trainable().values())
    written = sum(file.stat().st_size for file in checkpoint.glob("model*.safetensors"))
    exported = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    probe = probe_row(materials).tolist()
    with torch.no_grad(), model.sampling() as hf:
        tokens = torch.as_tensor(probe, device=materials.device)[None]
        np.save(folder / "logits.npy", hf(tokens, use_cache=False).logits[0].float().cpu().numpy())
    # With the random states of the checkpoint: a resumed run draws the same.
    after = materials.stepper.step(scene_worst(scene).first, learning_rate=0.0).loss
    write_json_atomic(folder / "request.json", {**_request(materials, probe), "after": after})
    detail = f"checkpoint {_bytes_of(checkpoint) / GIB:.3f} GiB, model {exported / GIB:.3f} GiB"
    plan = _plan_of(scene)
    planned = plan.disk.checkpoint_bytes if plan is not None and plan.disk is not None else None
    figures = {"checkpoint_bytes": _bytes_of(checkpoint), "planned_bytes": planned, "model_bytes": exported}
    problems = _against_plan(scene, checkpoint)
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


def _plan_of(scene: Scene) -> MemoryPlan | None:
    """What was planned for this run on this machine; None where the model's sizes are not known."""
    search = scene.materials.plan.search
    return search.chosen.memory if search is not None else None


def _against_plan(scene: Scene, checkpoint: Path) -> list[tuple[str, Finding]]:
    """A checkpoint that is larger than planned fills the disk before anybody expects it."""
    plan, written = _plan_of(scene), _bytes_of(checkpoint)
    if plan is None or plan.disk is None or written <= 1.05 * plan.disk.checkpoint_bytes + SMALL_FILES:
        return []
    finding = Finding(
        what=f"a checkpoint has {written / GIB:.3f} GiB, {plan.disk.checkpoint_bytes / GIB:.3f} were planned",
        where="sft.keep_checkpoints",
        to_do="see that the disk has room for what is kept, and report the figures",
        level="warning",
    )
    return [("disk-full-at-checkpoint", finding)]


def _request(materials: Materials, probe: list[int]) -> dict[str, Any]:
    """What the new process is asked, and what it should find."""
    from zhibei.model.locate import locate
    from zhibei.model.quantized import wanted_kind
    from zhibei.train.step import checksums

    model, tokenizer = materials.model, materials.tokenizer
    parameters = dict(model.trainable())
    messages = [Message("user", PROBE_TEXT)]
    return {
        "device": str(materials.device),
        "precision": materials.precision,
        "base": locate(materials.run.model.path).weights if model.hf is not model.inner else None,
        "quantize": wanted_kind(materials.run.model),
        "checksums": dict(zip(parameters, checksums(parameters).tolist(), strict=True)),
        "probe_tokens": probe,
        "probe_text": PROBE_TEXT,
        "probe_ids": tokenizer.encode(PROBE_TEXT),
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "prompt": tokenizer.encode(materials.template.render(messages, answer_next=True).text),
        "stop_ids": list(tokenizer.stop_ids(materials.template.terminator)),
        "tokenizer": tokenizer.fingerprint,
    }


@contextmanager
def _temporary_folder(resolved: ResolvedRun) -> Iterator[Path]:
    """A folder on the disk the run will write to, gone afterwards."""
    require_writable(run_dir_of(resolved.run))
    parent = run_dir_of(resolved.run).path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    folder = Path(tempfile.mkdtemp(prefix=f".rehearsal-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty_gpu() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
