"""Tokenizers and templates travel: llama.cpp reads the same tokens, and prompts are those of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shared_data import shared_path
from tests.tiny import tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.export.gguf.modelfile import TRIED, as_native, go_template, modelfile
from zhibei.export.gguf.pretokenizer import PROBES, differences, propose, prove, write_words
from zhibei.export.gguf.vocabulary import BYTE, CONTROL, UNUSED, USER_DEFINED, read_vocabulary, with_pre
from zhibei.generate.gguf_words import default_system, prompt_tokens, with_default_system, wording_of
from zhibei.generate.llama_cpp import GgufModel
from zhibei.text.families import TEMPLATES, find_template
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.messages import Message
from zhibei.text.native import bind
from zhibei.text.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def _tokenizer(split: str | None = None, added: tuple[str, ...] = ()) -> Tokenizer:
    from tokenizers import Regex, pre_tokenizers

    own = tiny_tokenizer()
    if split:
        steps = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    own.add_tokens(list(added), special_tokens=True)
    return check_tokenizer(own, source="tiny")


def _model(tmp_path: Path, tokenizer: Tokenizer, **values: str) -> GgufModel:
    from zhibei.export.gguf.file import add_values
    from zhibei.export.gguf.quantizer import import_gguf

    vocabulary, _ = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    path = tmp_path / "words.gguf"
    writer = import_gguf().GGUFWriter(path, "llama")
    add_values(writer, {**vocabulary.as_metadata(), **values})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufModel.load(path, vocab_only=True)


@pytest.mark.parametrize(("split", "name"), [(None, "gpt-2"), (LLAMA3_SPLIT, "llama-bpe"), (QWEN2_SPLIT, "qwen2")])
def test_the_pre_tokenizer_is_found_and_gives_the_same_tokens(split: str | None, name: str) -> None:
    tokenizer = _tokenizer(split)
    assert propose(json.loads(tokenizer.spec)["pre_tokenizer"]) == name
    vocabulary, notes = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    assert (vocabulary.pre, notes) == (name, ())


def test_a_wrong_pre_tokenizer_is_seen() -> None:
    tokenizer = _tokenizer(r"[a-z ]+|\d|.")
    vocabulary = read_vocabulary(tokenizer, num_rows=len(tokenizer))
    assert differences(with_pre(vocabulary, "gpt-2"), tokenizer, PROBES)
    with pytest.raises(UserError, match="no pre-tokenizer that cuts texts as this tokenizer does"):
        prove(vocabulary, tokenizer)


def test_without_llama_cpp_only_known_rules_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zhibei.export.gguf.pretokenizer.is_installed", lambda: False)
    known = _tokenizer()
    vocabulary, (note,) = prove(read_vocabulary(known, num_rows=len(known)), known)
    assert vocabulary.pre == "gpt-2"
    assert "not compared" in note
    other = _tokenizer(r"[a-z ]+|\d|.")
    with pytest.raises(UserError, match="without llama"):
        prove(read_vocabulary(other, num_rows=len(other)), other)


def test_added_tokens_and_rows_without_a_word_have_their_kinds(tmp_path: Path) -> None:
    tokenizer = _tokenizer(added=("<|im_start|>", "<|im_end|>"))
    vocabulary = read_vocabulary(tokenizer, num_rows=310, terminator="<|im_end|>")
    assert vocabulary.kinds[300:302] == (CONTROL, CONTROL)
    assert vocabulary.kinds[302:] == (UNUSED,) * 8
    assert vocabulary.special_ids["eot"] == 301
    with _model(tmp_path, tokenizer) as model:
        assert model.encode("a<|im_end|>") == tokenizer.encode("a<|im_end|>")


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama2", "vicuna_v1.1", "vicuna_v0", "mistral"])
def test_a_file_of_ours_prompts_as_training_did(name: str, tmp_path: Path) -> None:
    tokenizer = _tokenizer(added=("<|im_start|>", "<|im_end|>"))
    template = find_template(name, tokenizer)
    with _model(tmp_path, tokenizer, **{"tokenizer.chat_template": template.as_jinja()}) as model:
        wording = wording_of(model)
        assert wording.template.stop_strings == template.stop_strings
        for messages in TRIED:
            expected = tokenizer.encode(template.render(messages, answer_next=True).text)
            assert prompt_tokens(model, wording, messages) == expected


def test_the_system_prompt_of_training_travels_in_the_template(tmp_path: Path) -> None:
    tokenizer = _tokenizer(added=("<|im_start|>", "<|im_end|>"))
    template = find_template("chatml", tokenizer)
    jinja = with_default_system(template.as_jinja(), 'Say "no".\nAlways.')
    assert default_system(jinja) == ('Say "no".\nAlways.', template.as_jinja())
    asked = (Message("user", "why?"),)
    said = (Message("system", 'Say "no".\nAlways.'), *asked)
    expected = tokenizer.encode(template.render(said, answer_next=True).text)
    with _model(tmp_path, tokenizer, **{"tokenizer.chat_template": jinja}) as model:
        assert prompt_tokens(model, wording_of(model), asked) == expected
    plain = JinjaTemplate(source=jinja, special_tokens={"bos_token": tokenizer.bos, "eos_token": tokenizer.eos})
    assert plain.render(asked, answer_next=True).text == template.render(said, answer_next=True).text


def test_bos_stands_in_front_once_whoever_writes_it(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    for source in ("{{ bos_token }}{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}"):
        with _model(tmp_path, tokenizer, **{"tokenizer.chat_template": source}) as model:
            assert model.adds_bos
            assert prompt_tokens(model, wording_of(model), [Message("user", "the cat")])[:2].count(1) == 1


def _sentencepiece() -> Tokenizer:
    """A tokenizer as transformers saves those of LLaMA: BPE with byte fallback, a space in front."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdehmnost"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "a"), ("ca", "t"), ("\u2581", "cat"), ("a", "n")]
    words += ["".join(pair) for pair in merges]
    model = models.BPE(
        {word: number for number, word in enumerate(words)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return check_tokenizer(own, source="tiny sentencepiece")


def test_a_sentencepiece_vocabulary_is_read_from_tokenizer_json(tmp_path: Path) -> None:
    tokenizer = _sentencepiece()
    vocabulary, notes = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    assert (vocabulary.engine, vocabulary.adds_bos, vocabulary.adds_space, notes) == ("llama", True, True, ())
    assert vocabulary.kinds.count(BYTE) == 256
    with _model(tmp_path, tokenizer) as model:
        assert model.encode("the cat</s>the \u732b") == tokenizer.encode("the cat</s>the \u732b")
        assert model.decode(tokenizer.encode("the cat")).strip() == "the cat"


def test_a_tokenizer_without_an_engine_in_llama_cpp_is_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -2.0)], unk_id=0))
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match="no engine that is known to read this tokenizer: Unigram"):
        read_vocabulary(check_tokenizer(own, source="tiny unigram"), num_rows=3)


