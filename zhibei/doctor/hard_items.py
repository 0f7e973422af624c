"""The materials of a rehearsal: those of the run, and for pairs and judged answers only the hardest of them.

A reference would otherwise be asked about every row of the run before the first step. Knows materials, no experiment.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from zhibei.data.batches import Batches
from zhibei.doctor.worst import Worst, WorstItems, as_passes, only_items, worst_items, worst_of
from zhibei.store.run_dir import RunDir
from zhibei.train.materials import Materials

SHORT_ITEMS = 3
HELDOUT_ITEMS = 4


def hardest(materials: Materials, run_dir: RunDir, *, step: int) -> tuple[Materials, Worst]:
    """What is rehearsed, and its hardest passes. `run_dir`: where a reference is kept, once `step` steps are done.

    Supervised rows stay whole: nothing has to be known of them beforehand.
    """
    if materials.task.unit == "token":
        return materials, worst_of(materials.batches)
    found = worst_items(materials.batches)
    shortest = np.argsort(materials.batches.item_lengths, kind="stable")[:SHORT_ITEMS]
    items = np.unique(np.concatenate([found.all, shortest]))
    heldout = None if materials.heldout is None else _longest(materials.heldout)
    small = replace(materials, batches=only_items(materials.batches, items), heldout=heldout)
    small = small.task.prepare(small, run_dir, step)
    return small, as_passes(_renumbered(found, items), small.batches)


def _longest(heldout: Batches) -> Batches:
    return only_items(heldout, np.argsort(-heldout.item_lengths, kind="stable")[:HELDOUT_ITEMS])


def _renumbered(found: WorstItems, items: np.ndarray) -> WorstItems:
    return replace(
        found,
        first=[np.searchsorted(items, group) for group in found.first],
        second=[np.searchsorted(items, group) for group in found.second],
    )
