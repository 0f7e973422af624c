"""Canaries: for each check of the catalogue, facts that must trip it and facts that must not.

Each area's file `tests/doctor/canaries/test_<area>.py` states them as data, by pitfall id:

    CANARIES: Canaries = {
        "bf16-on-pre-ampere": (
            [healthy("model.precision=bf16", machine=V100), ...],   # broken: each one must trip this check
            [healthy("model.precision=fp16", machine=V100), ...],   # sound: none may trip it
        ),
    }

`tests/doctor/test_canaries.py` runs them all and demands, for each check, at least one of either side, that every
broken case trips it with words for what, where and what to do, and that `healthy()` trips no check at all.
Give variants of the same kind (another family, machine, field).
Only ids of kind `check` stand in CANARIES. A file that outgrows 400 lines becomes two: `test_<area>_<part>.py` is
also read.
Tests that say more (which words, which changes) are ordinary functions below the data.
"""

from __future__ import annotations

from zhibei.doctor.facts.facts import Facts

Canaries = dict[str, tuple[list[Facts], list[Facts]]]
