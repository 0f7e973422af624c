"""The slash commands of `zhibei chat`. Knows the session, not how it answers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from zhibei.cli.chat_session import Session
from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.serve.conversation import load_conversation


@dataclass(frozen=True)
class Command:
    """`act` gets the session and what was written behind the command; it returns False to leave."""

    usage: str
    about: str
    act: Callable[[Session, str], bool]


def run_command(session: Session, line: str) -> bool:
    """Do what a line that begins with a slash says; False when it says to leave. Raises UserError."""
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(name) or COMMANDS.get(ALIASES.get(name, ""))
    if command is None:
        near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.4)
        raise UserError(
            f"there is no command {name}",
            expected=" ".join(COMMANDS),
            fix=f"did you mean {near[0]}? /help explains them" if near else "/help explains them",
            where="chat",
        )
    if rest.strip() and " " not in command.usage:
        raise UserError(
            f"{name} takes nothing behind it, but got {rest.strip()!r}",
            expected=name,
            fix=f"write {name}",
            where="chat",
        )
    return command.act(session, rest.strip())


def _reset(session: Session, _: str) -> bool:
    session.reset()
    session.screen.remark("the conversation begins anew; system prompt and options stay")
    return True


def _regenerate(session: Session, _: str) -> bool:
    session.regenerate()
    return True


def _undo(session: Session, _: str) -> bool:
    session.screen.remark(f"taken back: {session.undo()!r}")
    return True


def _system(session: Session, text: str) -> bool:
    if text:
        session.set_system(text)
        session.screen.remark("this system prompt holds from the next message on; /system - takes it away")
    if text == "-":
        session.set_system("")
    system = session.side.conversation.system
    session.screen.remark(f"system prompt: {system}" if system else "no system prompt of yours: the template's own")
    return True


def _save(session: Session, name: str) -> bool:
    path = _path(name, "/save")
    session.side.conversation.save(path)
    of_whom = f" (that of {session.side.speaker.name})" if session.is_comparing else ""
    session.screen.remark(f"saved {len(session.side.conversation.turns)} turns{of_whom} to {path}")
    return True


def _load(session: Session, name: str) -> bool:
    session.put(load_conversation(_path(name, "/load")))
    session.screen.remark(f"loaded {len(session.side.conversation.turns)} turns; go on from there")
    return True


def _path(name: str, command: str) -> Path:
    if not name:
        raise UserError("no file is named", expected=f"{command} FILE", fix="name a file", where=command)
    return Path(name).expanduser()


def _tokens(session: Session, _: str) -> bool:
    for side in session.sides:
        messages = side.conversation.messages()
        used = side.speaker.count(side.conversation.messages("")) if messages else 0
        limit = side.speaker.context_tokens
        of_all = f" of {limit}" if limit else ""
        session.screen.remark(f"{side.speaker.name}: {used} tokens{of_all} in {len(messages)} messages")
    return True


def _compare(session: Session, word: str) -> bool:
    switch = {"on": True, "off": False, "": not session.is_comparing}
    if word not in switch:
        raise UserError(f"/compare {word}", expected="/compare on or /compare off", fix="write on or off", where="chat")
    session.compare(switch[word])
    names = " and ".join(side.speaker.name for side in session.sides)
    session.screen.remark(f"answers come from {names}")
    return True


def _options(session: Session, _: str) -> bool:
    for name in SETTABLE:
        session.screen.remark(f"  {name:<20}{getattr(session.options, name)}")
    session.screen.remark("change one with /set NAME VALUE")
    return True


def _set(session: Session, text: str) -> bool:
    name, _, written = text.partition(" ")
    name, written = name.strip().replace("-", "_"), written.strip()
    if name not in SETTABLE or not written:
        near = difflib.get_close_matches(name, SETTABLE, n=1)
        raise UserError(
            f"/set {text}",
            expected=f"/set NAME VALUE, with a name of {', '.join(SETTABLE)}",
            fix=f"did you mean {near[0]}?" if near and name not in SETTABLE else "/options shows names and values",
            where="chat",
        )
    try:
        value = SETTABLE[name](written)
    except ValueError:
        kind = "a whole number" if SETTABLE[name] is int else "a number"
        raise UserError(
            f"{name} is {written!r}", expected=kind, fix=f"for example /set {name} 1", where="chat"
        ) from None
    session.options = replace(session.options, **{name: value})
    session.screen.remark(f"{name} is {value} now")
    for idle in without_effect(session.options):
        session.screen.remark(f"{idle} has no effect while temperature is 0", "yellow")
    return True


def without_effect(options: SamplingOptions) -> list[str]:
    """Names of options that change nothing, because temperature 0 takes the most likely token anyway."""
    if options.temperature > 0:
        return []
    off = SamplingOptions()
    return [name for name in ("top_k", "top_p", "min_p") if getattr(options, name) != getattr(off, name)]


def _help(session: Session, _: str) -> bool:
    for command in COMMANDS.values():
        session.screen.remark(f"  {command.usage:<20}{command.about}")
    session.screen.remark("A line that ends in \\ goes on in the next one. Ctrl-C stops an answer, Ctrl-D leaves.")
    return True


def _exit(_: Session, __: str) -> bool:
    return False


COMMANDS = {
    "/reset": Command("/reset", "forget the conversation", _reset),
    "/regenerate": Command("/regenerate", "answer the last message again", _regenerate),
    "/undo": Command("/undo", "take back the last message and its answer", _undo),
    "/system": Command("/system TEXT", "set the system prompt; - takes it away; alone shows it", _system),
    "/options": Command("/options", "show the sampling options", _options),
    "/set": Command("/set NAME VALUE", "change one, e.g. /set temperature 0.2", _set),
    "/tokens": Command("/tokens", "how much of the context is used", _tokens),
    "/compare": Command("/compare on|off ", "show the other model's answers beside", _compare),
    "/save": Command("/save FILE", "write the conversation as JSON messages", _save),
    "/load": Command("/load FILE", "go on from a saved conversation", _load),
    "/help": Command("/help", "this list", _help),
    "/exit": Command("/exit", "leave", _exit),
}
ALIASES = {"/quit": "/exit", "/regen": "/regenerate", "/clear": "/reset", "/?": "/help"}

_KINDS = {int: int, float: float}
SETTABLE: dict[str, Callable[[str], int | float]] = {
    field.name: _KINDS[type(field.default)]
    for field in fields(SamplingOptions)
    if type(field.default) in _KINDS and field.name != "batch_rows"
}
