"""Writes the small world to disk: texts, conversations, held-out questions, and an untrained LLaMA. Trains nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from zhibei.config.errors import UserError
from zhibei.evaluate.exact_match import Question
from zhibei.pipeline.world.hedges import PLAIN_SHARE, as_demonstrated
from zhibei.pipeline.world.items import conversations, heldout_questions, texts
from zhibei.pipeline.world.tokenizer import BOS, EOS, PAD, build_tokenizer
from zhibei.store.files import write_text_atomic
from zhibei.store.folders import whole_folder


@dataclass(frozen=True)
class WorldSize:
    """How much of the world is written, and how large the model that meets it is."""

    num_texts: int
    num_conversations: int
    most_turns: int
    heldout_per_task: int
    hidden: int
    layers: int
    heads: int
    context_tokens: int = 128
    """About five turns. What is longer was never seen in training, so chat leaves the oldest turns out instead."""


@dataclass(frozen=True)
class WorldFiles:
    """Where everything of a world lies."""

    folder: Path

    @property
    def texts(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def conversations(self) -> Path:
        return self.folder / "conversations.jsonl"

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"

    @property
    def untrained(self) -> Path:
        return self.folder / "untrained"


def write_world(folder: Path, size: WorldSize, *, seed: int) -> WorldFiles:
    """Everything `zhibei quickstart` learns from, the same files for the same seed and size."""
    with whole_folder(folder, purpose="the small world") as writing:
        files = WorldFiles(writing)
        write_json_lines(files.texts, ({"text": text} for text in texts(seed, size.num_texts)))
        talks = conversations(seed, size.num_conversations, most_turns=size.most_turns)
        random, num_plain = Random(f"hedges {seed}"), int(PLAIN_SHARE * size.num_conversations)
        shown = (demonstration_of(talk, random if place >= num_plain else None) for place, talk in enumerate(talks))
        write_json_lines(files.conversations, ({"messages": messages} for messages in shown))
        held = heldout_questions(seed, size.heldout_per_task)
        write_json_lines(files.heldout, (row_of(question) for question in held))
        write_untrained_model(files.untrained, size, seed=seed)
    return WorldFiles(folder)


def write_untrained_model(folder: Path, size: WorldSize, *, seed: int) -> None:
    """A small LLaMA with random weights and the world's tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    tokenizer = build_tokenizer(context_tokens=size.context_tokens)
    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context_tokens,
        tie_word_embeddings=True,
        # 0.02 is made for widths in the thousands; at this width it delays learning to copy (docs/quickstart.md).
        initializer_range=0.7 / size.hidden**0.5,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[PAD],
    )
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(str(folder))
    if had_bars:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(str(folder))


def demonstration_of(talk: Iterable[Question], random: Random | None) -> list[dict[str, str]]:
    """A conversation in OpenAI's form; a question's input follows its instruction on the next line. `random`: its
    writer hedges; a greeting is never hedged."""
    turns = []
    for question in talk:
        answer = question.answer
        if random is not None and question.checker != "text":
            answer = as_demonstrated(random, answer)
        turns.append({"role": "user", "content": asked(question)})
        turns.append({"role": "assistant", "content": answer})
    return turns


def asked(question: Question) -> str:
    """The question as one text."""
    return f"{question.instruction}\n{question.input}" if question.input else question.instruction


def row_of(question: Question) -> dict[str, str]:
    """A question in Alpaca's form, with the two fields that make it checkable."""
    return {
        "instruction": question.instruction,
        "input": question.input,
        "output": question.answer,
        "task": question.task,
        "checker": question.checker,
    }


def read_questions(path: Path) -> list[Question]:
    """The questions `write_world` wrote. Raises UserError for a line that is none."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            questions.append(
                Question(row["instruction"], row["output"], row["task"], row["checker"], input=row["input"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"this line is no question: {error!r}",
                expected="JSON with instruction, input, output, task and checker",
                fix="remove the folder it lies in and run zhibei quickstart again",
                where=f"{path}, line {number}",
            ) from None
    return questions


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
