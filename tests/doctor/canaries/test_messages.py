"""Canaries of area messages: its entries are read from logs only."""

from __future__ import annotations

from tests.doctor.canaries import Canaries

CANARIES: Canaries = {}
