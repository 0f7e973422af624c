"""The rewards of a run file, ready to be asked: what it names, and its reward model. Knows sections, no loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zhibei.config.errors import UserError
from zhibei.config.policy import PolicySection
from zhibei.config.run import RunFile
from zhibei.data.batches import BatchPlan
from zhibei.data.prepared import PreparedRows
from zhibei.data.references import Question
from zhibei.generate.rewards import Answered, RewardSource, Scorer, needs_references, reward_source, summed
from zhibei.model.language_model import LanguageModel
from zhibei.model.locate import locate
from zhibei.model.roles import Roles
from zhibei.model.score_model import load_score_model_for_inference, row_scores
from zhibei.store.manifest import read_manifest, recorded, template_entry
from zhibei.store.reward_models import shared_judge
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer
from zhibei.train.experience import passes_of

Reward = Callable[[Answered], list[float]]
LONGEST_SCORING_SECONDS = 3600.0
"""For a batch of answers by a reward model, which no one but this process can slow down."""


@dataclass(frozen=True)
class RewardPlan:
    """What a run file's `reward` and `reward_model` are, looked at but not loaded. `shared`: the adapter folder of the
    reward model, where it can lie on the policy's base (zhibei/store/reward_models.py)."""

    function: RewardSource | None
    model_path: str | None
    shared: Path | None


def place_of_reward_model(run: RunFile) -> str | None:
    """What a person is told of where the reward model is held; None without one."""
    path = getattr(run.training, "reward_model", None)
    if path is None:
        return None
    if shared_judge(run) is not None:
        return f"the reward model {path} is one more adapter on the policy's base"
    return f"the reward model {path} is loaded beside the policy, a model of its own"


def plan_reward(
    run: RunFile, questions: Mapping[str, Question], *, tokenizer: Tokenizer, template: Template
) -> RewardPlan:
    """Raises UserError when neither reward nor reward_model is named, a named one cannot be, or results to compare with
    are missing: all that can be wrong before models are loaded."""
    section = run.training
    assert isinstance(section, PolicySection)
    function = None
    if section.reward is not None:
        where = f"{run.stage}.reward"
        function = reward_source(section.reward, seconds=section.reward_seconds, where=where)
        if needs_references(section.reward):
            require_references(questions, section.reward, where=where)
    if section.reward_model is not None:
        where = f"{run.stage}.reward_model"
        require_same_words(section.reward_model, tokenizer, template, where=where)
        require_accuracy(section.reward_model, section.min_reward_accuracy, where=where)
    elif function is None:
        raise UserError(
            f"{run.stage}.reward and {run.stage}.reward_model are both open: nothing says which answers are good",
            expected="a verifier, a function, a server or a reward model",
            fix=f"set {run.stage}.reward (for example number, or python:rewards.py:score), or {run.stage}.reward_model",
            where=f"{run.stage}.reward",
        )
    return RewardPlan(function, section.reward_model, shared_judge(run))


def reward_of(plan: RewardPlan, run: RunFile, roles: Roles, batches: BatchPlan, *, precision: str) -> Reward:
    """What the plan's sources give together; a reward model that is not on the policy's base is loaded here. `batches`:
    how answers share a forward pass. Raises UserError when it cannot be loaded."""
    section = run.training
    assert isinstance(section, PolicySection)
    sources = [] if plan.function is None else [plan.function]
    if plan.model_path is not None:
        if plan.shared is not None:
            score = model_scorer(roles.as_judge, batches)
        else:
            device = str(roles.policy.device)
            model = load_score_model_for_inference(plan.model_path, device=device, precision=precision)
            score = model_scorer(lambda: nullcontext(model), replace(batches, packing=False))
        seconds = max(section.reward_seconds, LONGEST_SCORING_SECONDS)
        sources.append(RewardSource(plan.model_path, score, seconds, f"{run.stage}.reward_model"))
    return sources[0] if len(sources) == 1 else summed(sources)


