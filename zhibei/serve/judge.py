"""A reward model that judges: weights, tokenizer and the template it was trained with, as one. Knows no terminal.

A conversation is spelled as in training, with the terminator of its last answer, where the score is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.data.batches import padded_passes
from zhibei.data.encode import with_system
from zhibei.model.language_model import LanguageModel
from zhibei.model.locate import locate
from zhibei.model.score_model import load_score_model_for_inference, row_scores
from zhibei.model.wording import choose_template, tokenizer_place, trained_system
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer, load_tokenizer

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Judge:
    """A loaded reward model with its tokenizer and template."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    template: Template
    system: str | None = None
    """The system prompt of conversations that have none, as in training."""

    def score(self, messages: Sequence[Message | Mapping[str, Any]]) -> float:
        """How good the last answer is. Only differences between answers to one prompt mean something."""
        return self.scores([messages])[0]

    def scores(self, conversations: Sequence[Sequence[Message | Mapping[str, Any]]]) -> list[float]:
        """The scores of several conversations, each of which ends with an answer; in their order.

        Raises UserError for one that does not, and where the template cannot express it.
        """
        encoded = [self._encode(_as_messages(messages)) for messages in conversations]
        if not encoded:
            return []
        found = torch.zeros(len(encoded))
        passes = padded_passes(encoded, pad_token=self.tokenizer.pad_id, tokens_at_once=TOKENS_AT_ONCE)
        with torch.no_grad(), self.model.sampling():
            for numbers, batch in passes:
                found[numbers] = row_scores(self.model, batch.to(self.model.device), len(numbers)).cpu()
        return found.tolist()

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode(self.template.render(with_system(messages, self.system)).text)


def open_judge(
    path: str, *, base: str | None = None, template: str | None = None, device: str = "auto", precision: str = "auto"
) -> Judge:
    """Load the reward model of a run directory, a Hugging Face folder or a PEFT folder.

    `base` and `template` as for `open_speaker`. Raises UserError when a language model lies there.
    """
    found = locate(path, base=base)
    model = load_score_model_for_inference(path, device=device, precision=precision, base=base)
    tokenizer = load_tokenizer(tokenizer_place(found))
    chosen, _ = choose_template(found, tokenizer, asked=template)
    return Judge(path, model, tokenizer, chosen, trained_system(found))


def _as_messages(messages: Sequence[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    taken = tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages)
    if not taken or taken[-1].role != "assistant":
        raise UserError(
            "the conversation does not end with an answer" if taken else "the conversation is empty",
            expected="messages of which the last is the assistant's",
            fix='add {"role": "assistant", "content": ...}',
            where="messages",
        )
    return taken
