"""The border to Hugging Face tokenizers: loaded and checked once, plain attributes after. Knows no rows, no templates.

After loading, everything runs on the `tokenizers` library alone: worker processes need neither transformers nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from zhibei.config.errors import UserError
from zhibei.text.hub import hub_options, silence

TOKENIZERS_VERSION: str = tokenizers.__version__
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN_FAMILIES = ("llama", "qwen3", "gemma", "gemma2", "phi", "gpt2", "gpt_neox", "olmo", "olmo2")
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Many texts as flat arrays; text r owns tokens `borders[r]:borders[r+1]`.

    `starts` and `ends` [N] are character offsets into the text of the row: token n was read from
    characters `starts[n]:ends[n]`. Tokens that are bytes of one character share its offsets.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    borders: np.ndarray


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer whose special ids were checked when it was loaded.

    `bos`, `pad` are "" and their ids None where the tokenizer has none. `adds_bos`: the tokenizer itself would put
    BOS in front of a text; templates then spell it, and nothing is ever added while encoding. `notes` are facts a
    person should see (which token pads and why).
    """

    spec: str
    """The tokenizer as JSON: it travels to worker processes and is what the fingerprint is taken of."""
    source: str
    eos: str
    bos: str = ""
    pad: str = ""
    unk: str = ""
    adds_bos: bool = False
    chat_template: str | None = None
    named_specials: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("spec", "source", "eos", "bos", "pad", "unk", "adds_bos", "chat_template", "named_specials", "notes")
        return {name: self.__dict__[name] for name in kept}

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.spec)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any id can change: vocabulary, merges, normaliser, added tokens, BOS, EOS, PAD, UNK."""
        names = json.dumps([self.bos, self.eos, self.pad, self.unk, self.adds_bos])
        return hashlib.sha256((self.spec + names).encode()).hexdigest()

    @cached_property
    def special_strings(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as one control token, longest first."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special), key=len, reverse=True))

    @cached_property
    def is_special_id(self) -> np.ndarray:
        """bool [V]: which ids are control tokens."""
        table = np.zeros(len(self), dtype=bool)
        table[[key for key, token in self.backend.get_added_tokens_decoder().items() if token.special]] = True
        return table

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._num_ids

    @cached_property
    def _num_ids(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token) if token else None

    @property
    def eos_id(self) -> int:
        found = self.id_of(self.eos)
        assert found is not None, "checked when the tokenizer was loaded"
        return found

    @property
    def bos_id(self) -> int | None:
        return self.id_of(self.bos)

    @property
    def unk_id(self) -> int | None:
        return self.id_of(self.unk)

    @property
    def pad_id(self) -> int:
        """Padding is masked by length, never by this id, so sharing it with another token loses nothing."""
        found = self.id_of(self.pad)
        return self.eos_id if found is None else found

    def is_special(self, token: str) -> bool:
        return token in self.special_strings

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are spelled out; nothing is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids and character offsets of whole rendered texts; nothing is added."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
        num_tokens = int(lengths.sum())
        ids = _flat((encoding.ids for encoding in encodings), count=num_tokens)
        offsets = _flat((chain.from_iterable(encoding.offsets) for encoding in encodings), count=2 * num_tokens)
        borders = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return Encoded(ids, offsets[0::2].copy(), offsets[1::2].copy(), borders)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        return [self.backend.id_to_token(int(one)) or f"<{int(one)}?>" for one in ids]

    def stop_ids(self, terminator: str) -> tuple[int, ...]:
        """Ids at which generation ends: EOS, and the template's terminator where that is one control token."""
        found = self.id_of(terminator.strip()) if self.is_special(terminator.strip()) else None
        return (self.eos_id,) if found is None or found == self.eos_id else (self.eos_id, found)


def _flat(rows: Iterable[Iterable[int]], *, count: int) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=count)


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, cache: Path | None = None
) -> Tokenizer:
    """A tokenizer from a Hugging Face folder, a run directory or a hub id. `cache`: where it is kept for the next time.

    UserError: files missing or broken, no EOS token, a special token outside of the vocabulary.
    """

    def load() -> Tokenizer:
        hugging_face = load_hugging_face_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        return check_tokenizer(hugging_face, source=path)

    folder = Path(find_folder(path))
    if cache is None or trust_remote_code or not folder.is_dir():
        return load()
    from zhibei.text.kept_tokenizer import kept_or_loaded

    return kept_or_loaded(folder, cache, source=path, load=load)


def load_hugging_face_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """transformers' own object for the same path, e.g. to save it beside a trained model."""
    place = find_folder(path)
    try:
        if is_plain(Path(place)):
            # The class that AutoTokenizer would choose, without the two seconds that choosing takes.
            from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

            loaded: Any = PreTrainedTokenizerFast.from_pretrained(place)
        else:
            from transformers import AutoTokenizer

            options = {"revision": revision, "trust_remote_code": trust_remote_code, **hub_options(place)}
            loaded = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers raises anything from OSError to KeyError for a broken folder
        if not Path(place).exists():
            raise UserError(
                f"no such folder here, and the hub does not give it: {silence() or _first_line(error)}",
                expected="a folder with a tokenizer, or the id of a model that can be downloaded",
                fix="check the name and the network; gated models need `hf auth login`",
                where=path,
            ) from error
        raise UserError(
            f"the tokenizer cannot be loaded: {_first_line(error)}",
            expected="tokenizer.json (or tokenizer.model) and tokenizer_config.json of one model, whole",
            fix="copy these files again from the model's source, or name another tokenizer with model.tokenizer",
            where=path,
        ) from error
    if not getattr(loaded, "backend_tokenizer", None):
        raise UserError(
            f"{type(loaded).__name__} has no fast version, so tokens cannot be traced back to characters",
            expected="a tokenizer of the `tokenizers` library (tokenizer.json)",
            fix="convert it once: AutoTokenizer.from_pretrained(path, use_fast=True).save_pretrained(new_path)",
            where=path,
        )
    return loaded


