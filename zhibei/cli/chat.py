"""`zhibei chat`: talk to a model in a terminal, from a pipe, or with prompts on the command line. Knows no weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from zhibei.cli import console
from zhibei.cli.chat_commands import COMMANDS, run_command, without_effect
from zhibei.cli.chat_screen import Screen, read_message, switch_on_line_editing
from zhibei.cli.chat_session import Session, Side
from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.serve.conversation import Conversation

if TYPE_CHECKING:
    from zhibei.serve.chat import Speaker

_ANSWERS = SamplingOptions()


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the model is brought into memory."""

    base: str | None = None
    """The base model of an adapter, when it no longer lies where the adapter says."""
    template: str | None = None
    """Name of the prompt template; by default the one the model was trained with, else the tokenizer's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the weights in 8 or 4 bits, so that a larger model fits (under an adapter: those of its base)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = _ANSWERS.max_new_tokens
    """Longest answer, in tokens."""
    temperature: float = _ANSWERS.temperature
    """Lower is more predictable; 0 always takes the most likely token."""
    top_k: int = _ANSWERS.top_k
    """Only the k most likely tokens; 0 switches it off."""
    top_p: float = _ANSWERS.top_p
    """Only the most likely tokens that together hold this probability; 1 switches it off."""
    min_p: float = _ANSWERS.min_p
    """Only tokens at least this likely, relative to the best one; 0 switches it off."""
    repetition_penalty: float = _ANSWERS.repetition_penalty
    """Makes tokens that were seen before less likely; 1 switches it off, 1.1 is common."""
    beams: int = _ANSWERS.beams
    """Follow so many texts at once and take the likeliest; nothing is drawn then, and nothing streams."""
    seed: int = _ANSWERS.seed
    """Same seed, same session, same answers."""
    stop: tuple[str, ...] = ()
    """A text at which an answer ends; may be given several times."""

    def options(self) -> SamplingOptions:
        """Checked. Raises UserError for values out of range, and for options that would have no effect."""
        values = {name: value for name, value in vars(self).items() if name != "stop"}
        if self.beams > 1 and self.temperature == _ANSWERS.temperature:
            values["temperature"] = 0.0  # nobody asked for another
        options = SamplingOptions(**values, stop_strings=tuple(self.stop))
        idle = without_effect(options)
        if idle:
            flag = "--" + idle[0].replace("_", "-")
            raise UserError(
                f"{flag} has no effect with --temperature 0, which always takes the most likely token",
                expected="a temperature above 0, or no filter",
                fix=f"leave out {flag} or --temperature 0",
            )
        return options


def chat(
    model: str,
    /,
    *,
    prompt: list[str] | None = None,
    system: str = "",
    compare: str = "",
    json: bool = False,
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),
    loading: Annotated[Loading, Parameter(name="*")] = Loading(),
) -> int:
    """Talk to a trained model.

    Examples:

      zhibei chat runs/quickstart

      zhibei chat runs/my_lora --compare base

      zhibei chat meta-llama/Llama-2-13b-chat-hf --quantize nf4

      zhibei chat path/to/llama --template alpaca --temperature 0.2

      zhibei chat runs/my_run --prompt "Name three primes." --json

      printf 'Hello\\nAnd again\\n' | zhibei chat runs/my_run

    In the chat, /help lists what else it can do.

    Parameters
    ----------
    model
        A run directory, a Hugging Face folder, an adapter folder, or a hub id.
    prompt
        Answer this and leave; several of them are separate conversations.
    system
        System prompt, in place of the template's own.
    compare
        A second model beside the first: `base` for the one it was trained from, or a path.
    json
        One JSON document with all answers; needs --prompt or input from a pipe.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if json and prompt is None and sys.stdin.isatty():
        raise UserError(
            "--json in a conversation at the keyboard",
            expected="messages that are known beforehand",
            fix="add --prompt TEXT, or send the messages through a pipe",
        )
    options = sampling.options()
    screen = Screen(is_terminal=is_terminal and prompt is None, as_json=json)
    session = _open(model, screen, options=options, loading=loading, compare=compare)
    session.set_system(system)
    answer = _answer_prompts if prompt is not None else _talk if is_terminal else _answer_lines
    answer(session, prompt or [])
    if json:
        console.emit(_document(session), as_json=True)
    return 0


def _open(model: str, screen: Screen, *, options: SamplingOptions, loading: Loading, compare: str) -> Session:
    from zhibei.serve.chat import open_base, open_speaker

    where: dict[str, Any] = {"device": loading.device, "precision": loading.precision, "quantize": loading.quantize}

    def open_other(speaker: Speaker) -> Speaker:
        if compare in ("", "base"):
            return open_base(speaker, **where)
        try:
            return open_speaker(compare, **where)
        except UserError as error:
            if "names no template" not in error.what:
                raise
        return open_speaker(compare, template=speaker.template.name, **where)

    speaker = open_speaker(model, base=loading.base, template=loading.template, **where)
    for note in speaker.notes:
        screen.remark(note, "yellow")
    session = Session(Side(speaker, Conversation()), options, screen, open_other)
    session.compare(bool(compare))
    return session


def _answer_prompts(session: Session, prompts: list[str]) -> None:
    """Each prompt is a conversation of its own, with the same seed."""
    for prompt in prompts:
        session.reset()
        session.num_asked = 0
        session.ask(prompt)


def _answer_lines(session: Session, _: list[str]) -> None:
    """From a pipe: one message a line; the first error ends it."""
    while (message := _read(is_terminal=False)) is not None:
        if message.startswith("/"):
            if not run_command(session, message):
                return
        elif message.strip():
            session.ask(message)


def _talk(session: Session, _: list[str]) -> None:
    """At a keyboard: errors are shown and the conversation goes on."""
    switch_on_line_editing(list(COMMANDS))
    speaker = session.side.speaker
    context = f", {speaker.context_tokens} tokens of context" if speaker.context_tokens else ""
    session.screen.remark(f"{speaker.name}: template {speaker.template.name}{context}. /help for help, Ctrl-D leaves.")
    if speaker.has_adapters:
        session.screen.remark(
            f"an adapter beside its base answers more slowly than one model: zhibei merge {speaker.name}"
        )
    while True:
        try:
            message = _read(is_terminal=True)
            if message is None:
                console.stdout.print()
                return
            if message.startswith("/"):
                if not run_command(session, message):
                    return
            elif message.strip():
                session.ask(message)
        except KeyboardInterrupt:
            console.stdout.print()
            session.screen.remark("Ctrl-D or /exit leaves")
        except UserError as error:
            session.screen.error(error)


def _read(*, is_terminal: bool) -> str | None:
    try:
        return read_message(is_terminal=is_terminal)
    except UnicodeDecodeError:
        raise UserError(
            "the input holds bytes that are not UTF-8",
            expected="UTF-8 text",
            fix="convert it with iconv, or set the terminal to UTF-8",
            where="standard input",
        ) from None


def _document(session: Session) -> dict[str, Any]:
    speaker = session.side.speaker
    options = {name: value for name, value in vars(session.options).items() if name not in ("batch_rows", "overflow")}
    return {
        "model": speaker.name,
        "template": speaker.template.name,
        "system": session.side.conversation.system,
        "options": options,
        "notes": list(speaker.notes),
        "turns": [
            {"prompt": message, "answers": [reply.as_dict() for reply in replies]} for message, replies in session.turns
        ],
    }
