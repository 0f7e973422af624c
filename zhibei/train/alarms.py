"""What a watcher may ask of a loop, and how the loop answers. Knows no watchdog and no loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zhibei.config.errors import RunStopped
from zhibei.store.run_dir import RunDir

if TYPE_CHECKING:
    from zhibei.train.record import Recorder


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong on the way. `name` is the field of the run file's section `watch`.

    `is_worth_saving`: the weights of this moment are as good as any (a full disk, slow data). Where they are not
    (the loss exploded), a stop leaves the earlier checkpoints alone.
    """

    name: str
    action: Literal["warn", "save", "roll_back", "stop"]
    what: str
    to_do: str
    evidence: tuple[str, ...] = ()
    is_worth_saving: bool = True
    good_until: int | None = None
    """The last step that was still healthy, where the watcher can tell; a roll-back goes there."""


def say(alarms: Iterable[Alarm], recorder: Recorder, *, step: int) -> None:
    """Each alarm becomes an event of the run, shown and written into its metrics."""
    for alarm in alarms:
        recorder.event(
            step,
            "stopped" if alarm.action == "stop" else "warning",
            f"{alarm.name.replace('_', ' ')}: {alarm.what}; {alarm.to_do}",
            watchdog=alarm.name,
            action=alarm.action,
            evidence=list(alarm.evidence),
        )


def asks_for_save(alarms: Iterable[Alarm]) -> bool:
    """A checkpoint is wanted at once: asked for by the run file, or because the run ends here."""
    return any(alarm.action == "save" or (alarm.action == "stop" and alarm.is_worth_saving) for alarm in alarms)


def stopping(alarms: Iterable[Alarm]) -> Alarm | None:
    """The alarm that ends the run, if one does."""
    return next((alarm for alarm in alarms if alarm.action == "stop"), None)


def stopped_by(alarm: Alarm, run_dir: RunDir, *, step: int, newest: int | None) -> RunStopped:
    """The error that ends the run: evidence, what can be resumed, and how to have the watchdog only warn."""
    resumable = (
        f"step {newest} is saved; continue with: zhibei resume {run_dir.path}"
        if newest is not None
        else "nothing saved"
    )
    shown = f" ({'; '.join(alarm.evidence)})" if alarm.evidence else ""
    return RunStopped(
        f"step {step}: {alarm.name.replace('_', ' ')}: {alarm.what}{shown}",
        expected=f"a healthy run; {resumable}",
        fix=f"{alarm.to_do}; if this is as it should be, set watch.{alarm.name}: warn in a new run",
        where=str(run_dir.path),
    )
