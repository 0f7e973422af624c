"""Gathers the facts of a run part by part, by the steps the run itself would take; a part that fails hides no other.

Loads no weights. Rows are prepared into the cache, so training afterwards reads them from there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.policy import PolicySection
from zhibei.config.resolve import ResolvedRun, plan_intervals, with_planned
from zhibei.config.run import DataSection, RunFile
from zhibei.data.prepare import prepare
from zhibei.data.prepared import PreparedSet
from zhibei.data.prepared_cache import cache_root
from zhibei.data.readers import read_sources
from zhibei.data.records import BrokenRecord
from zhibei.data.steps import num_steps_of, require_steps
from zhibei.doctor.facts.environment import EnvironmentFacts, read_environment
from zhibei.doctor.facts.facts import Defect, Facts
from zhibei.doctor.facts.hand_over import HandOverFacts, read_hand_over
from zhibei.doctor.facts.machine import read_machine
from zhibei.doctor.facts.model import AdapterFacts, ModelFacts, read_adapter_facts, read_model, with_row_norms
from zhibei.doctor.facts.output import read_output
from zhibei.doctor.facts.planned import with_plan
from zhibei.doctor.facts.rows import read_pair_facts, read_row_facts
from zhibei.doctor.facts.text import TokenizerFacts, num_ids_of, read_template_facts, read_tokenizer_facts
from zhibei.model.locate import locate
from zhibei.plan.machines import Machine
from zhibei.store.run_dir import RunDir
from zhibei.text.families import find_template
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer
from zhibei.train.beginning import load_run_tokenizer, run_dir_of
from zhibei.train.schedule import require_peak

Result = TypeVar("Result")
OnRows = Callable[[int, str], None]
MOST_BROKEN_RECORDS = 8
"""So many broken records are told one by one."""


@dataclass
class Parts:
    """What was gathered so far: `get` runs one part and keeps what it refuses instead of raising it."""

    faults: list[UserError] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)

    def get(self, name: str, read: Callable[[], Result]) -> Result | None:
        """The part, or None when it cannot be had; the reason is then among the faults or defects."""
        try:
            return read()
        except SeveralErrors as several:
            self.faults.extend(several.errors)
        except UserError as fault:
            self.faults.append(fault)
        except Exception as error:  # a gatherer that fails must not hide what the others see
            self.defects.append(Defect.of(name, error))
        return None


def gather_facts(
    resolved: ResolvedRun,
    *,
    machine: Machine | None = None,
    on_rows: OnRows | None = None,
    resume: RunDir | None = None,
) -> Facts:
    """Everything that can be known about a run before its weights are loaded.

    `machine` stands in for this one. `resume`: the run goes on in that directory, so what lies there is its own.
    Raises nothing for a broken run: what a part refuses is in `faults`, and what needs that part is None.
    """
    run, parts = resolved.run, Parts()
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="facts") as beside:
        # Looking at the machine waits for other programs, so it goes on beside the reading of rows.
        environment = beside.submit(parts.get, "environment", lambda: read_environment(run, machine=machine))
        around = beside.submit(parts.get, "machine", read_machine) if machine is None else None
        words = _read_words(run, parts)
        rows = _read_rows(run, words, parts, on_rows)
        facts = Facts(
            machine=machine or (around.result() if around else None) or Machine("unknown"),
            environment=environment.result() or EnvironmentFacts(),
            resolved=_planned(resolved, rows, parts),
            output=parts.get("output", lambda: read_output(run_dir_of(run), resume=resume)),
            is_resumed=resume is not None,
        )
    facts = _with_reward(_with_model(facts, parts), parts)
    facts = _with_text(facts, words, parts)
    facts = _with_hand_over(_with_row_norms(facts, parts), words, parts)
    facts = _with_rows(facts, words, rows, Gathering(parts, on_rows))
    facts = _with_plan(facts, rows, parts)
    return replace(facts, faults=_distinct(parts.faults), defects=tuple(parts.defects))


@dataclass(frozen=True)
class Gathering:
    """What every part needs beside the facts."""

    parts: Parts
    on_rows: OnRows | None = None


@dataclass(frozen=True)
class Words:
    """What turns text into ids, as far as it could be loaded."""

    tokenizer: Tokenizer | None = None
    template: Template | None = None


def _read_words(run: RunFile, parts: Parts) -> Words:
    tokenizer = parts.get("tokenizer", lambda: load_run_tokenizer(run))
    if tokenizer is None:
        return Words()
    return Words(tokenizer, parts.get("template", lambda: find_template(run.data.template, tokenizer)))


def _read_rows(run: RunFile, words: Words, parts: Parts, on_rows: OnRows | None) -> PreparedSet | None:
    """The prepared rows of supervised training; the other stages read their own kind of rows.

    Where they cannot be had, the records are still read, so that broken ones are found beside a broken tokenizer.
    """
    tokenizer, template = words.tokenizer, words.template
    if run.stage != "sft":
        return None
    if tokenizer is not None and template is not None:
        before = len(parts.faults)
        rows = parts.get("rows", lambda: prepare(run, tokenizer, template, progress=on_rows))
        if rows is not None or len(parts.faults) == before:
            return rows
    broken = parts.get("rows", lambda: _broken_records(run.data))
    if broken:
        # The refusal of the first one is replaced by all of them.
        parts.faults[:] = [fault for fault in parts.faults if fault.where != broken[0].where]
        parts.faults.extend(broken)
    return None


def _broken_records(data: DataSection) -> list[UserError]:
    """The first broken records of all sources. Raises UserError where a file as a whole cannot be read."""
    found: list[UserError] = []
    if data.on_error == "drop":
        return found
    for _, record in read_sources(data.model_copy(update={"on_error": "drop"})):
        if isinstance(record, BrokenRecord):
            found.append(record.as_error())
            if len(found) == MOST_BROKEN_RECORDS:
                break
    return found


def _planned(resolved: ResolvedRun, rows: PreparedSet | None, parts: Parts) -> ResolvedRun:
    """The run with the values that follow from its rows, as training fills them in."""
    if rows is None:
        return resolved
    return parts.get("steps", lambda: planned_by_rows(resolved, rows)) or resolved


def planned_by_rows(resolved: ResolvedRun, rows: PreparedSet) -> ResolvedRun:
    """Intervals and template filled in. Raises UserError when the rows do not make a single step."""
    run = resolved.run
    longest = int(rows.train.lengths.max(initial=0))
    training = run.training
    require_steps(
        len(rows.train),
        longest,
        global_batch=training.global_batch,
        micro_batch_tokens=max(longest, training.tokens_per_pass)
        if training.micro_batch_tokens == "auto"
        else training.tokens_per_pass,
    )
    num_steps = num_steps_of(
        len(rows.train),
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )
    require_peak(training, num_steps)
    named = {} if run.data.template == rows.template else {"data.template": rows.template}
    return with_planned(resolved, {**plan_intervals(run, num_steps=num_steps), **named})


def _with_model(facts: Facts, parts: Parts) -> Facts:
    run = facts.run
    model = parts.get("model", lambda: read_model(run.model, run.lora, cache=cache_root(run.data.cache)))
    folder = run.lora.adapter or parts.get("model", lambda: locate(run.model.path).adapter)
    if folder is None:
        return replace(facts, model=model)
    return replace(facts, model=model, adapter=parts.get("adapter", lambda: _read_adapter(facts, folder)))


def _read_adapter(facts: Facts, folder: str | Path) -> AdapterFacts:
    """Its facts; a refusal says which field of the run file names the folder."""
    try:
        return read_adapter_facts(folder)
    except UserError as error:
        key = "lora.adapter" if facts.run.lora.adapter is not None else "model.path"
        where = f"{facts.origin(key)}, {key}: {folder}"
        raise UserError(error.what, expected=error.expected, fix=error.fix, where=where) from None


def _with_reward(facts: Facts, parts: Parts) -> Facts:
    section = facts.run.training
    path = section.reward_model if isinstance(section, PolicySection) else None
    if path is None:
        return facts
    return replace(facts, reward=parts.get("reward model", lambda: _read_reward(facts.run, path)))


def _read_reward(run: RunFile, path: str) -> ModelFacts:
    section = run.model.model_copy(update={"path": path, "revision": None})
    try:
        reward = read_model(section, run.lora, cache=cache_root(run.data.cache))
        folder = locate(path).adapter
        tensors = read_adapter_facts(folder).tensors if folder is not None else {}
    except UserError as fault:
        where = "ppo.reward_model" if fault.where in ("", "model.path") else fault.where
        raise UserError(fault.what, expected=fault.expected, fix=fault.fix, where=where) from fault
    return replace(reward, tensors={**reward.tensors, **tensors})


def _with_text(facts: Facts, words: Words, parts: Parts) -> Facts:
    tokenizer, template = words.tokenizer, words.template
    if tokenizer is None:
        return facts
    facts = replace(facts, tokenizer=parts.get("tokenizer", lambda: _tokenizer(facts, tokenizer)))
    if template is None:
        return facts
    return replace(facts, template=parts.get("template", lambda: read_template_facts(template, tokenizer)))


def _tokenizer(facts: Facts, tokenizer: Tokenizer) -> TokenizerFacts:
    found = read_tokenizer_facts(tokenizer, facts.model)
    if facts.run.model.tokenizer is None or facts.model is None or facts.model.folder is None:
        return found
    return replace(found, models_own_ids=num_ids_of(facts.model.folder))


def _with_hand_over(facts: Facts, words: Words, parts: Parts) -> Facts:
    """What the exporters say to the forms that are asked for."""
    if not facts.run.hand_over:
        return facts
    rows = facts.model.embedding_rows if facts.model is not None else None
    adapter = facts.adapter.path if facts.adapter is not None else None

    def read() -> HandOverFacts:
        return read_hand_over(facts.run, tokenizer=words.tokenizer, num_rows=rows, adapter=adapter)

    return replace(facts, hand_over=parts.get("hand over", read))


def _with_row_norms(facts: Facts, parts: Parts) -> Facts:
    """How the embeddings of the template's control tokens compare with the others: untrained ones are far too small."""
    model, template = facts.model, facts.template
    if model is None or template is None:
        return facts
    pieces = [ids for ids in template.special_pieces.values() if len(ids) == 1]
    numbers = {ids[0] for ids in pieces} | set(template.terminator_ids)
    return replace(facts, model=parts.get("model", lambda: with_row_norms(model, numbers)) or model)


