"""What the loops of ppo, grpo and raft share around their iterations: opening, evaluating, alarms, saving. No loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from zhibei.config.errors import RunStopped, UserError
from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RunFile
from zhibei.data.prepared import PreparedSet
from zhibei.generate.options import SamplingOptions
from zhibei.generate.rewards import RewardFailed
from zhibei.model.device import choose_device
from zhibei.model.ranks import current, met
from zhibei.store.checkpoint import check_checkpoint, list_steps
from zhibei.store.locks import hold_lock
from zhibei.store.run_dir import RunDir
from zhibei.train.alarms import Alarm, asks_for_save, say, stopped_by, stopping
from zhibei.train.beginning import run_dir_of
from zhibei.train.cadence import Cadence, looks_after
from zhibei.train.collect import Collected, answers_to, scored
from zhibei.train.finish import finish
from zhibei.train.health import deviation, mean
from zhibei.train.interrupts import StopRequest
from zhibei.train.offline import (
    LOCK,
    conclude_save,
    disk,
    interrupted,
    newest_step,
    opened,
    require_new,
    stopped,
)
from zhibei.train.policy_materials import PolicyMaterials, gather_policy
from zhibei.train.policy_state import PolicyState, first_state, put_back, restore_rest, share
from zhibei.train.record import Recorder, Watch, ignore, recording
from zhibei.train.resume import Progress
from zhibei.train.samples import NUM_HELDOUT_PROMPTS, Panel, make_panel, panel_path, write_panel
from zhibei.train.saving import Saver
from zhibei.train.schedule import learning_rate
from zhibei.train.step import NonFiniteStep

Loop = Callable[["PolicyRun"], None]
MOST_ROLL_BACKS = 3
ALARM_DELAY = 6


@dataclass
class PolicyRun:
    """A run under way: what it works with, where it writes, and how far it is."""

    parts: PolicyMaterials
    run_dir: RunDir
    progress: Progress
    state: PolicyState
    recorder: Recorder
    panel: Panel | None
    saver: Saver

    @property
    def num_iterations(self) -> int:
        return self.parts.cursor.num_iterations

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self.num_iterations

    def rate(self, peak: float | None) -> float:
        """The learning rate of the iteration that comes next."""
        return self.state.rate_factor * learning_rate(
            self.progress.step, section=self.parts.section, peak=peak or 0.0, num_steps=self.num_iterations
        )


def train_policy(
    resolved: ResolvedRun,
    loop: Loop,
    *,
    watch: Watch = ignore,
    resume: RunDir | None = None,
    on_rows: Callable[[int, str], None] | None = None,
    on_audit: Callable[[PreparedSet], None] | None = None,
) -> RunDir:
    """Learn from rewards with this loop; returns the run directory with the finished model.

    `resume` continues a run from its newest sound checkpoint: the next answers and rewards are those it would have had.
    Raises what `zhibei.train.offline.train` raises, and UserError when the reward fails.
    """
    run_dir = resume or run_dir_of(resolved.run)
    patience = resolved.run.distributed.patience_seconds
    with met(choose_device(resolved.run.device), patience_seconds=patience) as ranks, ExitStack() as held:
        if resume is None:
            ranks.first_does(lambda: require_new(run_dir))
        parts = gather_policy(resolved, on_rows=on_rows, on_audit=on_audit)
        progress, notes = opened(run_dir, parts.materials, is_new=resume is None)
        state = restore_rest(run_dir.checkpoint(progress.step), parts) if progress.step else first_state(parts)
        ranks.first_does(lambda: held.enter_context(hold_lock(run_dir.path / LOCK, patience_seconds=0)))
        notes, device = [*notes, *parts.materials.notes], parts.materials.device
        recorder = held.enter_context(
            recording(run_dir, parts.run, step=progress.step, notes=notes, watch=watch, device=device)
        )
        saver = held.enter_context(Saver(run_dir.checkpoints, ranks, background=parts.section.save_in_background))
        going = PolicyRun(parts, run_dir, progress, state, recorder, panel_of(parts), saver)
        begin(going)
        loop(going)
        conclude(going)
        require_learning(going)
        finish(parts.materials, run_dir, progress, recorder)
    return run_dir


def require_learning(going: PolicyRun) -> None:
    """Raises RunStopped when not one answer of the whole run was learned from: the model would be the old one."""
    if going.progress.learned_tokens:
        return
    raise RunStopped(
        f"nothing was learned in {going.progress.step} iterations: the answers to each prompt always had one and the "
        "same reward, or none was good enough",
        expected="prompts whose answers differ in reward",
        fix=f"look at reward_mean and reward_std in {going.run_dir.metrics}; try the reward by itself, "
        "use other prompts, or raise temperature",
        where=f"{going.parts.run.stage}.reward",
    )


def begin(going: PolicyRun) -> None:
    """Say what starts, and what the model answers before anything is learned."""
    parts, progress = going.parts, going.progress
    learning, everything = parts.roles.policy.num_parameters()
    critic = parts.roles.critic
    more = f", {sum(p.numel() for p in critic.parameters.values()):,} more in the critic" if critic else ""
    going.recorder.event(
        progress.step,
        "started" if progress.step == 0 else "resumed",
        f"{learning:,} of {everything:,} parameters learn{more}, {parts.materials.precision} on "
        f"{parts.materials.device}",
        total_steps=going.num_iterations,
        total_rows=parts.cursor.num_prompts,
        peak_rate=parts.section.learning_rate,
    )
    parts.materials.stepper.remember_weights()
    if going.state.owes_evaluation:
        going.state.owes_evaluation = False
        evaluate(going)
    if progress.step == 0:
        evaluate(going)
        if wants_roll_back(parts.run):
            checkpoint(going)


def panel_of(parts: PolicyMaterials) -> Panel | None:
    """The run file's prompts, or the first held-out ones, whole."""
    materials, section = parts.materials, parts.section
    if section.sample_prompts or section.sample_tokens == 0:
        return make_panel(parts.run, materials.rows.heldout, materials.tokenizer, materials.template)
    rows = materials.rows.heldout
    count = min(NUM_HELDOUT_PROMPTS, len(rows))
    prompts = [rows.tokens[rows.borders[n] : rows.borders[n + 1]].tolist() for n in range(count)]
    if not prompts:
        return None
    options = SamplingOptions(
        max_new_tokens=section.sample_tokens,
        temperature=0.0,
        stop_strings=materials.template.stop_strings,
        overflow="fewer_tokens",
    )
    texts = [parts.questions[row_id].text for row_id in rows.row_ids[:count]]
    stop_ids = materials.tokenizer.stop_ids(materials.template.terminator)
    return Panel(prompts, texts, options, stop_ids, materials.tokenizer)


