"""Which pre-tokenizer of llama.cpp cuts a text as a tokenizer does: proposed by its rules, proved on texts.

A wrong name gives a model that reads other tokens than it was trained on, without any message. Where llama.cpp is
installed every name is tried on texts, and one that differs in a single token is refused; without it only the rules
below are believed, which are those of well-known families.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.export.gguf.vocabulary import Vocabulary, steps_of, with_pre
from zhibei.generate.llama_cpp import GgufModel
from zhibei.generate.llama_library import is_installed
from zhibei.text.tokenizer import Tokenizer

PITFALL = "gguf-pretokenizer-hash-unknown"

NAMES = (
    "gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "smollm", "starcoder", "falcon",
    "gpt-4o", "tekken", "llama4", "chatglm-bpe", "glm4", "olmo", "mpt", "command-r", "stablelm2", "dbrx", "smaug-bpe",
    "qwen35", "seed-coder", "hunyuan", "superbpe", "trillion", "bailingmoe", "exaone", "minerva-7b", "kimi-k2",
    "poro-chat", "viking", "jais", "codeshell", "chameleon", "minicpm5", "default",
)  # fmt: skip
"""What llama.cpp calls its pre-tokenizers, the usual ones first (llama-vocab.cpp)."""

PROBES = (
    "Hello world! It's the year 2024, and I'd say we've done 1 22 333 4444 55555 666666 things.",
    "HE'S DONE IT'LL DO, they'RE 'quoted' and don't.",
    "  two spaces,   three,\ttab\t\ttabs \n one line\n\n two\n\n\n three \r\n windows\r\n\r\n",
    " leading and trailing  ",
    "\n",
    "\n\n",
    " \n \n",
    "\t",
    "def f(x):\n    return {'a': [x**2 for x in range(10)], \"b\": x != 3}\n\n\nclass A:\n\tpass\n",
    'https://example.org/a_b-c?d=e&f=%20#g <tag attr="1">text</tag> a@b.cd $100.50 50% #1 C++ x->y',
    "3.14159 1,000,000 10:30 2024-01-31 0x1F 1e-5 +49 (0)30 1st 2nd x2 2x",
    "...!!!???;;:: ---- ==== **** ____ ~~~~ ```code``` \u2026 \u2013 \u2014 \u00ab\u00bb \u201cx\u201d \u2018y\u2019",
    "\u00dcber na\u00efve caf\u00e9 \u0141\u00f3d\u017a \u00c5ngstr\u00f6m \u00e6 \u00f8 \u00df",
    "Привет, как дела? Ελλάδα 2024",
    "你好，世界！今天是2024年1月31日。 日本語のテキストです。 한국어 텍스트",
    "مرحبا بالعالم שלום नमस्ते สวัสดี",
    "\U0001f680 \U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2705",
    "### Instruction:\nWrite a poem.\n\n### Response:",
    "user\nWhat is 12*34?\nassistant\n408",
    "camelCaseWord snake_case_word kebab-case-word SCREAMING_CASE a1b2c3",
    "\u00a0nbsp\u00a0\u2003em\u3000ideographic\u200bzero",
)
"""Texts on which families of pre-tokenizers differ: runs of digits, contractions, white space, scripts, signs."""

UNLIKE = ("e\u0301 a\u0308 n\u0303", "  a  b  ", "\ufb01ne \u2460 \uff21\uff22")
"""Texts that a tokenizer may rewrite first (Unicode forms, doubled spaces), which llama.cpp does not."""


def prove(vocabulary: Vocabulary, tokenizer: Tokenizer) -> tuple[Vocabulary, tuple[str, ...]]:
    """The vocabulary with the pre-tokenizer that fits, and what a person should know.

    Raises UserError when llama.cpp has none that does, or when that cannot be known here.
    """
    if vocabulary.engine == "llama":
        return vocabulary, _notes(vocabulary, tokenizer)
    proposed = propose(json.loads(tokenizer.spec).get("pre_tokenizer"))
    if not is_installed():
        if proposed:
            return with_pre(vocabulary, proposed), ("llama.cpp is not installed: its tokens were not compared",)
        raise _unknown(tokenizer, "its rules are those of no family that is known without llama.cpp at hand", "")
    nearest, fewest = "", ""
    most = -1
    for name in dict.fromkeys((*((proposed,) if proposed else ()), *NAMES)):
        candidate = with_pre(vocabulary, name)
        differing = differences(candidate, tokenizer, PROBES)
        if differing is None:
            continue
        if not differing:
            return candidate, _notes(candidate, tokenizer)
        if len(PROBES) - len(differing) > most:
            most, nearest, fewest = len(PROBES) - len(differing), name, differing[0]
    raise _unknown(tokenizer, f"the nearest, {nearest}, agrees on {most} of {len(PROBES)} texts", fewest)


def _unknown(tokenizer: Tokenizer, why: str, text: str) -> UserError:
    return UserError(
        f"llama.cpp has no pre-tokenizer that cuts texts as this tokenizer does: {why}"
        + (f" (it differs on {text!r})" if text else ""),
        expected="the pre-tokenizer of a family that llama.cpp knows, as LLaMA 3, Qwen, GPT-2 and others have it",
        fix="update xllamacpp if the family is new, restore the base's pre_tokenizer in tokenizer.json if it was "
        "changed, or serve the Hugging Face folder itself: zhibei serve",
        where=tokenizer.source,
        pitfall=PITFALL,
    )


def _notes(vocabulary: Vocabulary, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts that come out otherwise although the engine fits."""
    if not is_installed():
        return ("llama.cpp is not installed: its tokens were not compared",)
    texts = (*PROBES, *UNLIKE)
    differing = differences(vocabulary, tokenizer, texts) or []
    if not differing:
        return ()
    return (
        f"llama.cpp reads {len(differing)} of {len(texts)} probe texts as other tokens than this tokenizer, which "
        f"rewrites texts first (doubled spaces, Unicode forms); e.g. {differing[0][:40]!r}",
    )


