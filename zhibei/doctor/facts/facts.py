"""Everything that is known about a run before it starts, as one frozen value. Checks are pure functions of it."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zhibei.config.errors import UserError
from zhibei.config.resolve import ResolvedRun
from zhibei.config.run import RunFile
from zhibei.doctor.facts.environment import EnvironmentFacts
from zhibei.doctor.facts.hand_over import HandOverFacts
from zhibei.doctor.facts.model import AdapterFacts, ModelFacts
from zhibei.doctor.facts.output import OutputFacts
from zhibei.doctor.facts.rows import PairFacts, RowFacts
from zhibei.doctor.facts.text import TemplateFacts, TokenizerFacts
from zhibei.plan.machines import Machine

if TYPE_CHECKING:
    from zhibei.plan.memory import MemoryPlan


@dataclass(frozen=True, slots=True)
class Defect:
    """Something of zhibei's own that failed: which check or part, and how."""

    place: str
    error: str

    @classmethod
    def of(cls, place: str, error: Exception) -> Defect:
        """With the line that raised it, so that a report of it is enough to find it."""
        frames = traceback.extract_tb(error.__traceback__)
        line = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        text = next(iter(str(error).splitlines()), "")
        return cls(place, f"{type(error).__name__}: {text}{line}")


@dataclass(frozen=True)
class Facts:
    """None means: not known (it could not be read, and `faults` says why, or it does not belong to this run)."""

    machine: Machine
    environment: EnvironmentFacts = field(default_factory=EnvironmentFacts)
    resolved: ResolvedRun | None = None
    model: ModelFacts | None = None
    adapter: AdapterFacts | None = None
    reward: ModelFacts | None = None
    """Stage ppo: the model behind ppo.reward_model; the tensors of an adapter are among those of its base."""
    tokenizer: TokenizerFacts | None = None
    template: TemplateFacts | None = None
    rows: RowFacts | None = None
    pairs: PairFacts | None = None
    output: OutputFacts | None = None
    hand_over: HandOverFacts | None = None
    """Where the run file asks for forms of the finished model."""
    plan: MemoryPlan | None = None
    plan_remedies: tuple[str, ...] = ()
    """What would make the run fit, where it does not."""
    faults: tuple[UserError, ...] = ()
    """What reading refused; each is a finding of its own."""
    defects: tuple[Defect, ...] = ()
    """Parts that could not be gathered although nothing is wrong with the run: zhibei's own faults."""
    is_resumed: bool = False
    """The run goes on in its directory, so what lies there is its own."""

    @property
    def run(self) -> RunFile:
        """The run file; ask only where `resolved` is known."""
        assert self.resolved is not None
        return self.resolved.run

    def origin(self, key: str) -> str:
        """Where a value of the run file was set: `run.yaml:12`, `command line`, `recipe alpaca-7b` or `default`."""
        return self.resolved.origins.get(key, "default") if self.resolved else "default"