def _with_rows(facts: Facts, words: Words, rows: PreparedSet | None, gathering: Gathering) -> Facts:
    tokenizer, template, parts, run = words.tokenizer, words.template, gathering.parts, facts.run
    if rows is not None:
        return replace(facts, rows=parts.get("rows", lambda: read_row_facts(run, rows)))
    if tokenizer is None or template is None or run.stage == "sft":
        return facts
    pairs = parts.get("pairs", lambda: read_pair_facts(run, tokenizer, template, on_rows=gathering.on_rows))
    if pairs is None or facts.resolved is None:
        return facts
    planned = plan_intervals(run, num_steps=pairs.num_steps)
    return replace(facts, pairs=pairs, resolved=with_planned(facts.resolved, planned))


def _with_plan(facts: Facts, rows: PreparedSet | None, parts: Parts) -> Facts:
    """Memory and disk, as the run will be trained; not known where the model's sizes are not.

    Where a fault hides the rows, nothing is planned: full rows would ask for more than the run will.
    """
    if facts.rows is None and facts.pairs is None and (facts.faults or parts.faults):
        return facts
    return parts.get("plan", lambda: with_plan(facts, rows)) or facts


def _distinct(faults: list[UserError]) -> tuple[UserError, ...]:
    """One cause is often met twice: a wrong model path stops both the tokenizer and the weights."""
    return tuple({str(fault): fault for fault in faults}.values())
