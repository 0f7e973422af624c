"""Which rows are seen how often, and which are held out: all by content hash. Knows records, not files or tokens.

For `prepare`: hash every record once with `content_hash`, give the hashes of all rows to `split_heldout`, and keep the
hash of a cut text per chunk (a text file is one record, and would otherwise go to one side as a whole).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.records import Conversation, Judged, PlainText, Preference, Prompt, Record
from zhibei.text.messages import Message

HASH_BYTES = 16


def _said(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.content, message.context] for message in messages]


def _content(record: Record) -> list[object]:
    if isinstance(record, Conversation):
        return ["conversation", _said(record.messages), record.tools]
    if isinstance(record, PlainText):
        return ["text", record.text]
    if isinstance(record, Preference):
        return ["preference", _said(record.prompt), _said(record.chosen), _said(record.rejected)]
    if isinstance(record, Judged):
        return ["judged", _said(record.prompt), _said(record.answer), record.is_good]
    assert isinstance(record, Prompt)
    return ["prompt", _said(record.messages)]


def content_hash(record: Record) -> str:
    """32 hexadecimal digits of what a record says, wherever it stands: file, position, weights and extra fields do
    not matter. The same in every process and version of Python."""
    return text_hash(json.dumps(_content(record), ensure_ascii=False))


def text_hash(text: str) -> str:
    """The hash of any text in the same form, e.g. of one chunk of a long text."""
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=HASH_BYTES).hexdigest()


def position(digest: str, purpose: str = "") -> float:
    """A hash as a number in [0, 1), uniform over rows and independent between purposes."""
    salted = hashlib.blake2b((purpose + digest).encode(), digest_size=8).digest()
    return (int.from_bytes(salted, "big") >> 11) / 2**53


def copies(record: Record, weight: float) -> int:
    """How often a row is seen per epoch: the weight's whole part, once more for the share of rows that its fraction
    names. The choice depends on the row's content alone, so equal rows are chosen together."""
    whole, fraction = int(weight), weight - int(weight)
    if fraction < 1e-9:
        return whole
    return whole + (position(content_hash(record), "weight") < fraction)


def split_heldout(hashes: Sequence[str], validation: float | int) -> np.ndarray:
    """Which rows are held out, as bool [R], in the order of `hashes`.

    A fraction f holds out the rows whose hash lies below f: equal rows are on one side, and rows that are added later
    move no other row. A whole number N holds out the rows with the smallest hashes, as many as fit into N with equal
    rows kept together. Raises UserError when nothing would be left to train on. A file name is not meant for here:
    read that file with `read_sources`.
    """
    positions_R = np.array([position(digest, "heldout") for digest in hashes], dtype=np.float64)
    if isinstance(validation, float) or validation == 0:
        is_heldout_R = positions_R < validation
    else:
        ordered = np.sort(positions_R)
        is_heldout_R = positions_R <= ordered[validation - 1] if validation <= len(ordered) else positions_R < 2
        if validation <= len(ordered) and is_heldout_R.sum() > validation:
            is_heldout_R = positions_R < ordered[validation - 1]
    if len(hashes) and is_heldout_R.all():
        raise UserError(
            f"data.validation: {validation} holds out all {len(hashes)} rows",
            expected="fewer held-out rows than rows",
            fix="lower data.validation, or give more data",
            where="data.validation",
        )
    return is_heldout_R
