"""Answers held to a JSON schema: which tokens may come next, by llguidance. Knows no HTTP.

llguidance (https://github.com/guidance-ai/llguidance) is optional; without it such requests are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from zhibei.serve.chat import Speaker
from zhibei.serve.hosted import Hosted
from zhibei.serve.refusals import Refusal

INSTALL = "pip install 'zhibei[serve]'"
_PARAM = "response_format"


class Shape:
    """One answer's mask: called with the tokens drawn so far, it says which may come next (bool [V])."""

    def __init__(self, matcher: Any, vocabulary_size: int, stop_ids: Sequence[int]) -> None:
        self._matcher, self._num_read, self._stop_ids = matcher, 0, list(stop_ids)
        self._bits = torch.zeros((vocabulary_size + 31) // 32, dtype=torch.int32)
        self._places = torch.arange(32, dtype=torch.int32)
        self._size = vocabulary_size

    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        for token in tokens[self._num_read :]:
            self._matcher.consume_token(int(token))
        self._num_read = len(tokens)
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        allowed_V = ((self._bits.unsqueeze(1) >> self._places) & 1).bool().flatten()[: self._size]
        if not allowed_V.any():  # the document is complete
            allowed_V[self._stop_ids] = True
        return allowed_V


def mask_maker(response_format: Mapping[str, Any], hosted: Hosted) -> Callable[[], Shape] | None:
    """What makes the mask of each answer; None for plain text. Raises Refusal for schemas that cannot be held to."""
    if response_format["type"] == "text":
        return None
    try:
        import llguidance
    except ImportError:
        raise Refusal(
            400,
            f"{_PARAM} {response_format['type']} needs a package that this server lacks: {INSTALL}",
            _PARAM,
            "not_installed",
        ) from None
    named = response_format.get("json_schema")
    schema = {"type": "object"} if named is None else named["schema"]
    if not isinstance(hosted.speaker, Speaker):
        raise Refusal(400, f"{hosted.name} runs in an engine that takes no {_PARAM}", _PARAM, "unsupported_parameter")
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        words = _words(hosted.speaker.tokenizer.spec, hosted.speaker.stop_ids)
        fault = llguidance.LLMatcher.validate_grammar(grammar, words)
    except Exception as error:  # its parser raises plain ValueError and others for schemas it cannot read
        fault = str(error)
    if fault:
        raise Refusal(400, f"this schema cannot be held to: {fault.splitlines()[0][:300]}", _PARAM, "invalid_schema")
    size = hosted.speaker.model.config.vocab_size
    return lambda: Shape(llguidance.LLMatcher(words, grammar), size, hosted.speaker.stop_ids)


@lru_cache(maxsize=8)
def _words(spec: str, stop_ids: tuple[int, ...]) -> Any:
    """The tokenizer as llguidance reads it; making one takes about a second for a large vocabulary."""
    import llguidance

    return llguidance.LLTokenizer(spec, eos_token=list(stop_ids))
