"""What a watchdog saw. Knows words, no history."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sighting:
    """`what` was seen, what `to_do` about it, with the `evidence`. `good_until`: the last step that was still healthy,
    where the history tells."""

    what: str
    to_do: str
    evidence: tuple[str, ...] = ()
    is_worth_saving: bool = True
    good_until: int | None = None
