"""What two forms of a model are compared on: texts, conversations and rows of tokens. Knows rows and runs, no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.data.prepared import AnswerRows, PreparedRows
from zhibei.data.prepared_cache import cache_root, fault_of, read_prepared, read_prepared_answers
from zhibei.store.files import read_json
from zhibei.store.manifest import read_manifest, recorded
from zhibei.store.run_dir import RunDir
from zhibei.text.messages import Message
from zhibei.text.tokenizer import Tokenizer

MOST_ROWS = 16
MOST_ROW_TOKENS = 256
MOST_TOKENS = 2048

TEXTS = (
    "",
    " ",
    "Hello, world!",
    " leading space and trailing space ",
    "two  spaces,   three spaces,\ttab\t\ttabs",
    "line one\nline two\n\n\nline five\r\nwindows line",
    "3.14159 1234567890 1,000,000 2026-11-24 0x7f 1e-4",
    "def f(x):\n    return x ** 2  # square\n",
    "It's don't we'll I'm you've they'd O'Neill",
    "naïve café Ångström ﬁ ½ ² e\u0301 \u00a0non-breaking",
    "中文分词：今天天气很好，我们去公园吧。",
    "日本語とかな、한국어, Русский, Ελληνικά, العربية, עברית, हिन्दी, ไทย",
    "🙂 👩‍👩‍👧‍👦 🇨🇳 \u200b zero width",
    "<s> </s> <unk> <pad> <|im_start|> <|endoftext|> [INST] <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "MiXeD CaSe CamelCaseWord snake_case_word kebab-case-word",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file",
    "«quotes» “curly” ‘single’ … — – · • → ≤ ∑ √",
)  # fmt: skip

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "What is the capital of France?"),),
    (Message("user", "  Keep my spaces, \n and my lines.\n"),),
    (Message("system", "Answer in one word."), Message("user", "Is water wet?")),
    (Message("user", "1 + 1 ="), Message("assistant", "2"), Message("user", "And 2 + 2?")),
    (
        Message("system", "You are kind."),
        Message("user", "讲一个故事"),
        Message("assistant", "从前有一座山。\n\n"),
        Message("user", "<b>然后</b> {{呢}}？"),
    ),
    (Message("user", "Write a short story about a dog and a cat."),),
    (Message("user", "Once upon a time, there was a little"),),
    (Message("user", "Explain why the sky is blue."),),
)


@dataclass(frozen=True)
class Probes:
    """What tokenizers and templates are compared on."""

    texts: Sequence[str] = TEXTS
    conversations: Sequence[Sequence[Message]] = CONVERSATIONS


ALL = Probes()


def rows_of_text(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """A UTF-8 text file as rows of at most 256 tokens, with BOS where the tokenizer puts one. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot be read as text: {problem}", expected="a UTF-8 text file", fix="check the path", where=str(path)
        ) from problem
    start = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    tokens = tokenizer.encode(text)
    step = MOST_ROW_TOKENS - len(start)
    rows = [[*start, *tokens[at : at + step]] for at in range(0, len(tokens), step)]
    if not rows or len(rows[0]) < 2:
        raise UserError("holds no text", expected="some sentences", fix="name another file", where=str(path))
    return rows


def heldout_rows(run: RunDir) -> list[list[int]] | None:
    """Held-out rows (else training rows) of a run from the cache of prepared data; None when they are not there.

    A run that learned from answers of its own has prompts only, and no model was taught to say those: the rows are then
    those of the run that it began from.
    """
    prepared = _prepared(run)
    if prepared and isinstance(prepared.heldout, AnswerRows) and set(prepared.heldout.sides) == {"prompt"}:
        parent = recorded(read_manifest(run.path), "parent_run")
        return heldout_rows(RunDir(Path(parent))) if parent else None
    for rows in (prepared.heldout, prepared.train) if prepared else ():
        if len(rows):
            return _lists(rows, most=MOST_ROWS * 4)
    return None


def training_rows(run: RunDir, *, most: int) -> list[list[int]] | None:
    """The first `most` training rows of a run; None when the cache does not have them any more."""
    prepared = _prepared(run)
    return _lists(prepared.train, most=most) if prepared else None


def _prepared(run: RunDir) -> Any:
    """The prepared rows that a run was trained on, from the cache, or None."""
    if not (run.manifest.is_file() and run.resolved.is_file()):
        return None
    key = recorded(read_manifest(run.path), "prepared_key")
    if not key:
        return None
    folder = cache_root(read_run(str(run.resolved)).run.data.cache) / "prepared" / str(key)
    if not folder.is_dir() or fault_of(folder):
        return None
    kind = read_json(folder / "index.json")["kind"]
    return read_prepared(folder) if kind == "rows" else read_prepared_answers(folder)


def _lists(rows: PreparedRows | AnswerRows, *, most: int) -> list[list[int]]:
    one = rows if isinstance(rows, PreparedRows) else next(iter(rows.sides.values()))
    borders = np.asarray(one.borders[: most + 1])
    return [one.tokens[a:b].tolist() for a, b in pairwise(borders)]


def choose_rows(
    run: RunDir | None, tokenizer: Tokenizer, *, text: Path | None, own: Callable[[], list[list[int]]]
) -> tuple[list[list[int]], str]:
    """Rows to compare on, and where they come from: the named text, the run's held-out rows, or the model's own words.

    At most 16 rows of 256 tokens and 2,048 tokens together.
    """
    if text is not None:
        return _few(rows_of_text(text, tokenizer)), str(text)
    found = heldout_rows(run) if run is not None else None
    if found:
        return _few(found), "held-out rows of the run"
    return _few(own()), "rows the model wrote itself"


def _few(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    chosen: list[list[int]] = []
    room = MOST_TOKENS
    for row in [row for row in rows if len(row) > 1][:MOST_ROWS]:
        part = list(row[: min(MOST_ROW_TOKENS, room)])
        if len(part) < 2:
            break
        chosen.append(part)
        room -= len(part)
    return chosen