def test_a_file_without_a_template_asks_for_one(tmp_path: Path) -> None:
    with _model(tmp_path, _tokenizer()) as model:
        with pytest.raises(UserError, match="no chat template"):
            wording_of(model)
        with pytest.raises(UserError, match="not tokens of this file"):
            wording_of(model, asked="llama3")
        assert wording_of(model, asked="alpaca").template.name == "alpaca"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_training_wrote(name: str) -> None:
    native = bind(TEMPLATES[name], bos="<s>", eos="</s>")
    for messages in TRIED:
        expected = native.render(messages, answer_next=True).text
        # The first BOS is put in front by the engine.
        assert _go(go_template(native), messages) == expected.removeprefix("<s>")


def test_a_template_of_the_tokenizer_is_told_in_go_where_it_is_a_family() -> None:
    native = bind(TEMPLATES["chatml"], bos="<s>", eos="</s>")
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    own = JinjaTemplate(source=native.as_jinja(), special_tokens=specials)
    found = as_native(own, bos="<s>", eos="</s>")
    assert found is not None
    assert found.name == "chatml"
    odd = JinjaTemplate(source="{{ messages[0]['content'] }}!", special_tokens=specials)
    text, (note,) = modelfile("x.gguf", odd, context_tokens=512, eos="</s>")
    assert "TEMPLATE" not in text
    assert "none of the families" in note