def evaluate(going: PolicyRun) -> bool:
    """The mean reward of answers to held-out prompts, always drawn alike; returns whether it is the best so far."""
    parts, progress = going.parts, going.progress
    if going.panel is not None:
        write_panel(going.panel, parts.roles.policy, going.run_dir, step=progress.step)
    rows = parts.materials.rows.heldout
    if len(rows) == 0:
        return False
    started = time.monotonic()
    numbers = range(min(len(rows), parts.section.evaluate_rows))
    rollout = answers_to(parts, rows, numbers, seed=parts.run.seed)
    try:
        scores = scored(parts, rollout, rows, numbers)
    except RewardFailed as problem:
        going.state.owes_evaluation = progress.step > 0
        raise stopped_for_reward(going, problem) from problem
    loss = -mean(scores)
    is_best = progress.best_loss is None or loss < progress.best_loss
    if is_best:
        progress.best_loss, progress.best_step = loss, progress.step
    progress.evaluations_without_gain = 0 if is_best else progress.evaluations_without_gain + 1
    going.recorder.write(
        "evaluation",
        progress.step,
        reward_mean=mean(scores),
        reward_std=deviation(scores),
        answers=len(scores),
        length_mean=mean(rollout.lengths),
        ended_share=mean([float(reason == "stop") for reason in rollout.finish]),
        seconds=round(time.monotonic() - started, 4),
        is_best=is_best,
        samples=panel_path(going.run_dir, progress.step).name if going.panel is not None else None,
    )
    return is_best and progress.step > 0


def attend(going: PolicyRun, stop: StopRequest) -> bool:
    """After an iteration: look, evaluate, answer alarms, save. Returns whether the run ends here.

    Raises RunStopped for an alarm that stops, RunInterrupted after a signal; both leave what can be resumed.
    """
    parts, progress, recorder = going.parts, going.progress, going.recorder
    section, stepper = parts.section, parts.materials.stepper
    if stop.agree(going.saver.is_writing) == 0:
        conclude(going)
    cadence = Cadence(section.evaluate_every or 0, section.save_every or 0, going.num_iterations)
    if looks_after(progress.step):
        recorder.write("look", progress.step, **stepper.look(), **disk(parts.materials, going.run_dir))
    is_best = cadence.evaluates_after(progress.step) and evaluate(going)
    alarms = recorder.take_alarms()
    halt = stopping(alarms)
    say([alarm for alarm in alarms if alarm is not halt], recorder, step=progress.step)
    wants_save = cadence.saves_after(progress.step) or (is_best and section.keep_best) or stop
    if asks_for_save(alarms) or (wants_save and (halt is None or halt.is_worth_saving)):
        checkpoint(going, may_go_on=not stop and halt is None and not going.is_done)
    if halt is not None:
        conclude(going)
        say([halt], recorder, step=progress.step)
        raise stopped_by(halt, going.run_dir, step=progress.step, newest=newest_step(going.run_dir))
    for alarm in alarms:
        if alarm.action == "roll_back":
            roll_back(going, alarm)
            break
    if stop:
        recorder.event(progress.step, "interrupted", f"{stop.name}: saved at step {progress.step}")
        raise interrupted(stop.name or "a signal", going.run_dir, progress)
    patience = section.early_stop_patience
    if patience is not None and progress.evaluations_without_gain >= patience:
        recorder.event(progress.step, "early stop", f"no better held-out reward in {patience} evaluations")
        return True
    return False


