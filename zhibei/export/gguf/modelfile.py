"""A Modelfile for Ollama: which file, which template in Go's language, where answers stop. Runs no Ollama.

Ollama gives the template `.Messages` (with `.Role` and `.Content`) and `.System`, the system messages joined; it puts
BOS in front by the file's own `add_bos_token`, so the template does not spell that one. Source: Ollama's documents
template.md and modelfile.md. What Ollama itself makes of it is not tested here, for it is no Python package; the tests
render the same subset of Go's language and compare it with the template of training.
"""

from __future__ import annotations

from collections.abc import Sequence

from zhibei.config.errors import UserError
from zhibei.generate.gguf_words import stop_strings_of, terminator_of
from zhibei.text.families import TEMPLATES
from zhibei.text.messages import Message
from zhibei.text.native import Family, NativeTemplate, bind
from zhibei.text.template import Template

MOST_CONTEXT = 8192
"""Beyond this Ollama's memory for keys and values is for the user to choose."""

TRIED: tuple[tuple[Message, ...], ...] = (
    (Message("user", "one"),),
    (Message("system", "zero"), Message("user", "one")),
    (Message("user", "one"), Message("assistant", "two"), Message("user", "three")),
    (Message("system", "zero"), Message("user", "one"), Message("assistant", "two"), Message("user", "three")),
)


def modelfile(
    file_name: str,
    template: Template | None,
    *,
    context_tokens: int,
    eos: str = "",
    bos: str = "",
    system: str = "",
) -> tuple[str, tuple[str, ...]]:
    """The text of a Modelfile beside a GGUF file, and what a person should know about it.

    `eos` and `bos` are the tokenizer's own; `system` is the prompt that training put in front.
    """
    lines = [f"FROM ./{file_name}"]
    native = as_native(template, bos=bos, eos=eos) if template else None
    notes: list[str] = []
    if native:
        lines.append(f'TEMPLATE """{go_template(native)}"""')
    elif template:
        notes.append(
            "the chat template is none of the families that can be told in Go's language: Ollama takes the nearest of "
            "its own, which need not be that of training"
        )
    else:
        notes.append("without a chat template Ollama hands the model your text as it is")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if system:
        lines.append(f'SYSTEM """{_plain(system)}"""')
    for stop in _stops(template, eos):
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    lines.append(f"PARAMETER num_ctx {min(context_tokens, MOST_CONTEXT)}")
    return "\n".join(lines) + "\n", tuple(notes)


def as_native(template: Template, *, bos: str, eos: str) -> NativeTemplate | None:
    """The named family that spells conversations as this template does, or None."""
    if isinstance(template, NativeTemplate):
        return template
    wanted = [_rendered(template, messages) for messages in TRIED]
    for family in TEMPLATES.values():
        for start in dict.fromkeys((bos, "")):
            native = bind(family, bos=start, eos=eos)
            if [_rendered(native, messages) for messages in TRIED] == wanted:
                return native
    return None


def _rendered(template: Template, messages: Sequence[Message]) -> str | None:
    try:
        return template.render(messages, answer_next=True).text
    except UserError:
        return None


def go_template(native: NativeTemplate) -> str:
    """The template in the subset of Go's language that Ollama has; text stands outside of its braces as it is."""
    make = _any_order if native.family.is_any_order else _pairs
    return make(native.family, native)


def _any_order(family: Family, native: NativeTemplate) -> str:
    system, user, tool = family.system or ("", ""), family.user, family.tool
    other = f'{{{{ else if eq .Role "tool" }}}}{tool[0]}{{{{ .Content }}}}{tool[1]}' if tool else ""
    return (
        '{{ range .Messages }}{{ if eq .Role "system" }}'
        f"{system[0]}{{{{ .Content }}}}{system[1]}"
        f'{{{{ else if eq .Role "user" }}}}{user[0]}{{{{ .Content }}}}{user[1]}'
        f'{{{{ else if eq .Role "assistant" }}}}{_answer(family, native)}{other}'
        f"{{{{ end }}}}{{{{ end }}}}{family.header}"
    )


def _pairs(family: Family, native: NativeTemplate) -> str:
    head, folded = "", ""
    if family.system:
        before, after = family.system
        default = f"{{{{ else }}}}{before}{family.default_system}{after}" if family.default_system else ""
        head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{default}{{{{ end }}}}"
    elif any(family.fold):
        folded = f"{{{{ if $.System }}}}{family.fold[0]}{{{{ $.System }}}}{family.fold[1]}{{{{ end }}}}"
    again = family.user[0] if family.user_again is None else family.user_again
    # Ollama writes the first BOS itself.
    bos = native.bos if family.bos == "each_user_turn" else ""
    return (
        f"{head}{{{{ $later := false }}}}"
        '{{ range .Messages }}{{ if eq .Role "user" }}'
        f"{{{{ if $later }}}}{bos}{again}{{{{ else }}}}{family.user[0]}{folded}{{{{ end }}}}"
        f"{{{{ $later = true }}}}{{{{ .Content }}}}{family.user[1]}"
        f'{{{{ else if eq .Role "assistant" }}}}{_answer(family, native)}'
        f"{{{{ end }}}}{{{{ end }}}}{family.header}"
    )


def _answer(family: Family, native: NativeTemplate) -> str:
    return f"{family.header}{family.lead}{{{{ .Content }}}}{native.terminator}{family.after}"


def _stops(template: Template | None, eos: str) -> list[str]:
    own = (*stop_strings_of(template), terminator_of(template)) if template else ()
    return [text for text in dict.fromkeys((*own, eos)) if text]


def _plain(text: str) -> str:
    """A text between three quotes, which cannot hold three quotes itself."""
    return text.replace('"""', '"" "')


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
