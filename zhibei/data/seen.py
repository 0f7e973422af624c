"""One record as the model will see it: token by token, and which are learned. Knows no files and no colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.encode import Wording, encode_records, render_record, row_id
from zhibei.data.records import Conversation, PlainText, Record
from zhibei.text.supervision import lay_out, learned_intervals, supervised_tokens


@dataclass(frozen=True, slots=True)
class SeenToken:
    """`text` is what the token adds to the row's text ("" for the later bytes of one character), `piece` how the
    vocabulary spells it."""

    id: int
    piece: str
    text: str
    is_learned: bool
    is_special: bool


@dataclass(frozen=True, slots=True)
class SeenRow:
    """`fate` says what `prepare` does with the row: "kept", or why it is dropped or changed."""

    row: str
    where: str
    tokens: tuple[SeenToken, ...]
    fate: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "where": self.where,
            "fate": self.fate,
            "num_tokens": len(self.tokens),
            "num_learned": sum(token.is_learned for token in self.tokens),
            "tokens": [
                {"id": token.id, "piece": token.piece, "text": token.text, "learned": token.is_learned}
                for token in self.tokens
            ],
        }


def see(record: Record, wording: Wording, *, source: int = 0) -> SeenRow:
    """The whole row, even where `prepare` would cut or drop it. UserError as `render_record`."""
    rendered, _ = render_record(record, wording)
    encoded = wording.tokenizer.encode_batch([rendered.text])
    mode = "turns" if isinstance(record, PlainText) else wording.supervise
    intervals = [learned_intervals(rendered.spans, length=len(rendered.text), mode=mode)]
    layout = lay_out(encoded.starts, encoded.ends, borders=encoded.borders, num_chars=[len(rendered.text)])
    learned = supervised_tokens(layout, intervals)
    reached, tokens = 0, []
    pieces = wording.tokenizer.token_texts(encoded.ids.tolist())
    for place, piece in enumerate(pieces):
        start, end = max(reached, int(encoded.starts[place])), int(encoded.ends[place])
        tokens.append(
            SeenToken(
                id=int(encoded.ids[place]),
                piece=piece,
                # Characters a normaliser drops belong to no token; they are shown with the next one.
                text=rendered.text[min(reached, start) : end] if end > reached else "",
                is_learned=bool(learned[place]),
                is_special=bool(wording.tokenizer.is_special_id[encoded.ids[place]]),
            )
        )
        reached = max(reached, end)
    return SeenRow(row_id(record.origin), str(record.origin), tuple(tokens), _fate(record, wording, source=source))


def _fate(record: Record, wording: Wording, *, source: int) -> str:
    try:
        chunk = encode_records([(1, source, record)], wording)
    except UserError as error:
        return f"stops the run: {error.what}"
    entries = [f"{entry['action']}: {entry['reason']} ({entry['detail']})" for entry in chunk.ledger]
    if isinstance(record, Conversation) and np.any(chunk.facts["border_merges"]):
        entries.append("one token holds the end of the prompt and the beginning of the answer")
    if len(chunk.lengths) > 1:
        entries.append(f"split into {len(chunk.lengths)} chunks")
    return "; ".join(entries) or "kept"
