"""The plan of a run from its facts, and its row lengths where only the cache knows them. Prepares and loads nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.resolve import with_planned
from zhibei.config.run import DataSection, RunFile
from zhibei.data.prepared import PreparedSet
from zhibei.data.prepared_cache import cache_root
from zhibei.data.readers import as_source
from zhibei.doctor.facts.facts import Facts
from zhibei.plan.job import Rows, rows_of_lengths
from zhibei.plan.machines import Machine
from zhibei.plan.search import ONE_CARD, search, what_would_fit
from zhibei.plan.settle import settle
from zhibei.plan.shapes import ModelShape
from zhibei.store.files import read_json

SAME_MASKING = ("max_tokens", "too_long", "supervise", "validation", "system")


def planned_rows(run: RunFile) -> Rows:
    """Row lengths of a set that was prepared from the same sources and settings, the newest one; else full rows.

    Tokenizer and template are not compared: that would take loading them, and lengths hardly differ.
    """
    folder = _prepared_folder(run.data) if run.stage == "sft" else None
    if folder is not None:
        try:
            borders = np.load(folder / "train.borders.npy", mmap_mode="r", allow_pickle=False)
            lengths = np.diff(borders)
            if len(lengths):
                return rows_of_lengths(lengths.tolist(), global_batch=run.training.global_batch)
        except (OSError, ValueError):
            pass  # a damaged set is made again by the run; full rows are the safe assumption
    return assumed_rows(run)


def assumed_rows(run: RunFile) -> Rows:
    """Every row as long as data.max_tokens allows (pairs: two of them)."""
    return Rows(longest=run.data.max_tokens, mean_tokens=float(run.data.max_tokens))


def _prepared_folder(data: DataSection) -> Path | None:
    wanted = [as_source(source).model_dump(mode="json") for source in data.sources]
    masking = data.model_dump(mode="json", include=set(SAME_MASKING))
    found = []
    for index in (cache_root(data.cache) / "prepared").glob("*/index.json"):
        made = _made_of(index)
        same = made.get("sources") == wanted and made.get("kind", "rows") == "rows"
        if same and all(made.get("masking", {}).get(key) == value for key, value in masking.items()):
            found.append((index.stat().st_mtime, index.parent))
    return max(found)[1] if found else None


def _made_of(index: Path) -> dict[str, Any]:
    try:
        content = read_json(index)
    except (OSError, UserError):
        return {}
    made = content.get("made_of") if isinstance(content, dict) else None
    return made if isinstance(made, dict) else {}


def with_plan(facts: Facts, prepared: PreparedSet | None) -> Facts:
    """The facts with the plan of the run on their machine, and with the values that the plan fills in.

    Planned is for the ranks that were started (one, unless WORLD_SIZE says otherwise). Nothing is planned for a model
    whose sizes are not known.
    """
    run, shape = facts.run, facts.model.shape if facts.model is not None else None
    if shape is None or facts.resolved is None:
        return facts
    lengths = prepared.train.lengths.tolist() if prepared is not None else []
    rows = rows_of_lengths(lengths, global_batch=run.training.global_batch) if lengths else assumed_rows(run)
    # A run that is told to compute on the CPU uses no card that may be there.
    machine = replace(facts.machine, gpus=()) if run.device == "cpu" else facts.machine
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    settled = settle(run, shape, machine, rows, ranks=ranks, per_node=per_node)
    facts = replace(facts, resolved=with_planned(facts.resolved, settled.values))
    if settled.search is None:
        return facts
    plan = settled.search.chosen.memory
    return replace(facts, plan=plan, plan_remedies=() if plan.fits else remedies_for(run, shape, machine, rows))


def remedies_for(run: RunFile, shape: ModelShape, machine: Machine, rows: Rows) -> tuple[str, ...]:
    """What would fit on one card, and whether all cards of the machine together would do."""
    one_card = replace(machine, gpus=machine.gpus[:1], num_nodes=1)
    found = what_would_fit(run, shape, one_card, rows, wishes=ONE_CARD)
    if len(machine.gpus) > 1:
        best = search(run, shape, replace(machine, num_nodes=1), rows).chosen
        if best.fits:
            found.insert(0, f"all {len(machine.gpus)} GPUs of this machine, by zhibei launch ({best.words})")
    return tuple(found)