def test_a_modelfile_names_file_stops_and_context() -> None:
    native = bind(TEMPLATES["alpaca"], bos="", eos="</s>")
    text, notes = modelfile("x-Q8_0.gguf", native, context_tokens=100_000, eos="</s>", system="Be kind.")
    assert text.startswith("FROM ./x-Q8_0.gguf\n")
    assert not notes
    assert 'PARAMETER stop "### Instruction:"\n' in text
    assert 'PARAMETER stop "</s>"\n' in text
    assert "PARAMETER num_ctx 8192\n" in text
    assert 'SYSTEM """Be kind."""' in text


@pytest.mark.parametrize(("folder", "vectors"), [("derived/llama2_tokenizer", "llama-spm")])
def test_sentencepiece_tokens_equal_the_vectors_of_llama_cpp(folder: str, vectors: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(shared_path("data", *folder.split("/"))))
    vocabulary, notes = prove(read_vocabulary(tokenizer, num_rows=len(tokenizer)), tokenizer)
    assert vocabulary.engine == "llama"
    assert not notes
    assert BYTE in vocabulary.kinds
    assert USER_DEFINED not in vocabulary.kinds
    write_words(tmp_path / "words.gguf", vocabulary)
    base = shared_path("data", "ggerganov+llama.cpp", "models")
    texts = (base / f"ggml-vocab-{vectors}.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (base / f"ggml-vocab-{vectors}.gguf.out").read_text("utf-8").split("\n")
    with GgufModel.load(tmp_path / "words.gguf", vocab_only=True) as model:
        for text, line in zip(texts, lines, strict=False):
            assert model.encode(text) == [int(number) for number in line.split()]


def _go(source: str, messages: tuple[Message, ...]) -> str:
    """The subset of Go's templates that is written here: if, else if, else, range, variables and fields."""
    parts = [part.strip() if number % 2 else part for number, part in enumerate(_cut(source))]
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    root = {"System": system, "Messages": [{"Role": m.role, "Content": m.content} for m in messages]}
    out: list[str] = []
    _run(parts, 0, {"dot": root, "root": root, "vars": {}}, out)
    return "".join(out)


def _cut(source: str) -> list[str]:
    found = []
    while "{{" in source:
        text, _, rest = source.partition("{{")
        action, _, source = rest.partition("}}")
        found += [text, action]
    return [*found, source]


def _value(word: str, scope: dict) -> object:
    if word.startswith('"'):
        return word.strip('"')
    if word in ("true", "false"):
        return word == "true"
    if word.startswith("$."):
        return scope["root"][word[2:]]
    return scope["vars"][word] if word.startswith("$") else scope["dot"][word[1:]]


def _is_true(action: str, scope: dict) -> bool:
    words = action.split()
    return _value(words[1], scope) == _value(words[2], scope) if words[0] == "eq" else bool(_value(words[0], scope))


def _run(parts: list[str], at: int, scope: dict, out: list[str] | None) -> tuple[int, str]:
    """Write parts from `at` to the end of the block; where it ends and with which action. `out` None writes nothing."""
    while at < len(parts):
        if at % 2 == 0:
            if out is not None:
                out.append(parts[at])
            at += 1
            continue
        action = parts[at]
        first = action.split()[0]
        if first in ("end", "else"):
            return at, action
        if first == "if":
            at = _branches(parts, at, action.removeprefix("if "), scope, out)
        elif first == "range":
            values = _value(action.split()[1], scope) if out is not None else []
            stop, _ = _run(parts, at + 1, scope, None)
            for value in values:  # type: ignore[attr-defined]
                _run(parts, at + 1, {**scope, "dot": value}, out)
            at = stop + 1
        else:
            if out is not None:
                name, equals, value = action.partition(":=" if ":=" in action else "=")
                if equals:
                    scope["vars"][name.strip()] = _value(value.strip(), scope)
                else:
                    out.append(str(_value(action, scope)))
            at += 1
    return at, ""


def _branches(parts: list[str], at: int, condition: str, scope: dict, out: list[str] | None) -> int:
    done = False
    while True:
        runs = out is not None and not done and (not condition or _is_true(condition, scope))
        at, action = _run(parts, at + 1, scope, out if runs else None)
        done = done or runs
        if action == "end":
            return at + 1
        condition = action.removeprefix("else").strip().removeprefix("if").strip()
