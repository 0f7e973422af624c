"""A tokenizer for the small world: one token for each of its words, bytes for everything else. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

from zhibei.pipeline.world.items import SMALL_TALK
from zhibei.pipeline.world.prose import FIRST_SUBJECTS, SUBJECTS
from zhibei.pipeline.world.tasks import KINDS
from zhibei.pipeline.world.words import MIXED, NAMES, NUMBERS, PLURALS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TURN_MARKS = ("[INST]", "[/INST]")
MOST_TOKENS = 4096
_SAMPLES_PER_KIND = 200


def build_tokenizer(*, context_tokens: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained until every word of the world is one token; the same for every seed.

    Its alphabet is all 256 bytes, so any text can be encoded and comes back unchanged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [BOS, EOS, PAD, *TURN_MARKS]
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_spoken(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(TURN_MARKS),
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def _spoken() -> Iterator[str]:
    """Everything that is ever said: each word with and without a space before it, each phrasing, samples of prose."""
    for word in (*MIXED, *NAMES, *PLURALS, *NUMBERS):
        yield f"{word}\n {word}"
    random = Random("tokenizer")
    for kind in KINDS:
        for instruction, given in kind.phrasings:
            facts = kind.draw(random)
            yield f" {instruction.format(**facts)}\n{given.format(**facts)}"
    for instruction, answer in SMALL_TALK:
        yield f" {instruction}\n {answer}"
    for subject in (*FIRST_SUBJECTS, *SUBJECTS):
        for _ in range(_SAMPLES_PER_KIND):
            yield subject(random, lambda content: True) or ""
