"""A tokenizer and a template as probes show them: what they do, not what their files claim. Knows no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """`probes` maps probe texts to ids; `sentencepiece_ids` are what tokenizer.model itself says."""

    source: str
    kind: str = ""
    num_ids: int = 0
    highest_id: int = 0
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    ids: Mapping[str, int | None] = field(default_factory=dict)
    """bos, eos, pad, unk as ids of the tokenizer."""
    declared_ids: Mapping[str, Mapping[str, int | list[int] | None]] = field(default_factory=dict)
    """The same from config.json, generation_config.json, tokenizer_config.json, by file name."""
    sentencepiece_ids: Mapping[str, int] = field(default_factory=dict)
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    adds_bos: bool = False
    adds_eos: bool = False
    asks_eos: bool = False
    """tokenizer_config.json says add_eos_token."""
    chat_template: str | None = None
    model_max_length: int | None = None
    legacy: bool | None = None
    fingerprint: str = ""
    slow_fast_difference: str = ""
    """An example text whose ids differ between the slow and the fast tokenizer; "" when none does."""


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What rendering probe conversations with the run's template showed."""

    name: str
    terminator: str = ""
    terminator_ids: tuple[int, ...] = ()
    special_pieces: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Each control string of the template, and the ids it becomes; more than one id: the tokenizer does not know it."""
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Role sequences (`user/user/assistant`) that the template refuses, with its words."""
    bos_at_start: int = 1
    bos_in_prompt: int = 1
    prompt_differs: str = ""
    """Where the ids of a chat prompt differ from those of training; "" when they are equal."""
    rewrites_earlier_turns: bool = False
    thinking_modes: tuple[str, ...] = ()
    names_a_date: bool = False
    is_the_tokenizers_own: bool = False
