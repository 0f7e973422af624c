"""The sample panel: what the base and the tuned model answer to the same prompts. Knows generation, not losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zhibei.config.run import AnsweringSection, RunFile
from zhibei.data.prepared import PreparedRows
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate
from zhibei.model.language_model import LanguageModel
from zhibei.model.ranks import current
from zhibei.store.files import read_json, write_json_atomic
from zhibei.store.run_dir import RunDir
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

NUM_HELDOUT_PROMPTS = 4
PLAIN_TEXT_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Panel:
    """Prompts as token ids, and what a person reads of them."""

    prompts: list[list[int]]
    texts: list[str]
    options: SamplingOptions
    stop_ids: tuple[int, ...]
    tokenizer: Tokenizer

    def answers(self, model: LanguageModel) -> list[str]:
        """Greedy answers; the model's state and the global random state are left as they were."""
        with model.gathered(layer_by_layer=not model.has_room_to_gather()):
            found = generate(
                model.hf,
                self.prompts,
                options=self.options,
                stop_ids=self.stop_ids,
                pad_id=self.tokenizer.pad_id,
                decode=self.tokenizer.decode,
            )
        return [self.tokenizer.decode(answer.content_tokens, skip_special_tokens=True).strip() for answer in found]


def make_panel(run: RunFile, heldout: PreparedRows, tokenizer: Tokenizer, template: Template) -> Panel | None:
    """The run file's prompts, or the first held-out ones; None when the panel is switched off, there are none, or
    the stage's model writes no answers."""
    section = run.training
    if not isinstance(section, AnsweringSection) or section.sample_tokens == 0:
        return None
    if section.sample_prompts:
        rendered = [template.render((Message("user", text),), answer_next=True).text for text in section.sample_prompts]
        prompts, texts = [tokenizer.encode(text) for text in rendered], list(section.sample_prompts)
    else:
        prompts = [heldout_prompt(heldout, number) for number in range(min(NUM_HELDOUT_PROMPTS, len(heldout)))]
        prompts = [prompt for prompt in prompts if prompt]
        texts = [tokenizer.decode(prompt, skip_special_tokens=True).strip() for prompt in prompts]
    if not prompts:
        return None
    options = SamplingOptions(
        max_new_tokens=section.sample_tokens,
        temperature=0.0,
        stop_strings=template.stop_strings,
        overflow="fewer_tokens",
    )
    return Panel(prompts, texts, options, tokenizer.stop_ids(template.terminator), tokenizer)


def heldout_prompt(rows: PreparedRows, number: int) -> list[int]:
    """The tokens before the first learned one; of text that is learned from the start, its first few tokens."""
    part = slice(int(rows.borders[number]), int(rows.borders[number + 1]))
    tokens, supervised = rows.tokens[part], rows.supervised[part]
    first = int(supervised.argmax()) if supervised.any() else 0
    return [int(token) for token in tokens[: first if first > 1 else PLAIN_TEXT_PROMPT_TOKENS]]


def write_panel(panel: Panel, model: LanguageModel, run_dir: RunDir, *, step: int) -> Path:
    """Answer the prompts and store them beside the base model's answers (those of step 0)."""
    answers = panel.answers(model)
    if not current().is_first:
        return panel_path(run_dir, step)
    first = panel_path(run_dir, 0)
    base = answers if step == 0 else [entry["base"] for entry in read_json(first)]
    path = panel_path(run_dir, step)
    write_json_atomic(
        path,
        [
            {"prompt": prompt, "base": before, "tuned": after}
            for prompt, before, after in zip(panel.texts, base, answers, strict=True)
        ],
    )
    return path


def panel_path(run_dir: RunDir, step: int) -> Path:
    return run_dir.samples / f"step-{step:06d}.json"
