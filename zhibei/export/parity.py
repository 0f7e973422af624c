"""Is a model that was merged, rewritten or quantised still the same model? Knows two sides that give logits and tokens.

Dimensions: T tokens of a row, V vocabulary. Figures are taken over the positions that have a next token.
KL = sum_v p_v (ln p_v - ln q_v) with p the reference, in nats per token: 0 for the same distribution, infinite never,
because both sides are softmaxes of finite logits.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from zhibei.config.errors import UserError
from zhibei.export.parity_limits import Limits
from zhibei.text.messages import Message

POSITIONS_AT_ONCE = 128
WARM_UP_TOKENS = 8
MOST_SHOWN = 3
MOST_NATS = 700.0  # exp of more is no number; a model that far off has failed anyway


class Side(Protocol):
    """One form of a model: a transformers folder, an adapter on its base, a GGUF file.

    A side loads its weights when logits are asked for and forgets them on `close`, so that a comparison never holds two
    models. `encode` spells special tokens out and adds nothing. `render` is the prompt after which the assistant
    speaks; it raises UserError where the template refuses the messages or where there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def bytes_on_disk(self) -> int: ...

    def logits(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """fp32 [T, V] of each row."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: Sequence[Message]) -> list[int]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Figures:
    """What one side is by itself. `tokens_per_second`: reading the rows, without loading."""

    name: str
    bytes_on_disk: int
    tokens_per_second: float
    perplexity: float
    vocabulary: int


@dataclass(frozen=True)
class Agreement:
    """How many of the texts or conversations gave the very same token ids, and the first that did not."""

    num_equal: int
    num_asked: int
    differing: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.num_equal == self.num_asked


@dataclass(frozen=True)
class ParityReport:
    """Two sides compared. `perplexity_change` is relative: 0.01 is one percent worse than the reference."""

    reference: Figures
    other: Figures
    num_rows: int
    num_tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    perplexity_change: float
    tokenizer: Agreement
    template: Agreement
    rows_from: str = ""
    kind: str = ""
    notes: tuple[str, ...] = field(default=())

    def failures(self, limits: Limits) -> list[str]:
        """What is beyond its limit, one sentence each; empty when the two are the same model for this purpose."""
        found = []
        for what, agreement in (("probe texts", self.tokenizer), ("conversations", self.template)):
            if not agreement.is_whole:
                missed = agreement.num_asked - agreement.num_equal
                found.append(f"{missed} of {agreement.num_asked} {what} give other tokens: {agreement.differing[0]}")
        if self.kl_mean > limits.kl_mean:
            found.append(f"KL {self.kl_mean:.3g} nats per token, at most {limits.kl_mean:g}")
        if self.top1_agreement < limits.top1_agreement:
            found.append(
                f"the likeliest token agrees in {self.top1_agreement:.2%}, at least {limits.top1_agreement:.1%}"
            )
        if self.perplexity_change > limits.perplexity_change:
            change = f"{self.perplexity_change:+.2%}, at most {limits.perplexity_change:+.1%}"
            found.append(f"perplexity {self.reference.perplexity:.4g} became {self.other.perplexity:.4g} ({change})")
        return found

    def require(self, limits: Limits) -> None:
        """Raises UserError when something is beyond its limit; nothing is changed or removed here."""
        if found := self.failures(limits):
            raise UserError(
                f"{self.other.name} is not the model that {self.reference.name} is: {'; '.join(found)}",
                expected=f"the same tokens for the same words, and {limits.reason}",
                fix="keep what it was made from, which is untouched; if the rows are unlike what the model is for, "
                "name a text of yours to compare on, or choose a form that loses less",
                where=self.other.name,
            )

    def as_dict(self, limits: Limits | None = None) -> dict[str, Any]:
        """For parity.json and `--json`; with `limits`, also these and the verdict."""
        whole = asdict(self)
        whole["other"]["share_of_size"] = self.other.bytes_on_disk / max(1, self.reference.bytes_on_disk)
        if limits is not None:
            whole |= {"limits": asdict(limits), "failures": self.failures(limits)}
        return whole


def compare(
    reference: Side,
    other: Side,
    *,
    rows: Sequence[Sequence[int]],
    conversations: Sequence[Sequence[Message]] = (),
    probes: Sequence[str] = (),
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> ParityReport:
    """Compare two sides on rows of token ids (of the reference's tokenizer), conversations and probe texts.

    The reference's log-probabilities wait in a temporary file: 4 bytes x tokens x vocabulary. Raises UserError when no
    row has two tokens, or when a side gives NaN or infinity.
    """
    rows = [list(row) for row in rows if len(row) > 1]
    if not rows:
        raise UserError(
            "nothing to compare on: no row has two tokens",
            expected="rows of at least two tokens",
            fix="name a text file with some sentences in it",
        )
    tokenizer = _agreement(reference.encode, other.encode, probes, shown=repr)
    template = _agreement(reference.render, other.render, conversations, shown=_shown)
    sums = _Sums()
    with tempfile.TemporaryDirectory(prefix="zhibei-parity-") as folder:
        mine = _read(reference, rows, progress, lambda n, row, logits_TV: np.save(f"{folder}/{n}.npy", logits_TV))
        theirs = _read(
            other, rows, progress, lambda n, row, logits_TV: sums.add(np.load(f"{folder}/{n}.npy"), logits_TV)
        )
    notes = ()
    if mine.vocabulary != theirs.vocabulary:
        fewer = min(mine.vocabulary, theirs.vocabulary)
        notes = (
            f"{mine.name} has {mine.vocabulary:,} logits and {theirs.name} {theirs.vocabulary:,}: compared over the "
            f"first {fewer:,}",
        )
    return ParityReport(
        reference=mine,
        other=theirs,
        num_rows=len(rows),
        num_tokens=sums.num_tokens,
        kl_mean=sums.kl / sums.num_tokens,
        kl_max=sums.kl_max,
        top1_agreement=sums.num_agreeing / sums.num_tokens,
        perplexity_change=theirs.perplexity / mine.perplexity - 1,
        tokenizer=tokenizer,
        template=template,
        notes=notes,
    )


def _read(
    side: Side,
    rows: Sequence[Sequence[int]],
    progress: Callable[[str, int, int], Any],
    use: Callable[[int, Sequence[int], np.ndarray], Any],
) -> Figures:
    """Give every row to a side and its logits to `use`; the side forgets its weights at the end, whatever happens."""
    seconds, nll, num_tokens, vocabulary = 0.0, 0.0, 0, 0
    try:
        side.logits([rows[0][:WARM_UP_TOKENS]])  # loads the weights, which is not reading speed
        for number, row in enumerate(rows):
            start = time.perf_counter()
            logits_TV = side.logits([row])[0]
            seconds += time.perf_counter() - start
            _require_sound(side.name, row, logits_TV)
            vocabulary = logits_TV.shape[1]
            nll += _nll(logits_TV, row)
            num_tokens += len(row) - 1
            use(number, row, logits_TV)
            progress(side.name, number + 1, len(rows))
    finally:
        side.close()
    total = sum(map(len, rows))
    perplexity = math.exp(min(nll / num_tokens, MOST_NATS))
    return Figures(side.name, side.bytes_on_disk, total / max(seconds, 1e-9), perplexity, vocabulary)


def _require_sound(name: str, row: Sequence[int], logits_TV: np.ndarray) -> None:
    if not np.isfinite(logits_TV).all():
        raise UserError(
            f"{name} gives NaN or infinity",
            expected="finite logits",
            fix="zhibei verify tells whether its weights are finite; in fp16 values beyond 65504 become infinite",
            where=name,
        )
    if max(row) >= logits_TV.shape[1]:
        raise UserError(
            f"{name} has logits for {logits_TV.shape[1]:,} tokens, and the rows hold token {max(row):,}",
            expected="a model that knows every token of the other's tokenizer",
            fix="compare models that share a tokenizer",
            where=name,
        )


def log_probabilities(logits_TV: np.ndarray) -> np.ndarray:
    """ln softmax over the last dimension in float64."""
    shifted_TV = logits_TV.astype(np.float64)
    shifted_TV -= shifted_TV.max(axis=1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))


def _nll(logits_TV: np.ndarray, row: Sequence[int]) -> float:
    """Nats of the whole row's next tokens."""
    total = 0.0
    for start in range(0, len(row) - 1, POSITIONS_AT_ONCE):
        end = min(start + POSITIONS_AT_ONCE, len(row) - 1)
        logp_TV = log_probabilities(logits_TV[start:end])
        total -= float(logp_TV[np.arange(end - start), list(row[start + 1 : end + 1])].sum())
    return total


@dataclass
class _Sums:
    kl: float = 0.0
    kl_max: float = 0.0
    num_agreeing: int = 0
    num_tokens: int = 0

    def add(self, reference_TV: np.ndarray, other_TV: np.ndarray) -> None:
        """One row; the last position has no next token and is left out."""
        fewer = min(reference_TV.shape[1], other_TV.shape[1])
        for start in range(0, len(reference_TV) - 1, POSITIONS_AT_ONCE):
            part = slice(start, min(start + POSITIONS_AT_ONCE, len(reference_TV) - 1))
            p_TV = log_probabilities(reference_TV[part, :fewer])
            q_TV = log_probabilities(other_TV[part, :fewer])
            # Rounding can make the sum of a perfect match a little negative.
            kl_T = np.maximum((np.exp(p_TV) * (p_TV - q_TV)).sum(axis=1), 0.0)
            self.kl += float(kl_T.sum())
            self.kl_max = max(self.kl_max, float(kl_T.max()))
            self.num_agreeing += int((p_TV.argmax(axis=1) == q_TV.argmax(axis=1)).sum())
            self.num_tokens += len(kl_T)


def _agreement(
    mine: Callable[[Any], list[int]], theirs: Callable[[Any], list[int]], asked: Sequence[Any], *, shown: Callable
) -> Agreement:
    """Same ids, or refused by both."""
    differing = []
    for one in asked:
        a, b = _ids_or_refusal(mine, one), _ids_or_refusal(theirs, one)
        if a != b:
            differing.append(f"{shown(one)}: {_first_difference(a, b)}")
    return Agreement(len(asked) - len(differing), len(asked), tuple(differing[:MOST_SHOWN]))


def _ids_or_refusal(give: Callable[[Any], list[int]], asked: Any) -> list[int] | None:
    try:
        return list(give(asked))
    except UserError:
        return None


def _first_difference(a: list[int] | None, b: list[int] | None) -> str:
    if a is None or b is None:
        return "refused by the reference only" if a is None else "refused by the other only"
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"from token {place} on {a[place : place + 4]} and {b[place : place + 4]}"


def _shown(messages: Sequence[Message]) -> str:
    return " / ".join(f"{message.role}: {message.content[:20]!r}" for message in messages)
