"""Facts of tokenizers and templates: what probes show on sound ones, on real ones, and on those broken on purpose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.doctor.healthy import broken, healthy
from tests.text.small_tokenizers import REAL, SMALL, tokenizer_called
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import read_model
from zhibei.doctor.facts.sentencepiece_file import read_sentencepiece, vocabulary_difference
from zhibei.doctor.facts.template_probes import MARK
from zhibei.doctor.facts.text import TemplateFacts, read_template_facts, read_tokenizer_facts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.text.families import TEMPLATES, find_template
from zhibei.text.jinja import JinjaTemplate
from zhibei.text.tokenizer import Tokenizer, load_tokenizer

for area in ("tokenizer", "tokenizer_more", "template", "template_more"):
    import_module(f"zhibei.doctor.pitfalls.{area}")
PLAIN = ("alpaca", "alpaca_lora", "vicuna_v1.1", "vicuna_v0", "coati", "llama2", "mistral")


def findings(facts: Facts) -> dict[str, str]:
    """What the checks of tokenizers and templates say, by id."""
    chosen = [entry for entry in CATALOGUE.values() if entry.area in ("tokenizer", "template") and entry.find]
    return {entry.id: finding.what for entry in chosen if entry.find for finding in entry.find(facts)}


def facts_with(tokenizer: Tokenizer, template: Any = None, folder: Path | None = None) -> Facts:
    facts = healthy()
    model = read_model(ModelSection(path=str(folder)), LoraSection()) if folder is not None else None
    rows = len(tokenizer)
    facts = broken(facts, "model", model or replace(facts.model, embedding_rows=rows))  # type: ignore[arg-type]
    facts = broken(facts, "rows", None)
    facts = broken(facts, "tokenizer", read_tokenizer_facts(tokenizer, model))
    return broken(facts, "template", read_template_facts(template, tokenizer) if template else None)


@pytest.mark.parametrize("name", [*SMALL, *REAL])
@pytest.mark.parametrize("family", PLAIN)
def test_sound_pairs_of_tokenizer_and_template_give_no_finding(name: str, family: str) -> None:
    tokenizer = tokenizer_called(name)
    assert findings(facts_with(tokenizer, find_template(family, tokenizer))) == {}


@pytest.mark.parametrize(("name", "family"), [("llama3", "llama3"), *((small, "chatml") for small in SMALL)])
def test_families_of_control_tokens_on_tokenizers_that_have_them(name: str, family: str) -> None:
    tokenizer = tokenizer_called(name)
    found = facts_with(tokenizer, find_template(family, tokenizer))
    assert findings(found) == {}
    assert found.template is not None
    assert found.template.terminator_ids == (tokenizer.id_of(found.template.terminator.strip()),)
    assert all(len(ids) == 1 for ids in found.template.special_pieces.values())


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_real_folders_give_no_finding(shared: Callable[..., Path], name: str) -> None:
    folder = shared("data", "models", name)
    tokenizer = load_tokenizer(str(folder))
    found = facts_with(tokenizer, find_template("auto", tokenizer), folder)
    assert findings(found) == {}
    assert found.tokenizer is not None
    assert found.tokenizer.sentencepiece_ids == {"unk": 0, "bos": 1, "eos": 2}
    assert found.tokenizer.declared_ids["generation_config.json"] == {"bos": 1, "eos": 2}


def test_the_sentencepiece_reader_gives_what_sentencepiece_gives(shared: Callable[..., Path]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared("data", "derived", "llama2_tokenizer", "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = read_sentencepiece(path)
    assert found is not None
    assert [text for text, _ in found.pieces] == [theirs.id_to_piece(n) for n in range(theirs.get_piece_size())]
    assert dict(found.special_ids) == {"unk": theirs.unk_id(), "bos": theirs.bos_id(), "eos": theirs.eos_id()}
    assert {n for n, (_, kind) in enumerate(found.pieces) if kind == 3} == {
        n for n in range(theirs.get_piece_size()) if theirs.is_control(n)
    }
    texts = {n: text for n, (text, _) in enumerate(found.pieces)}
    assert vocabulary_difference(found, texts) == ""
    shifted = {n + 1: text for n, text in texts.items()}
    assert "pieces differ" in vocabulary_difference(found, shifted)


def test_other_files_of_that_name_say_nothing(tmp_path: Path) -> None:
    for content in (b"", b"\x00\x01", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff\xff"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert read_sentencepiece(tmp_path / "tokenizer.model") is None
    assert read_sentencepiece(tmp_path / "absent") is None


def settings(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path)


def checked(folder: Path, tokenizer: Path | None = None, template: str = "alpaca") -> dict[str, str]:
    loaded = load_tokenizer(str(tokenizer or folder))
    return findings(facts_with(loaded, find_template(template, loaded), folder))


def test_a_tiny_folder_is_sound(folder: Path) -> None:
    assert checked(folder) == {}


@pytest.mark.parametrize(
    ("file", "change", "finds"),
    [
        ("config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}, "llama-wrong-special-ids-decapoda"),
        ("config.json", {"pad_token_id": 300}, "token-id-beyond-embedding"),
        ("generation_config.json", {"eos_token_id": [7, 9]}, "train-infer-special-ids-disagree"),
        ("generation_config.json", {"eos_token_id": 4000}, "token-id-beyond-embedding"),
        ("tokenizer_config.json", {"add_eos_token": True}, "fast-tokenizer-ignores-add-eos"),
    ],
)
def test_special_ids_that_other_files_contradict(folder: Path, file: str, change: dict[str, Any], finds: str) -> None:
    settings(folder, file, **change)
    assert finds in checked(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    found = checked(folder)
    assert list(found) == ["token-id-beyond-embedding"]
    assert "[PAD]" in found["token-id-beyond-embedding"]


def test_the_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    """Of the same size, with other tokens at the ids: told by the tokenizer that lies beside the weights."""
    other = tiny_model_folder(tmp_path, name="other")
    assert checked(folder, other) == {}
    spec = json.loads((other / "tokenizer.json").read_text())
    by_id = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    words = [token for token, number in by_id if number >= 4]
    spec["model"]["vocab"] = {token: n for n, token in enumerate([token for token, n in by_id if n < 4] + words[::-1])}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    found = checked(folder, other)
    assert list(found) == ["tokenizer-of-another-model"]
    assert "ids are other tokens than in" in found["tokenizer-of-another-model"]


HEAD = "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
BODY = "{{- message.content + '<|im_end|>\\n' -}}"
TAIL = "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
CHATML = HEAD + BODY + TAIL
THOUGHT = "{{- '<think>\\n\\n</think>\\n\\n' if message.role == 'assistant' and loop.last -}}"
SWITCH = "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking -}}{%- endif -%}"
ASKING = TAIL.removesuffix("{%- endif -%}")


def template_facts(source: str) -> TemplateFacts:
    tokenizer = tokenizer_called("byte_level")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return read_template_facts(JinjaTemplate(source, names, marks=tokenizer.special_strings), tokenizer)


def test_probes_of_a_plain_chat_template() -> None:
    found = template_facts(CHATML)
    assert (found.terminator, found.split_marks, found.prompt_differs) == ("<|im_end|>", (), "")
    assert (found.bos_at_start, found.bos_in_prompt, found.doubled_end) == (0, 0, "")
    assert not found.rewrites_earlier_turns
    assert found.thinking_modes == ()


def test_probes_of_broken_chat_templates() -> None:
    assert template_facts("{{- bos_token + bos_token -}}" + CHATML).bos_at_start == 2
    only_in_prompts = "{%- if add_generation_prompt -%}{{- bos_token -}}{%- endif -%}" + CHATML
    assert template_facts(only_in_prompts).bos_in_prompt == 1
    blank = CHATML.replace("'<|im_start|>assistant\\n' -}}", "'<|im_start|>assistant\\n\\n' -}}")
    assert "the text differs" in template_facts(blank).prompt_differs
    doubled = template_facts(CHATML.replace("'<|im_end|>\\n'", "'<|im_end|>\\n' + eos_token"))
    assert doubled.doubled_end == "<|im_end|>\n</s>"
    foreign = template_facts(CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|over|></s>"))
    assert set(foreign.split_marks) == {"<|turn|>", "<|over|>"}


def test_probes_of_thinking_templates() -> None:
    """Training rows carry an empty thought in the last answer, as Qwen3 writes it."""
    thinking = template_facts(HEAD + THOUGHT + BODY + ASKING + SWITCH)
    assert thinking.thinking_modes == ("default", "enable_thinking=true", "enable_thinking=false")
    assert thinking.rewrites_earlier_turns
    opened = (
        "{{- '<think>\\n' if enable_thinking is not defined or enable_thinking else '<think>\\n\\n</think>\\n\\n' -}}"
    )
    always = template_facts(HEAD + THOUGHT.replace(" and loop.last", "") + BODY + ASKING + opened + "{%- endif -%}")
    assert always.thinking_modes == ("default", "enable_thinking=true", "enable_thinking=false")
    without = template_facts(HEAD + BODY + ASKING + opened + "{%- endif -%}")
    assert (without.thinking_modes, without.knows_thinking) == ((), True)
    assert without.prompt_differs


def test_a_family_over_a_chat_model_of_another_family() -> None:
    tokenizer = replace(tokenizer_called("byte_level"), chat_template=CHATML)
    assert read_template_facts(find_template("mistral", tokenizer), tokenizer).foreign_marks == (
        "<s>",
        "[INST]",
        "[/INST]",
        "</s>",
    )
    assert read_template_facts(find_template("chatml", tokenizer), tokenizer).foreign_marks == ()


@pytest.mark.parametrize("family", TEMPLATES)
def test_no_family_of_ours_is_broken(family: str) -> None:
    tokenizer = tokenizer_called("sentencepiece_like")
    found = read_template_facts(find_template(family, tokenizer), tokenizer)
    assert (found.prompt_differs, found.doubled_end, found.rewrites_earlier_turns) == ("", "", False)
    assert "user/assistant" not in found.refusals


def test_eos_at_the_very_end_and_cut_thoughts_are_no_faults() -> None:
    """Phi-3 closes a conversation with EOS; many templates cut the thoughts of earlier answers."""
    closed = template_facts(CHATML.replace("{%- endif -%}", "{%- else -%}{{- eos_token -}}{%- endif -%}"))
    assert (closed.doubled_end, closed.rewrites_earlier_turns) == ("", False)
    cut = "{{- (message.content if loop.last else message.content.split('</think>')[-1]) + '<|im_end|>\\n' -}}"
    assert not template_facts(HEAD + cut + TAIL).rewrites_earlier_turns


TRUE_FINDINGS = {
    # Written with line breaks that are to be taken out before use: their prompts end in one newline too many.
    "chatml.jinja": "prompt-marker-tokenises-by-context",
    "llama-3-instruct.jinja": "prompt-marker-tokenises-by-context",
    "phi-3-small.jinja": "prompt-marker-tokenises-by-context",
    "phi-3.jinja": "prompt-marker-tokenises-by-context",
    "saiga.jinja": "prompt-marker-tokenises-by-context",
    # Their prompts open a thought that rows without thoughts do not have.
    "llama-cpp-deepseek-r1.jinja": "thinking-template-mismatch",
    "nemotron_3_nano.jinja": "thinking-template-mismatch",
    "nemotron_3_nano_training.jinja": "thinking-template-mismatch",
    "nemotron_3_super.jinja": "thinking-template-mismatch",
    "nemotron_3_ultra.jinja": "thinking-template-mismatch",
    "nemotron_3_ultra_training.jinja": "thinking-template-mismatch",
}


def test_the_chat_templates_of_real_models_give_true_findings_only(shared: Callable[..., Path]) -> None:
    plain, num_sound = tokenizer_called("byte_level"), 0
    for path in sorted(shared("data").glob("*/**/*.jinja")):
        source = path.read_text(encoding="utf-8")
        backend = plain.backend.from_str(plain.spec)
        marks = {*MARK.findall(source), *re.findall(r"</?[a-z_]+>", source)}
        backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in sorted(marks)])
        tokenizer = replace(plain, spec=backend.to_str(), chat_template=source)
        try:
            found = findings(facts_with(tokenizer, find_template("tokenizer", tokenizer)))
        except UserError:
            continue  # no end to learn, or functions that only its own program has: refused by name
        assert list(found) == [one for one in (TRUE_FINDINGS.get(path.name),) if one], path.name
        num_sound += not found
    assert num_sound >= 25
