"""Real vocabularies and templates: tokens equal llama.cpp's own test vectors, and templates pass through a file.

The vocabularies and vectors are those of ggml-org/llama.cpp (models/), the templates those of llama.cpp and of
chujiezheng/chat_templates. Tests skip where they are not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shared_data import shared_path, shared_root
from tests.tiny import tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.export.gguf.pretokenizer import prove, write_words
from zhibei.export.gguf.vocabulary import read_vocabulary
from zhibei.generate.gguf_words import default_system, with_default_system, wording_of
from zhibei.generate.llama_cpp import GgufModel
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.messages import Message
from zhibei.text.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SHARED = ("data", "ggerganov+llama.cpp", "models")
BETWEEN = "\n__ggml_vocab_test__\n"


def vectors_of(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's texts and the tokens they must become."""
    base = shared_path(*SHARED)
    texts = (base / f"ggml-vocab-{name}.gguf.inp").read_text("utf-8").split(BETWEEN)
    lines = (base / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").split("\n")
    return [(text, [int(n) for n in line.split()]) for text, line in zip(texts, lines, strict=False)]


def from_gguf(name: str, folder: Path) -> Tokenizer:
    """A tokenizer.json of the words and merges that llama.cpp's own file holds, cut as that of the family is."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    reader = gguf.GGUFReader(shared_path(*SHARED, f"ggml-vocab-{name}.gguf"))
    words, merges, kinds = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "merges", "token_type")
    )
    steps = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "deepseek-coder": [
            *(
                pre_tokenizers.Split(Regex(pattern), "isolated")
                for pattern in (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+")
            ),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }[name]
    numbers = {word: number for number, word in enumerate(words)}
    pairs: list[tuple[str, str]] = [tuple(merge.split(" ", 1)) for merge in merges]  # type: ignore[misc]
    known = [pair for pair in pairs if "".join(pair) in numbers and pair[0] in numbers and pair[1] in numbers]
    backend = Backend(models.BPE(vocab=numbers, merges=known))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    special = [words[n] for n, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    backend.add_special_tokens(special)
    own = [words[n] for n, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED]
    backend.add_tokens(own)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    end = words[int(reader.get_field("tokenizer.ggml.eos_token_id").contents())]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(str(folder))


def derived(name: str) -> Callable[[str, Path], Tokenizer]:
    return lambda _, folder: load_tokenizer(str(shared_path("data", "derived", name)))


@pytest.mark.parametrize(
    ("name", "make", "pre"),
    [
        ("llama-bpe", derived("llama3_tokenizer"), "llama-bpe"),
        ("gpt-2", from_gguf, "gpt-2"),
        ("deepseek-coder", from_gguf, "deepseek-coder"),
        ("qwen2", derived("qwen2_tokenizer"), "qwen2"),
    ],
)
def test_bpe_tokens_equal_the_vectors_of_llama_cpp(name: str, make: Any, pre: str, tmp_path: Path) -> None:
    tokenizer = make(name, tmp_path / "tokenizer")
    vocabulary, _ = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    assert (vocabulary.engine, vocabulary.pre) == ("gpt2", pre)
    write_words(tmp_path / "words.gguf", vocabulary)
    found = vectors_of(name)
    assert len(found) > 30
    with GgufModel.load(tmp_path / "words.gguf", vocab_only=True) as model:
        for text, tokens in found:
            assert model.encode(text) == tokens
            assert tokenizer.encode(text) == tokens


def fixtures() -> list[Path]:
    folders = [
        shared_root().joinpath("data", "chujiezheng+chat_templates", "chat_templates"),
        shared_root().joinpath(*SHARED, "templates"),
    ]
    return [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.jinja"))]


CONVERSATIONS = [
    (Message("user", "Hi there."),),
    (Message("system", "Be kind."), Message("user", "Hi.")),
    (Message("user", "1+1?"), Message("assistant", "2"), Message("user", "And  3?\n")),
]


@pytest.mark.parametrize("path", fixtures() or [None], ids=lambda path: path.stem if path else "none")
def test_a_chat_template_says_the_same_out_of_a_file(path: Path | None, tmp_path: Path) -> None:
    if path is None:
        pytest.skip("there are no chat templates of others here (set ZHIBEI_SHARED)")
    source = path.read_text("utf-8")
    tokenizer = check_tokenizer(tiny_tokenizer(), source="tiny")
    before = JinjaTemplate(source, {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos})
    vocabulary, _ = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    for system in (None, 'Say "no" to\nnothing.'):
        write_with_template(tmp_path / "words.gguf", vocabulary, with_default_system(source, system))
        with GgufModel.load(tmp_path / "words.gguf", vocab_only=True) as model:
            wording = wording_of(model)
            assert default_system(model.chat_template) == (system, source)
            assert wording.system == system
            for messages in CONVERSATIONS:
                assert said(wording.template, messages) == said(before, messages)


def said(template: Any, messages: tuple[Message, ...]) -> str | None:
    """The prompt, or None where the template refuses the messages."""
    try:
        return template.render(messages, answer_next=True).text
    except UserError:
        return None


def write_with_template(path: Path, vocabulary: Any, jinja: str) -> None:
    from zhibei.export.gguf.file import add_values

    writer = gguf.GGUFWriter(path, "llama")
    add_values(writer, {**vocabulary.as_metadata(), "tokenizer.chat_template": jinja})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
