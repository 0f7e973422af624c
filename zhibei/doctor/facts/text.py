"""A tokenizer and a template as probes show them: what they do, not what their files claim. Knows no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.doctor.facts import template_probes as probes
from zhibei.doctor.facts.model import ModelFacts
from zhibei.doctor.facts.places import folder_of
from zhibei.doctor.facts.sentencepiece_file import (
    NORMAL,
    UNKNOWN,
    SentencePieceFile,
    read_sentencepiece,
    vocabulary_difference,
)
from zhibei.store.files import read_json, sha256_of_text
from zhibei.text.families import find_template
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

SPECIALS = ("bos", "eos", "pad", "unk")
NO_LIMIT = 10**9
PROBE_TEXTS = (
    "Hello world",
    "### Instruction:\nSay hello to the user.\n\n### Response:",
    "A chat. USER: how are you? ASSISTANT: Fine, thanks.",
    "def f(x):\n    return x + 1",
    "你好，世界。 ça va très bien 1234567",
)


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
    other_vocabulary: str = ""
    """How tokenizer.model and tokenizer.json differ where they are of two vocabularies; "" when they agree."""
    other_than_models: str = ""
    """How its vocabulary differs from that of the tokenizer beside the model's weights; "" when it does not."""
    misplaced: tuple[str, ...] = ()
    """Special tokens that tokenizer.model has at another id."""
    models_own_ids: int | None = None
    """Where another tokenizer than the model's own is used: how many ids the model's own has."""


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
    """default, enable_thinking=true, enable_thinking=false: those whose prompt is how training rows begin."""
    names_a_date: bool = False
    is_the_tokenizers_own: bool = False
    knows_thinking: bool = False
    """The template opens or closes thoughts."""
    split_marks: tuple[str, ...] = ()
    """Control strings that this tokenizer reads as several pieces, though their family has one token for each."""
    foreign_marks: tuple[str, ...] = ()
    """Control strings that the tokenizer's own chat template does not use, where the run's template is another one."""
    doubled_end: str = ""
    """An EOS after a terminator that is another token, as the template writes it; "" when there is none."""
    sha256: str = ""
    """Hash of the template as jinja, as manifests hold it."""


def read_tokenizer_facts(tokenizer: Tokenizer, model: ModelFacts | None = None) -> TokenizerFacts:
    """What the tokenizer does, beside what its files and those of the model say about it. Loads nothing again."""
    folder = folder_of(tokenizer.source, needs="tokenizer_config.json")
    settings = _settings(folder, "tokenizer_config.json")
    with_specials = tokenizer.backend.encode("a b", add_special_tokens=True).ids
    pieces = read_sentencepiece(folder / "tokenizer.model") if folder is not None else None
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    texts = {number: token for token, number in vocabulary.items()}
    added = tokenizer.backend.get_added_tokens_decoder()
    return TokenizerFacts(
        source=tokenizer.source,
        kind=str(settings.get("tokenizer_class") or ""),
        num_ids=len(vocabulary),
        highest_id=max(vocabulary.values()),
        bos=tokenizer.bos or None,
        eos=tokenizer.eos,
        pad=tokenizer.pad or None,
        unk=tokenizer.unk or None,
        ids={name: tokenizer.id_of(getattr(tokenizer, name)) for name in SPECIALS},
        declared_ids=_declared_ids(folder, model, vocabulary),
        sentencepiece_ids=dict(pieces.special_ids) if pieces else {},
        added_tokens={token.content: number for number, token in added.items()},
        files=tuple(sorted(path.name for path in folder.iterdir())) if folder is not None else (),
        adds_bos=tokenizer.adds_bos,
        adds_eos=bool(with_specials) and with_specials[-1] == tokenizer.eos_id,
        asks_eos=bool(settings.get("add_eos_token")),
        chat_template=tokenizer.chat_template,
        model_max_length=_length(settings.get("model_max_length")),
        legacy=settings["legacy"] if isinstance(settings.get("legacy"), bool) else None,
        fingerprint=tokenizer.fingerprint,
        slow_fast_difference=_slow_fast_difference(tokenizer, folder if pieces else None),
        other_vocabulary=vocabulary_difference(pieces, texts) if pieces else "",
        other_than_models=_other_than_models(texts, model.folder if model is not None else None, folder),
        misplaced=_misplaced(tokenizer, pieces),
    )