def wants_roll_back(run: RunFile) -> bool:
    return "roll_back" in run.watch.model_dump().values()


def roll_back(going: PolicyRun, alarm: Alarm) -> None:
    """Go on from the last checkpoint that was still healthy. Raises RunStopped when there is none, or too often."""
    conclude(going)
    sound = sound_before(going.run_dir, alarm.good_until if alarm.good_until is not None else 0)
    if sound is None or going.state.roll_backs >= MOST_ROLL_BACKS:
        why = "nothing is saved from before it" if sound is None else f"it came back after {MOST_ROLL_BACKS} roll-backs"
        halt = replace(alarm, action="stop", what=f"{alarm.what}; {why}")
        say([halt], going.recorder, step=going.progress.step)
        raise stopped_by(halt, going.run_dir, step=going.progress.step, newest=newest_step(going.run_dir))
    put_back(sound, going.parts, going.state)
    going.recorder.event(
        going.progress.step,
        "rolled back",
        f"policy and critic are those of {sound.name} again; the learning rate is halved",
        rate_factor=going.state.rate_factor,
        roll_backs=going.state.roll_backs,
    )


def sound_before(run_dir: RunDir, step: int) -> Path | None:
    """The newest sound checkpoint up to this step, as rank 0 finds it."""

    def look() -> str | None:
        older = [path for saved, path in list_steps(run_dir.checkpoints) if saved <= step]
        return next((str(path) for path in reversed(older) if not check_checkpoint(path)), None)

    found = current().first_does(look)
    return None if found is None else Path(found)


def checkpoint(going: PolicyRun, *, may_go_on: bool = False) -> None:
    """Save everything once the weights are known to be finite; `may_go_on`: the next answers are written meanwhile."""
    parts, progress = going.parts, going.progress
    for stepper in (parts.materials.stepper, parts.critic):
        if stepper is not None:
            try:
                stepper.require_finite_weights([])
            except NonFiniteStep as problem:
                raise bad_step(problem, going) from None
    conclude(going)
    groups, state = share(parts, progress, going.state)
    going.saver.begin(progress.step, groups, state, best_step=progress.best_step, may_go_on=may_go_on)
    if not going.saver.is_in_background:
        conclude(going)


def conclude(going: PolicyRun) -> None:
    """Make what was begun a checkpoint; then drop those that nothing needs."""
    conclude_save(going.saver, going.parts.run, going.run_dir, going.recorder, protect=for_roll_back(going))


def for_roll_back(going: PolicyRun) -> list[Path]:
    """An alarm knows its beginning only some iterations later; until then the oldest checkpoint may be needed."""
    saved = list_steps(going.run_dir.checkpoints)
    if not saved or not wants_roll_back(going.parts.run):
        return []
    old_enough = [path for step, path in saved if step <= going.progress.step - ALARM_DELAY]
    return old_enough[-2:] or [saved[0][1]]


def stopped_for_reward(going: PolicyRun, problem: RewardFailed) -> UserError:
    """The reward's fault as the end of a run that can go on from here: everything learned so far is saved first."""
    step = going.progress.step
    if step == 0:
        return problem
    conclude(going)
    if newest_step(going.run_dir) != step or going.state.owes_evaluation:
        checkpoint(going)
    going.recorder.event(step, "stopped", problem.what)
    return RunStopped(
        f"after step {step} {problem.what}",
        expected=f"{problem.expected}; step {step} is saved",
        fix=f"put the reward right, then continue with: zhibei resume {going.run_dir.path}",
        where=problem.where,
    )


def bad_step(problem: NonFiniteStep, going: PolicyRun, collected: Collected | None = None) -> NonFiniteStep:
    """The stop with the ids of the prompts instead of the numbers of answers."""
    conclude(going)
    if collected is not None:
        problem.row_numbers = sorted({collected.prompt_numbers[number] for number in problem.row_numbers})
    return stopped(problem, going.parts.materials, going.run_dir, going.progress, going.recorder)
