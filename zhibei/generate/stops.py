"""Text that can be shown while it grows: whole characters, no beginning of a stop string. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so more undecodable tokens than this are no beginning of one.
_MOST_PENDING_TOKENS = 8


class TextTail:
    """Decodes tokens one at a time. `text` is the answer so far as it may be shown; it never changes, only grows.

    Bytes that are no whole character yet, and text that may be the beginning of a stop string, are held back.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()) -> None:
        self._decode, self._stop_strings = decode, tuple(stop_strings)
        self._tokens: list[int] = []
        # Tokens before `_shown` are text already; decoding starts at `_context`, because what a token reads as
        # (its leading space above all) depends on the one before it.
        self._context = self._shown = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add one token; the new text that is certain now, often empty. After a stop string: always empty."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._new_text())

    def finish(self) -> str:
        """No more tokens come: the rest of the text."""
        if self.stopped:
            return ""
        shown = self._release(self._new_text(last=True))
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _new_text(self, *, last: bool = False) -> str:
        before = self._decode(self._tokens[self._context : self._shown])
        now = self._decode(self._tokens[self._context :])
        num_pending = len(self._tokens) - self._shown
        if now.endswith(_REPLACEMENT) and num_pending <= _MOST_PENDING_TOKENS and not last:
            return ""
        if not now.startswith(before):
            # One bad byte can spoil the reading of a whole run of bytes, the shown ones included.
            before, now = "", self._decode(self._tokens[self._shown :])
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _release(self, new: str) -> str:
        self._held += new
        begins = [at for text in self._stop_strings if (at := self._held.find(text)) >= 0]
        self.stopped = bool(begins)
        end = min(begins) if begins else len(self._held) - self._num_suspicious()
        shown, self._held = self._held[:end], "" if begins else self._held[end:]
        self.text += shown
        return shown

    def _num_suspicious(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(text) for text in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop_strings):
                return length
        return 0