def differences(vocabulary: Vocabulary, tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[str] | None:
    """The texts that llama.cpp reads as other tokens; None when it does not know the pre-tokenizer."""
    with tempfile.TemporaryDirectory(prefix="zhibei-gguf-") as folder:
        path = Path(folder) / "words.gguf"
        write_words(path, vocabulary)
        try:
            model = GgufModel.load(path, vocab_only=True)
        except UserError:
            return None
        with model:
            return [text for text in texts if model.encode(text) != tokenizer.encode(text)]


def write_words(path: Path, vocabulary: Vocabulary) -> None:
    """A GGUF file that holds a vocabulary and no tensor."""
    from zhibei.export.gguf.file import add_values
    from zhibei.export.gguf.quantizer import import_gguf

    writer = import_gguf().GGUFWriter(path, "llama")
    add_values(writer, vocabulary.as_metadata())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def propose(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The name that the rules of a tokenizer suggest, or ""."""
    steps = steps_of(pre_tokenizer)
    return next((name for name, fits in _RULES.items() if fits(steps)), "")


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_by(pattern: str) -> Callable[[list[Mapping[str, Any]]], bool]:
    def fits(steps: list[Mapping[str, Any]]) -> bool:
        splits = [step for step in steps if step.get("type") == "Split"]
        return (
            [step.get("type") for step in steps] == ["Split", "ByteLevel"]
            and splits[0].get("pattern") == {"Regex": pattern}
            and not steps[1].get("use_regex", True)
        )

    return fits


def _is_gpt2(steps: list[Mapping[str, Any]]) -> bool:
    kinds = [step.get("type") for step in steps]
    return kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space", True)


def _has_single_digits(steps: list[Mapping[str, Any]]) -> bool:
    kinds = [step.get("type") for step in steps]
    return kinds == ["Digits", "ByteLevel"] and bool(steps[0].get("individual_digits")) and _is_gpt2(list(steps[1:]))


_RULES: dict[str, Callable[[list[Mapping[str, Any]]], bool]] = {
    "gpt-2": _is_gpt2,
    "llama-bpe": _split_by(_CONTRACTIONS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split_by(_CONTRACTIONS + r"\p{N}" + _REST),
    "smollm": _has_single_digits,
}
