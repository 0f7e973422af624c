"""The loop that learns from rows that are there before it begins: batch, step, watch, evaluate, save. Knows no doctor.

Supervised fine-tuning, reward models and learning from preferences run through it; what differs between them is their
`Task` (train/task.py). Watchdogs, progress lines and reports reach the loop as `watch`, a function of one record; it
may answer with an alarm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from zhibei.config.errors import RunInterrupted, UserError
from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RunFile
from zhibei.data.prepared import PreparedSet
from zhibei.model.device import choose_device
from zhibei.model.ranks import current, met
from zhibei.store.checkpoint import list_steps, prune
from zhibei.store.files import free_bytes
from zhibei.store.locks import hold_lock
from zhibei.store.run_dir import RunDir
from zhibei.train.alarms import asks_for_save, say, stopped_by, stopping
from zhibei.train.beginning import refuse_existing, require_writable, run_dir_of
from zhibei.train.cadence import Cadence, looks_after
from zhibei.train.finish import finish
from zhibei.train.interrupts import stop_requests
from zhibei.train.materials import Materials, gather
from zhibei.train.opening import describe, open_again, open_new
from zhibei.train.record import Recorder, Watch, ignore, recording, with_waits
from zhibei.train.resume import Progress, saved_bytes, share
from zhibei.train.samples import Panel, make_panel, panel_path, write_panel
from zhibei.train.saving import Saver
from zhibei.train.schedule import learning_rate
from zhibei.train.step import NonFiniteStep, StepRecord

LOCK = ".training.lock"


def train(
    resolved: ResolvedRun,
    *,
    watch: Watch = ignore,
    resume: RunDir | None = None,
    on_rows: Callable[[int, str], None] | None = None,
    on_audit: Callable[[PreparedSet], None] | None = None,
) -> RunDir:
    """Teach the model what its rows hold, as the stage does; returns the run directory with the finished model.

    `resume` continues that run from its newest sound checkpoint. `on_rows` is told how preparation goes,
    `on_audit` gets the audited rows before any weight is loaded.

    Raises UserError before anything is written when the run cannot work, RunInterrupted after a signal (state saved),
    and RunStopped (exit code 3) when `watch` says so, NonFiniteStep when loss or gradients stop being finite.
    """
    run_dir = resume or run_dir_of(resolved.run)
    patience = resolved.run.distributed.patience_seconds
    with met(choose_device(resolved.run.device), patience_seconds=patience) as ranks:
        if resume is None:
            ranks.first_does(lambda: require_new(run_dir))
        materials = gather(resolved, on_rows=on_rows, on_audit=on_audit)
        progress, notes = opened(run_dir, materials, is_new=resume is None)
        with ExitStack() as held:
            ranks.first_does(lambda: held.enter_context(hold_lock(run_dir.path / LOCK, patience_seconds=0)))
            materials = materials.task.prepare(materials, run_dir, progress.step)
            notes = [*notes, *materials.notes]
            recorder = held.enter_context(
                recording(run_dir, materials.run, step=progress.step, notes=notes, watch=watch, device=materials.device)
            )
            loop(materials, run_dir, progress, recorder)
            finish(materials, run_dir, progress, recorder)
    return run_dir


def require_new(run_dir: RunDir) -> None:
    """Raises UserError when the directory holds something or cannot be made."""
    refuse_existing(run_dir)
    require_writable(run_dir)


def opened(run_dir: RunDir, materials: Materials, *, is_new: bool) -> tuple[Progress, list[str]]:
    """The counters to begin with: fresh ones in a new directory that rank 0 describes, or those of a checkpoint."""
    if not is_new:
        return open_again(run_dir, materials)
    told = current().first_does(lambda: asdict(open_new(run_dir, materials, describe(materials))))
    return Progress(**told), []


def loop(materials: Materials, run_dir: RunDir, progress: Progress, recorder: Recorder) -> None:
    """Batch, step, watch, evaluate, save; until the last step, an early stop or a signal."""
    run, stepper, batches, task = materials.run, materials.stepper, materials.batches, materials.task
    section = run.training
    cadence = Cadence(section.evaluate_every or 0, section.save_every or 0, batches.num_steps)
    panel = make_panel(run, materials.rows.heldout, materials.tokenizer, materials.template)
    peak = section.learning_rate or 0.0
    recorder.event(
        progress.step,
        "started" if progress.step == 0 else "resumed",
        f"{materials.model.num_parameters()[0]:,} of {materials.model.num_parameters()[1]:,} parameters learn, "
        f"{materials.precision} on {materials.device}",
        total_steps=batches.num_steps,
        total_rows=batches.num_items,
        vocabulary=materials.model.head.weight.shape[0] if task.unit == "token" else None,
        peak_rate=peak,
    )
    stepper.remember_weights()
    if progress.step == 0:
        task.probe(materials)
        evaluate(materials, run_dir, progress, recorder, panel)
    with stop_requests() as stop, Saver(run_dir.checkpoints, current(), background=section.save_in_background) as saver:
        settle = partial(conclude_save, saver, run, run_dir, recorder)
        for data_seconds, (step, micro_batches) in with_waits(batches.steps(progress.step)):
            started = time.monotonic()
            rate = learning_rate(step, section=section, peak=peak, num_steps=batches.num_steps)
            try:
                record = stepper.step(task.before_step(materials.model, micro_batches), learning_rate=rate)
            except NonFiniteStep as problem:
                settle()
                raise stopped(problem, materials, run_dir, progress, recorder) from None
            seconds = time.monotonic() - started
            progress.step = step + 1
            progress.tokens += record.num_tokens
            progress.learned_tokens += record.num_learned_tokens
            progress.seconds += seconds
            count_skipped(progress, record)
            if progress.step % run.log.every == 0 or progress.step == batches.num_steps:
                recorder.step(
                    progress.step,
                    record,
                    epoch=round(batches.epoch_at(progress.step), 6),
                    learning_rate=rate,
                    seconds=seconds,
                    data_seconds=round(data_seconds, 6),
                    skipped_steps=progress.all_skipped_steps,
                    skipped_in_row=progress.skipped_steps,
                )
            if looks_after(progress.step):
                recorder.write("look", progress.step, **stepper.look(), **disk(materials, run_dir))
            if stop.agree(saver.is_writing) == 0:
                settle()
            is_best = False
            if cadence.evaluates_after(progress.step):
                is_best = evaluate(materials, run_dir, progress, recorder, panel)
            alarms = recorder.take_alarms()
            halt = stopping(alarms)
            say([alarm for alarm in alarms if alarm is not halt], recorder, step=progress.step)
            wants_save = cadence.saves_after(progress.step) or (is_best and section.keep_best) or stop
            if asks_for_save(alarms) or (wants_save and (halt is None or halt.is_worth_saving)):
                try:
                    stepper.require_finite_weights(micro_batches)
                except NonFiniteStep as problem:
                    settle()
                    raise stopped(problem, materials, run_dir, progress, recorder) from None
                may_go_on = not stop and halt is None and progress.step < batches.num_steps
                checkpoint(materials, run_dir, progress, recorder, saver, may_go_on=may_go_on)
            if halt is not None:
                settle()
                say([halt], recorder, step=progress.step)
                raise stopped_by(halt, run_dir, step=progress.step, newest=newest_step(run_dir))
            if stop:
                recorder.event(progress.step, "interrupted", f"{stop.name}: saved at step {progress.step}")
                raise interrupted(stop.name or "a signal", run_dir, progress)
            patience = section.early_stop_patience
            if patience is not None and progress.evaluations_without_gain >= patience:
                recorder.event(progress.step, "early stop", f"no better held-out loss in {patience} evaluations")
                break
        settle()


def evaluate(
    materials: Materials, run_dir: RunDir, progress: Progress, recorder: Recorder, panel: Panel | None
) -> bool:
    """Held-out figures and the sample panel; returns whether this is the best loss so far (step 0 counts)."""
    if panel is not None:
        write_panel(panel, materials.model, run_dir, step=progress.step)
    if materials.heldout is None:
        return False
    seen = materials.task.evaluate(materials, materials.heldout)
    is_best = progress.best_loss is None or seen.loss < progress.best_loss
    if is_best:
        progress.best_loss, progress.best_step = seen.loss, progress.step
    progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + 1
    recorder.write(
        "heldout",
        progress.step,
        loss=seen.loss,
        **seen.figures,
        seconds=round(seen.seconds, 4),
        is_best=is_best,
        samples=panel_path(run_dir, progress.step).name if panel is not None else None,
    )
    return is_best and progress.step > 0


def checkpoint(
    materials: Materials, run_dir: RunDir, progress: Progress, recorder: Recorder, saver: Saver, *, may_go_on: bool
) -> None:
    """Save everything; `may_go_on`: the next steps are done while it is written."""
    settle = partial(conclude_save, saver, materials.run, run_dir, recorder)
    settle()
    groups, state = share(materials.stepper, progress)
    saver.begin(progress.step, groups, state, best_step=progress.best_step, may_go_on=may_go_on)
    if not saver.is_in_background:
        settle()


def conclude_save(
    saver: Saver, run: RunFile, run_dir: RunDir, recorder: Recorder, *, protect: Collection[Path] = ()
) -> None:
    """Make what was begun a checkpoint; then drop those that are neither among the newest nor the best when it began,
    nor protected. Raises UserError when it could not be written; the older ones are untouched."""
    step = saver.step
    try:
        saved = saver.settle()
    except UserError as problem:
        recorder.event(step or 0, "save failed", problem.what)
        raise
    if saved is None or not current().is_first:
        return
    section = run.training
    best = [run_dir.checkpoint(saved.best_step)] if saved.best_step is not None and section.keep_best else []
    prune(run_dir.checkpoints, keep=section.keep_checkpoints, protect=[*best, *protect], verified=saved.path)
    recorder.event(
        saved.step,
        "saved",
        saved.path.name,
        seconds=round(saved.seconds, 3),
        waited_seconds=round(saved.waited_seconds, 3),
        bytes=saved.num_bytes,
        in_background=saved.in_background,
    )


def count_skipped(progress: Progress, record: StepRecord) -> None:
    """Steps that the loss scale of fp16 had to leave out, in a row and in all."""
    progress.skipped_steps = progress.skipped_steps + 1 if record.was_skipped else 0
    progress.all_skipped_steps += record.was_skipped


def disk(materials: Materials, run_dir: RunDir) -> dict[str, int]:
    """Bytes: what is free where the run writes, what the next checkpoint takes (of all ranks: every one must ask), what
    the finished model takes."""
    model = materials.model
    written = model.trainable() if model.hf is not model.inner else dict(model.hf.named_parameters())
    return {
        "free_bytes": free_bytes(run_dir.path),
        "checkpoint_bytes": saved_bytes(materials.stepper),
        "model_bytes": sum(tensor.nbytes for tensor in written.values()),
    }


def newest_step(run_dir: RunDir) -> int | None:
    steps = list_steps(run_dir.checkpoints)
    return steps[-1][0] if steps else None


def stopped(
    problem: NonFiniteStep, materials: Materials, run_dir: RunDir, progress: Progress, recorder: Recorder
) -> NonFiniteStep:
    """The same stop, with the step, the ids of its rows and where to resume; it goes into the metrics too."""
    ids = [materials.rows.train.row_ids[number] for number in problem.row_numbers]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    # A step that was applied is counted already; one that was refused is the next.
    step = progress.step if problem.was_applied else progress.step + 1
    recorder.event(step, "stopped", f"{problem.what}; rows: {', '.join(ids)}")
    result = NonFiniteStep(f"step {step}: {problem.what}; its rows: {shown}", problem.row_numbers)
    result.where = str(run_dir.path)
    return result


def interrupted(signal_name: str, run_dir: RunDir, progress: Progress) -> UserError:
    return RunInterrupted(
        f"{signal_name} after step {progress.step}; everything is saved",
        expected=f"{run_dir.checkpoint(progress.step)} holds the state",
        fix=f"continue with: zhibei resume {run_dir.path}",
        where=str(run_dir.path),
    )
