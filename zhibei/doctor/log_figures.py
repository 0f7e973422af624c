"""Trouble that shows in a log's numbers although no message names it, whoever wrote the log. Knows no pages.

Reads records such as `{'loss': 0.0, 'grad_norm': nan}`, a line of metrics.jsonl, `loss=0.69` behind a progress bar,
or `step 10 | loss 10.4 | grad norm 1.2`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

NUMBER = r"[-+]?(?:nan|inf(?:inity)?|null|\d+(?:,\d{3})*(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)"
NAMES = {
    "loss": r"(?:train(?:ing)?[/_ ])?(?:lm[ _])?loss(?:/train)?",
    "gradient": r"(?:train/)?(?:global_)?grad(?:ient)?[_ ]?norm",
    "heldout": r"(?:eval|valid(?:ation)?|val|held[-_ ]?out)[-/_ ]loss",
    "kl": r"(?:objective/|ppo/)?(?:mean_)?kl(?:_div(?:ergence)?)?",
    "margin": r"rewards?/margins?",
    "accuracy": r"(?:rewards?/)?(?:accuracies|accuracy|acc)",
    "rate": r"learning_rate|lr",
    "step": r"(?:global_)?step",
    "epoch": r"epoch",
    "scale": r"(?:loss|grad)[_ ]?scale",
}
FIGURE = re.compile(
    r"(?<![\w/.-])['\"]?(?:" + "|".join(f"(?P<{key}>{name})" for key, name in NAMES.items()) + r")['\"]?"
    rf"\s*(?:[:=|]|\s)\s*['\"]?(?P<value>{NUMBER})(?![\w%])",
    re.IGNORECASE,
)
NOT_FINITE = re.compile(r"\"not_finite\": ?\{([^}]*)\}")
POLICY = re.compile(r"reward|\bkl\b|clip_ratio|advantage|completion", re.IGNORECASE)
"""Policy methods log a loss near zero when all is well."""

LN2 = math.log(2)
PINNED = 5
SMALLEST_VOCABULARY_LOSS, LARGEST_VOCABULARY_LOSS = math.log(25_000), math.log(320_000)


@dataclass(frozen=True, slots=True)
class Record:
    """The figures of one line; NaN where the log says nan or null."""

    line: int
    text: str
    figures: Mapping[str, float]
    is_policy: bool


@dataclass(frozen=True, slots=True)
class Signature:
    """Pitfalls that fit the numbers, the likeliest first, and the lines that show it."""

    pitfalls: tuple[str, ...]
    lines: tuple[tuple[int, str], ...]
    says: str


def record_of(line: int, text: str) -> Record | None:
    """The figures of a line, or None when it has none."""
    figures: dict[str, float] = {}
    for match in FIGURE.finditer(text):
        if match.lastgroup and (key := next(name for name in NAMES if match.group(name))) not in figures:
            value = match.group("value").lower().replace(",", "")
            figures[key] = math.nan if value == "null" else float(value)
    for match in NOT_FINITE.finditer(text):  # as our metrics.jsonl writes NaN
        figures |= {key: math.nan for key, name in NAMES.items() if re.search(f'"{name}": ?"nan"', match.group(1))}
    return Record(line, text, figures, POLICY.search(text) is not None) if figures else None


@dataclass(slots=True)
class FigureWatch:
    """Follows the records of one log with a few counters, so that a log may be of any length."""

    first: list[Record] = field(default_factory=list)
    """The first records with a loss."""
    last_loss: Record | None = None
    count: int = 0
    lowest: float = math.inf
    runs: dict[str, list[Record]] = field(default_factory=dict)
    """Consecutive records for which a condition holds, the first PINNED of them."""
    lengths: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    """Conditions that some record did not meet."""
    kept: dict[str, list[Record]] = field(default_factory=dict)
    """Conditions that held long enough."""
    done: list[Signature] = field(default_factory=list)
    """Of earlier runs in the same log."""
    progress: float = 0.0
    resumed_at: int | None = None
    since_resume: int = 0

    def see(self, record: Record) -> None:
        figures = record.figures
        self._follow(figures.get("step", figures.get("epoch")))
        if "loss" in figures:
            self._see_loss(record)
        for name, (holds, needed) in CONDITIONS.items():
            verdict = holds(record, self)
            if verdict is None:
                continue
            if not verdict:
                self.broken.add(name)
                self.runs.pop(name, None)
                self.lengths[name] = 0
                continue
            run = self.runs.setdefault(name, [])
            self.lengths[name] = self.lengths.get(name, 0) + 1
            if len(run) < PINNED:
                run.append(record)
            if self.lengths[name] >= needed and name not in self.kept:
                self.kept[name] = run
        if "loss" in figures and math.isfinite(figures["loss"]) and figures["loss"] != 0:
            self.lowest = min(self.lowest, figures["loss"])

    def _follow(self, progress: float | None) -> None:
        """A log may hold several runs, each beginning anew; one that is taken up again is the same run."""
        if progress is None:
            return
        if progress < self.progress / 2 and not _just_resumed(self):
            self.done += self.signatures()
            self.first, self.last_loss, self.count, self.lowest = [], None, 0, math.inf
            for kept in (self.runs, self.lengths, self.broken, self.kept):
                kept.clear()
        self.progress = progress

    def _see_loss(self, record: Record) -> None:
        self.count += 1
        self.since_resume += 1
        if len(self.first) < PINNED:
            self.first.append(record)
        self.last_loss = record

    def resumed(self, line: int) -> None:
        """A line said that a run is taken up again."""
        if self.count:
            self.resumed_at, self.since_resume = line, 0

    def signatures(self) -> Iterator[Signature]:
        """What the numbers of the whole log amount to, the surest first."""
        yield from self.done
        said = {one.says for one in self.done}
        for name, (pitfalls, says, through_the_end) in MEANINGS.items():
            if name in self.kept and says not in said and not (through_the_end and name in self.broken):
                yield Signature(pitfalls, tuple((one.line, one.text) for one in self.kept[name][:3]), says)


def _zero_and_nan(record: Record, _: FigureWatch) -> bool | None:
    loss, gradient = record.figures.get("loss"), record.figures.get("gradient")
    return None if loss is None or gradient is None else loss == 0 and math.isnan(gradient)


def _nan(record: Record, _: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    return None if loss is None else math.isnan(loss)


def _nothing_to_learn(record: Record, watch: FigureWatch) -> bool | None:
    loss, gradient = record.figures.get("loss"), record.figures.get("gradient", 0.0)
    if loss is None or record.is_policy:
        return None
    return loss == 0 and gradient == 0 and watch.lowest == math.inf


def _at_ln_vocabulary(record: Record, watch: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    if loss is None or record.is_policy or watch.count > PINNED:
        return None
    return SMALLEST_VOCABULARY_LOSS - 0.6 < loss < LARGEST_VOCABULARY_LOSS + 0.6


def _second_step_wrong(record: Record, watch: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    if loss is None or watch.count != 2 or not watch.first:
        return None
    return watch.first[0].figures["loss"] < 4 and loss > 9


def _diverged(record: Record, watch: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    if loss is None or record.is_policy or watch.count < 3 or _just_resumed(watch):
        return None
    return loss > max(3 * watch.lowest, watch.lowest + 4)


def _worse_after_resume(record: Record, watch: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    if loss is None or not _just_resumed(watch):
        return None
    return loss > max(2 * watch.lowest, watch.lowest + 2)


def _just_resumed(watch: FigureWatch) -> bool:
    return watch.resumed_at is not None and watch.since_resume <= 3


def _at_ln2(record: Record, _: FigureWatch) -> bool | None:
    loss = record.figures.get("loss")
    return None if loss is None else abs(loss - LN2) < 1.5e-4


def _no_margin(record: Record, _: FigureWatch) -> bool | None:
    margin = record.figures.get("margin")
    return None if margin is None else margin == 0


def _negative_kl(record: Record, _: FigureWatch) -> bool | None:
    kl = record.figures.get("kl")
    return None if kl is None else kl < -1


def _heldout_nan(record: Record, watch: FigureWatch) -> bool | None:
    heldout = record.figures.get("heldout")
    if heldout is None:
        return None
    last = watch.last_loss.figures["loss"] if watch.last_loss else 1.0
    return math.isnan(heldout) and math.isfinite(last)


def _scale_gone(record: Record, _: FigureWatch) -> bool | None:
    scale = record.figures.get("scale")
    return None if scale is None else 0 < scale < 1 or (scale == 1 and "overflow" in record.text.lower())


def _no_gradient(record: Record, _: FigureWatch) -> bool | None:
    loss, gradient = record.figures.get("loss"), record.figures.get("gradient")
    return None if loss is None or gradient is None else gradient == 0 and loss > 0


def _no_rate(record: Record, _: FigureWatch) -> bool | None:
    rate = record.figures.get("rate")
    return None if rate is None or "loss" not in record.figures else rate == 0


Condition = Callable[[Record, FigureWatch], bool | None]
CONDITIONS: dict[str, tuple[Condition, int]] = {
    "zero_and_nan": (_zero_and_nan, 2),
    "nan": (_nan, 2),
    "nothing_to_learn": (_nothing_to_learn, 3),
    "at_ln_vocabulary": (_at_ln_vocabulary, 3),
    "second_step_wrong": (_second_step_wrong, 1),
    "worse_after_resume": (_worse_after_resume, 1),
    "diverged": (_diverged, 2),
    "no_margin": (_no_margin, 4),
    "at_ln2": (_at_ln2, 4),
    "negative_kl": (_negative_kl, 2),
    "heldout_nan": (_heldout_nan, 1),
    "scale_gone": (_scale_gone, 3),
    "no_gradient": (_no_gradient, 4),
    "no_rate": (_no_rate, PINNED),
}
"""What is asked of each record (None: it does not say), and how many records in a row must say yes."""

MEANINGS: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "zero_and_nan": (
        ("nan-loss-logged-as-zero", "truncation-removes-all-targets", "vicuna-mask-offset-mismatch",
         "fp16-on-bf16-pretrained-nan"),
        "the loss is logged as 0 while the gradient is NaN", False,
    ),
    "nan": (
        ("pure-fp16-no-master-weights-nan", "fp16-on-bf16-pretrained-nan", "truncation-removes-all-targets"),
        "the loss is NaN step after step", False,
    ),
    "nothing_to_learn": (
        ("response-template-no-match-all-masked", "single-token-marker-not-found", "vicuna-mask-offset-mismatch"),
        "the loss is exactly 0 from the first step on", True,
    ),
    "second_step_wrong": (
        ("fp16-bf16-llama-neox-wrong-weights-map", "lora-rank-with-fixed-lr-diverges"),
        "the loss is sound in the first step and that of random weights in the second", False,
    ),
    "at_ln_vocabulary": (
        ("fsdp-init-random-instead-of-pretrained", "fsdp-ram-efficient-uninit-weights"),
        "the loss starts at ln(vocabulary): the weights are random, right only in training from scratch", False,
    ),
    "worse_after_resume": (
        ("lora-resume-weights-not-loaded", "resume-model-structure-changed"),
        "the loss is far higher after the resume than before it", False,
    ),
    "diverged": (
        ("lora-rank-with-fixed-lr-diverges",),
        "the loss fell and then rose to several times its lowest value", False,
    ),
    "no_margin": (
        ("dpo-ref-deepcopy-shares-peft", "dpo-data-identical-pairs"),
        "policy and reference agree exactly in every record", True,
    ),
    "at_ln2": (
        ("dpo-ref-deepcopy-shares-peft", "dpo-data-identical-pairs", "pref-pair-identical-after-truncation"),
        "the loss is ln 2 = 0.6931 in every record: nothing tells the two answers apart", True,
    ),
    "negative_kl": (
        ("ppo-negative-kl-generation-kwargs", "rollout-sampling-params-from-generation-config",
         "ppo-kl-reported-not-trained"),
        "the KL divergence is negative, which it cannot be", False,
    ),
    "heldout_nan": (
        ("eval-nan-response-template-truncated",),
        "the held-out loss is NaN while the training loss is finite", False,
    ),
    "scale_gone": (
        ("ds-loss-scale-collapse", "ds-fp16-all-steps-skipped"),
        "the loss scale has fallen to nothing: every step is skipped", False,
    ),
    "no_gradient": (
        ("gc-lora-silent-partial-training", "lora-resume-trainable-zero"),
        "the gradient is exactly 0 in every record although there is a loss", True,
    ),
    "no_rate": (
        ("ds-fp16-all-steps-skipped",),
        "the learning rate is 0 in every record: no step was taken", True,
    ),
}  # fmt: skip
"""Pitfalls, what the numbers say, and whether every record of the log must agree."""