def num_ids_of(folder: Path) -> int | None:
    """One more than the highest id of the tokenizer in a model's folder; None when it has no tokenizer.json."""
    try:
        whole = read_json(folder / "tokenizer.json")
        vocabulary = whole["model"]["vocab"]
        highest = len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values())
        return 1 + max([highest, *(token["id"] for token in whole.get("added_tokens", ()))])
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _settings(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of settings; what cannot be read says nothing here (loading the tokenizer refused it already)."""
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        content = read_json(folder / name)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _length(value: Any) -> int | None:
    """`model_max_length`; transformers writes 10^30 for "no limit"."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < NO_LIMIT else None


def _declared_ids(
    folder: Path | None, model: ModelFacts | None, vocabulary: Mapping[str, int]
) -> dict[str, dict[str, int | list[int] | None]]:
    """By file: numbers as config.json and generation_config.json give them, names as the vocabulary numbers them."""
    beside = model.folder if model is not None and model.folder is not None else folder
    numbered = {
        "config.json": dict(model.config) if model is not None else _settings(beside, "config.json"),
        "generation_config.json": _settings(beside, "generation_config.json"),
    }
    inner = numbered["config.json"].get("text_config")
    if isinstance(inner, dict):
        numbered["config.json"] = {**inner, **numbered["config.json"]}
    found: dict[str, dict[str, int | list[int] | None]] = {}
    for file, settings in numbered.items():
        keys = {name: settings.get(f"{name}_token_id") for name in SPECIALS}
        found[file] = {name: key for name, key in keys.items() if isinstance(key, int) or _is_ids(key)}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = _settings(folder, file)
        named = {name: _content(settings[f"{name}_token"]) for name in SPECIALS if settings.get(f"{name}_token")}
        found[file] = {name: vocabulary.get(token) for name, token in named.items()}
    return {file: ids for file, ids in found.items() if ids}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, int) for one in value)