def require_references(questions: Mapping[str, Question], name: str, *, where: str) -> None:
    """Raises UserError when a prompt has no known result: every answer to it would count as wrong."""
    missing = [place for place, question in questions.items() if not (question.reference or "").strip()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} prompts have no result to compare with, e.g. {missing[0]}",
            expected=f"a reference in every record for the reward {name}",
            fix="add it to the records (an answer, or a field such as gt_answer), or use another reward",
            where=where,
        )


def manifest_of(path: str) -> Mapping[str, Any] | None:
    """The manifest of the run that a reward model comes from; None for a folder of somebody else."""
    found = locate(path).run
    return read_manifest(found.path) if found is not None and found.manifest.is_file() else None


def require_accuracy(path: str, least: float, *, where: str) -> None:
    """Raises UserError when the reward model orders fewer of its own held-out pairs rightly."""
    manifest = manifest_of(path)
    accuracy = None if manifest is None else recorded(manifest, "finished.heldout.accuracy")
    if accuracy is not None and accuracy < least:
        raise UserError(
            f"the reward model {path} orders {100 * accuracy:.0f} % of its held-out pairs rightly",
            expected=f"at least {100 * least:.0f} %; guessing has 50 %",
            fix="train it longer or on more pairs (zhibei report shows how it learned), or set "
            f"{where.partition('.')[0]}.min_reward_accuracy lower if you know why",
            where=where,
        )


def require_same_words(path: str, tokenizer: Tokenizer, template: Template, *, where: str) -> None:
    """Raises UserError when the reward model's run was made with another tokenizer or another template."""
    manifest = manifest_of(path)
    if manifest is None:
        return
    theirs, ours = recorded(manifest, "template.sha256"), template_entry("", jinja=template.as_jinja())["sha256"]
    if theirs is not None and theirs != ours:
        raise UserError(
            f"the reward model {path} learned from texts in the template {recorded(manifest, 'template.name')}, and "
            "this run renders its prompts in another",
            expected="prompts in the form that the reward model knows",
            fix=f"set data.template: {recorded(manifest, 'template.name')}, or train a reward model with this template",
            where=where,
        )
    theirs = recorded(manifest, "tokenizer.sha256")
    if theirs is not None and theirs != tokenizer.fingerprint:
        raise UserError(
            f"the reward model {path} was trained with another tokenizer ({str(theirs)[:12]}, the policy has "
            f"{tokenizer.fingerprint[:12]})",
            expected="policy and reward model of one tokenizer: the same ids must mean the same words",
            fix="train a reward model on the policy's base, or choose a policy of the reward model's family",
            where=where,
            pitfall="reward-model-of-another-vocabulary",
        )


def model_scorer(judge: Callable[[], AbstractContextManager[LanguageModel]], batches: BatchPlan) -> Scorer:
    """Scores of whole rows by a reward model, read at each row's last token. `judge` gives it, ready to score."""

    def score(answered: Answered) -> Sequence[float]:
        rows = unsupervised_rows(answered.tokens)
        room = max(batches.micro_batch_tokens, int(rows.lengths.max()))
        plan = replace(batches, micro_batch_tokens=room, rank=0, world=1)  # the answers are this rank's part already
        scores = np.zeros(len(rows))
        with judge() as model, torch.no_grad():
            for batch in passes_of(rows, range(len(rows)), plan):
                found_R = row_scores(model, batch.to(model.device), len(batch.row_numbers))
                scores[list(batch.row_numbers)] = found_R.float().cpu().numpy()
        return scores.tolist()

    return score


def unsupervised_rows(tokens: Sequence[Sequence[int]]) -> PreparedRows:
    """Token ids as rows of which nothing is learned."""
    lengths = [len(row) for row in tokens]
    return PreparedRows(
        tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in tokens]),
        supervised=np.zeros(sum(lengths), dtype=bool),
        borders=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        row_ids=[str(number) for number in range(len(lengths))],
    )