def is_plain(folder: Path) -> bool:
    """Whether tokenizer.json alone says what the tokenizer does, so that no family's class is wanted.

    Families whose class transformers puts in the place of a plain one are left to it (tests/text/test_kept_tokenizer.py
    compares the two ways).
    """
    settings, config = (_json_object(folder / name) for name in ("tokenizer_config.json", "config.json"))
    return (
        (folder / "tokenizer.json").is_file()
        and not (folder / "tekken.json").exists()
        and "auto_map" not in settings
        and settings.get("tokenizer_class") in PLAIN_CLASSES
        and config.get("model_type") in (None, *PLAIN_FAMILIES)
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def looks_local(path: str) -> bool:
    """Whether a path with nothing behind it was meant for this machine and not for the hub.

    `runs/typo` is no hub id where a folder `runs` lies here: a hub look-up would only hide the misspelling.
    """
    parent = Path(path).expanduser().parent
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (parent != Path(".") and parent.is_dir())


def find_folder(path: str) -> str:
    """The folder in which the tokenizer's files lie, or the path itself where it is no folder here (a hub id)."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if looks_local(path):
            raise UserError(
                "this folder does not exist",
                expected="a Hugging Face folder, a run directory, or a hub id such as org/name",
                fix="check the path",
                where=path,
            )
        return path
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    for candidate in (folder, folder / "model"):
        if any((candidate / name).is_file() for name in names):
            return str(candidate)
    raise UserError(
        "the folder holds no tokenizer",
        expected="tokenizer.json (or tokenizer.model) and tokenizer_config.json",
        fix="copy the tokenizer files of the base model into it, or name a folder with model.tokenizer",
        where=path,
    )


def check_tokenizer(hugging_face: Any, *, source: str) -> Tokenizer:
    """The border object of a loaded transformers tokenizer, its special ids checked."""
    spec = _exact_offsets(hugging_face.backend_tokenizer.to_str())
    backend = tokenizers.Tokenizer.from_str(spec)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = {name: getattr(hugging_face, f"{name}_token", None) or "" for name in ("bos", "eos", "pad", "unk")}
    for name, token in names.items():
        if token and token not in vocabulary:
            raise UserError(
                f"{name}_token is {token!r}, which is not in the vocabulary",
                expected="a token that has an id",
                fix=f"correct {name}_token in tokenizer_config.json (and special_tokens_map.json)",
                where=source,
                pitfall="llama-wrong-special-ids-decapoda",
            )
    if not names["eos"] or names["eos"] == names["unk"]:
        candidates = [token for token in EOS_NAMES if token in vocabulary]
        raise UserError(
            "the tokenizer has no end-of-sequence token, so a model could never learn to stop"
            if not names["eos"]
            else f"the end-of-sequence token is the unknown token {names['eos']!r}",
            expected="eos_token in tokenizer_config.json"
            + (f", here probably {candidates[0]!r}" if candidates else ""),
            fix=f'add "eos_token": {json.dumps(candidates[0] if candidates else "</s>")} to tokenizer_config.json '
            "(and the corrected bos_token and unk_token of this model family)",
            where=source,
            pitfall="eos-not-appended-in-sft",
        )
    pad, notes = _choose_pad(names, vocabulary)
    probe = backend.encode("a", add_special_tokens=True).ids
    return Tokenizer(
        spec=spec,
        source=source,
        eos=names["eos"],
        bos=names["bos"],
        pad=pad,
        unk=names["unk"],
        adds_bos=bool(names["bos"]) and probe[:1] == [vocabulary[names["bos"]]],
        chat_template=_chat_template(hugging_face.chat_template, source=source),
        named_specials={key: str(value) for key, value in hugging_face.special_tokens_map.items() if value},
        notes=notes,
    )


def _choose_pad(names: Mapping[str, str], vocabulary: Mapping[str, int]) -> tuple[str, tuple[str, ...]]:
    """An existing token that no text uses; a new token would need a new row in the embedding."""
    if names["pad"] and names["pad"] != names["eos"]:
        return names["pad"], ()
    reserved = [token for token in PAD_NAMES if token in vocabulary and token not in (names["eos"], names["bos"])]
    chosen = next(iter(reserved), "") or names["unk"] or names["eos"]
    reason = "the tokenizer names none" if not names["pad"] else "the tokenizer's own is its EOS token"
    return chosen, (f"padding uses {chosen!r}: {reason}; padding is masked by length, whatever its id",)


def _chat_template(found: Any, *, source: str) -> str | None:
    """Some tokenizers carry several named templates; `default` is the one for conversations."""
    if not isinstance(found, dict):
        return found or None
    if "default" not in found:
        raise UserError(
            f"the tokenizer has chat templates named {', '.join(found)}, none of them 'default'",
            expected="one chat template, or one called default",
            fix="name a template of zhibei with data.template",
            where=source,
        )
    return found["default"]


def _exact_offsets(spec: str) -> str:
    """The same tokenizer with offsets that keep a token's leading space; ids do not depend on it."""

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if "trim_offsets" in part:
                part["trim_offsets"] = False
            for inner in part.values():
                walk(inner)
        elif isinstance(part, list):
            for inner in part:
                walk(inner)

    whole = json.loads(spec)
    walk([whole.get("pre_tokenizer"), whole.get("post_processor")])
    whole["truncation"] = whole["padding"] = None
    return json.dumps(whole, ensure_ascii=False)