def _content(token: Any) -> str:
    """Special tokens are written as text, or with how they strip spaces around them."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _misplaced(tokenizer: Tokenizer, pieces: SentencePieceFile | None) -> tuple[str, ...]:
    """Special tokens of the tokenizer that tokenizer.model has at another id, or knows as ordinary text."""
    found = []
    for name, wanted in (pieces.special_ids if pieces else {}).items():
        token = getattr(tokenizer, name, "")
        number = tokenizer.id_of(token)
        # Which token pads is zhibei's choice where the tokenizer names none.
        if pieces is None or name == "pad" or number in (None, wanted) or number >= len(pieces.pieces):
            continue
        text, kind = pieces.pieces[number]
        if kind in (NORMAL, UNKNOWN) or token == pieces.pieces[wanted][0]:
            found.append(
                f"{name}_token is {token!r} with id {number}; tokenizer.model has {pieces.pieces[wanted][0]!r} with id "
                f"{wanted} for it, and {text!r} with id {number}"
            )
    return tuple(found)


def _other_than_models(texts: Mapping[int, str], beside: Path | None, folder: Path | None) -> str:
    """An example where more than 1 in 100 ids are other tokens than in the tokenizer.json beside the weights."""
    if beside is None or folder is None or beside.samefile(folder):
        return ""
    try:
        theirs: dict[str, int] = _vocabulary(read_json(beside / "tokenizer.json"))
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return ""  # none there, or one that only the tokenizers library can read
    wrong = [(number, token) for token, number in theirs.items() if texts.get(number, token) != token]
    if len(wrong) <= len(theirs) / 100:
        return ""
    number, token = wrong[0]
    return (
        f"{len(wrong):,} of {len(theirs):,} ids are other tokens than in {beside / 'tokenizer.json'}: e.g. {number} is "
        f"{texts[number]!r} here and {token!r} there"
    )


def _vocabulary(spec: Any) -> dict[str, int]:
    """Tokens and ids of a tokenizer.json: a mapping (BPE, WordPiece), or a list in the order of ids (Unigram)."""
    named = spec["model"]["vocab"]
    if isinstance(named, list):
        named = {str(piece[0]): number for number, piece in enumerate(named)}
    return {**named, **{str(one["content"]): int(one["id"]) for one in spec.get("added_tokens") or []}}


def _slow_fast_difference(tokenizer: Tokenizer, folder: Path | None) -> str:
    """The first probe text that sentencepiece itself reads as other ids; "" too where it is not installed."""
    if folder is None:
        return ""
    try:
        from sentencepiece import SentencePieceProcessor

        slow: Any = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (ImportError, OSError, RuntimeError):
        return ""
    for text in PROBE_TEXTS:
        ids = slow.encode(text)
        if ids != tokenizer.encode(text):
            return f"{text!r}: tokenizer.model gives {ids[:12]}, tokenizer.json {tokenizer.encode(text)[:12]}"
    return ""


def read_template_facts(template: Template, tokenizer: Tokenizer) -> TemplateFacts:
    """Render probe conversations with the run's template and look at their ids.

    Raises UserError where not even a question and its answer can be rendered.
    """
    whole = probes.widest(template, tokenizer)
    if whole is None:
        template.render([probes.ASK, probes.REPLY])
        raise AssertionError("the template took what it just refused")
    plain = probes.probe(template, tokenizer, [probes.ASK, probes.REPLY])
    prompt = probes.probe(template, tokenizer, [probes.ASK], asks=True)
    terminator = template.terminator
    is_own = isinstance(template, JinjaTemplate)
    marks = probes.marks_in(whole.text, tokenizer)
    own_marks = None if is_own else _own_marks(tokenizer)
    return TemplateFacts(
        name=template.name,
        terminator=terminator,
        terminator_ids=tuple(tokenizer.encode(terminator.strip())),
        special_pieces={mark: tuple(tokenizer.encode(mark)) for mark in marks},
        refusals=probes.refusals(template),
        bos_at_start=probes.leading(plain.ids if plain else (), tokenizer.bos_id),
        bos_in_prompt=probes.leading(prompt.ids if prompt else (), tokenizer.bos_id),
        prompt_differs=probes.prompt_difference(template, tokenizer),
        rewrites_earlier_turns=probes.rewrites_earlier_turns(template),
        thinking_modes=probes.thinking_modes(template),
        names_a_date=bool(getattr(template, "names_a_date", False)),
        is_the_tokenizers_own=is_own,
        knows_thinking=probes.knows_thinking(template),
        split_marks=tuple(mark for mark in marks if _is_split(mark, tokenizer)),
        foreign_marks=() if own_marks is None else tuple(mark for mark in marks if mark not in own_marks),
        doubled_end=probes.doubled_end(whole, terminator=terminator, eos=tokenizer.eos),
        sha256=sha256_of_text(template.as_jinja()),
    )


def _own_marks(tokenizer: Tokenizer) -> tuple[str, ...] | None:
    """The control strings of the tokenizer's own chat template; None where it has none that renders."""
    if not tokenizer.chat_template:
        return None
    try:
        whole = probes.widest(find_template("tokenizer", tokenizer), tokenizer)
    except UserError:
        return None
    return None if whole is None else probes.marks_in(whole.text, tokenizer)


def _is_split(mark: str, tokenizer: Tokenizer) -> bool:
    return not probes.SPLIT_BY_DESIGN.fullmatch(mark) and len(tokenizer.encode(mark)) > 1
