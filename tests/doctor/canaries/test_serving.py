"""Canaries of area serving: it has no check, because nothing of a server stands in a run file."""

from __future__ import annotations

from tests.doctor.canaries import Canaries

CANARIES: Canaries = {}
