"""The speaker: which model, which template, what the prompt is, and where answers end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model, tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import Speaker, open_base, open_speaker
from zhibei.text.families import find_template
from zhibei.text.messages import Message

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)
HELLO = [Message("user", "Hello")]


def say(speaker: Speaker, messages=HELLO, options=GREEDY):
    answer = list(speaker.stream(speaker.prompt(messages, options), options))[-1].answer
    assert answer is not None
    return answer


def adapter_folder(tmp_path: Path, base: Path, *, named: str | None = None) -> Path:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(), config)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named or str(base)}))
    return tmp_path / "adapter"


def run_folder(tmp_path: Path, template: object, *, base: str = "") -> Path:
    """What a finished run leaves: model/, manifest.json and resolved.yaml."""
    run = tmp_path / "runs" / "one"
    tiny_model_folder(run, seed=3, name="model")
    (run / "manifest.json").write_text(json.dumps({"format": 1, "template": template}))
    (run / "resolved.yaml").write_text(f"name: one\nmodel:\n  path: {base}\ndata:\n  sources: [rows.json]\n")
    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_model_folder(tmp_path)


def test_the_prompt_is_the_templates_and_the_answer_the_models(folder):
    speaker = open_speaker(str(folder), template="vicuna_v1.1")
    text = find_template("vicuna_v1.1", speaker.tokenizer).render(HELLO, answer_next=True).text
    prompt = speaker.prompt(HELLO, GREEDY)
    assert prompt.tokens == speaker.tokenizer.encode(text)
    assert prompt.tokens.count(speaker.tokenizer.bos_id) == 1
    theirs = tiny_model().generate(torch.tensor([prompt.tokens]), max_new_tokens=12, do_sample=False)[0]  # type: ignore[index]
    assert say(speaker).tokens == theirs[len(prompt.tokens) :].tolist()


def test_without_a_template_the_names_are_listed(folder):
    with pytest.raises(UserError, match="names no template") as error:
        open_speaker(str(folder))
    assert "vicuna_v1.1" in error.value.expected
    assert "--template" in error.value.fix


def test_the_tokenizers_own_chat_template_is_used(folder):
    own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (folder / "chat_template.jinja").write_text(own)
    speaker = open_speaker(str(folder))
    tokens = speaker.prompt(HELLO, GREEDY).tokens
    assert speaker.tokenizer.decode(tokens) == "<s>[user]Hello</s>[assistant]"
    assert speaker.tokenizer.eos_id in speaker.stop_ids


@pytest.mark.parametrize("template", ["alpaca", {"name": "alpaca"}])
def test_a_run_is_asked_with_the_template_of_its_manifest(tmp_path, template):
    speaker = open_speaker(str(run_folder(tmp_path, template)))
    assert speaker.template.name == "alpaca"
    assert speaker.notes == ()


def test_another_template_than_the_trained_one_is_used_when_asked_for_and_said(tmp_path):
    speaker = open_speaker(str(run_folder(tmp_path, "alpaca")), template="vicuna_v1.1")
    assert speaker.template.name == "vicuna_v1.1"
    assert speaker.notes == ("this model was trained with template alpaca, not vicuna_v1.1",)


def test_a_template_whose_spelling_has_changed_since_is_taken_as_stored(tmp_path):
    stored = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    stored += "{% if add_generation_prompt %}<assistant>{% endif %}"
    speaker = open_speaker(str(run_folder(tmp_path, {"name": "alpaca", "jinja": stored})))
    assert speaker.tokenizer.decode(speaker.prompt(HELLO, GREEDY).tokens) == "<s><user>Hello</s><assistant>"


def test_an_adapter_speaks_on_its_base_and_the_base_beside_it(tmp_path, folder):
    speaker = open_speaker(str(adapter_folder(tmp_path, folder)), template="alpaca")
    base = open_base(speaker)
    plain = open_speaker(str(folder), template="alpaca")
    assert say(base).tokens == say(plain).tokens
    assert say(speaker).tokens != say(plain).tokens
    assert say(base).tokens == say(plain).tokens, "adapters are off again when asked again"


def test_a_missing_base_is_named_with_the_remedy_and_base_repairs_it(tmp_path, folder):
    adapter = adapter_folder(tmp_path, folder, named="/gone/llama")
    with pytest.raises(UserError, match="/gone/llama") as error:
        open_speaker(str(adapter), template="alpaca")
    assert "--base" in error.value.fix
    assert say(open_speaker(str(adapter), template="alpaca", base=str(folder))).tokens


def test_the_base_of_a_fully_trained_run_is_found_in_its_run_file(tmp_path, folder):
    speaker = open_speaker(str(run_folder(tmp_path, "alpaca", base=str(folder))))
    base = open_base(speaker)
    assert base.name == str(folder)
    assert say(base).tokens == say(open_speaker(str(folder), template="alpaca")).tokens


@pytest.mark.parametrize("kind", ["path", "adapter"])
def test_the_base_is_taken_from_the_manifest_first(tmp_path, folder, kind):
    run = run_folder(tmp_path, "alpaca", base="/not/this/one")
    entry = {"path": str(folder), "adapter": str(adapter_folder(tmp_path, folder)) if kind == "adapter" else None}
    (run / "manifest.json").write_text(json.dumps({"format": 1, "template": "alpaca", "base": entry}))
    base = open_base(open_speaker(str(run)))
    assert base.name == entry[kind]
    assert base.has_adapters == (kind == "adapter")


def test_the_base_of_a_plain_folder_is_not_known(folder):
    with pytest.raises(UserError, match="not known which base"):
        open_base(open_speaker(str(folder), template="alpaca"))


def test_answers_end_at_the_templates_stop_string(folder, monkeypatch):
    speaker = open_speaker(str(folder), template="alpaca")
    free = say(speaker, options=SamplingOptions(max_new_tokens=40, temperature=0))
    assert free.text
    stop = next(sign for sign in free.text[3:] if sign.isascii() and sign.isalpha())
    cut = say(speaker, options=SamplingOptions(max_new_tokens=40, temperature=0, stop_strings=(stop,)))
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish == "stop"
    assert "### Instruction:" in speaker._fitting(GREEDY).stop_strings


def test_answers_end_at_the_ids_of_generation_config(folder):
    speaker = open_speaker(str(folder), template="alpaca")
    token = say(speaker).tokens[2]
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, token]}))
    answer = say(open_speaker(str(folder), template="alpaca"))
    assert (answer.tokens[-1], answer.finish) == (token, "stop")


class TestHistoryBeyondTheContext:
    """256 tokens of context, of which the answer keeps at least a quarter, or max_new_tokens if that is less."""

    turns = [Message(role, f"{role} {number} " + "x" * 20) for number in range(6) for role in ("user", "assistant")]

    def test_oldest_turns_are_left_out_but_never_the_system_prompt(self, folder):
        speaker = open_speaker(str(folder), template="vicuna_v1.1")
        messages = [Message("system", "Short."), *self.turns, *HELLO]
        prompt = speaker.prompt(messages, GREEDY)
        assert prompt.num_dropped > 0
        assert prompt.num_dropped % 2 == 0
        assert f"oldest {prompt.num_dropped} messages" in prompt.notice
        kept = [messages[0], *messages[1 + prompt.num_dropped :]]
        assert prompt.tokens == speaker._encode(kept)
        assert len(prompt.tokens) <= 256 - 12
        one_more = [messages[0], *messages[prompt.num_dropped - 1 :]]
        assert len(speaker._encode(one_more)) > 256 - 12, "no more is left out than must be"

    def test_nothing_is_left_out_while_it_fits(self, folder):
        prompt = open_speaker(str(folder), template="vicuna_v1.1").prompt(HELLO, GREEDY)
        assert (prompt.num_dropped, prompt.notice) == (0, "")

    def test_a_long_answer_leaves_room_for_the_history_and_says_when_it_was_cut(self, folder):
        speaker = open_speaker(str(folder), template="vicuna_v1.1")
        options = SamplingOptions(max_new_tokens=256, temperature=0)
        prompt = speaker.prompt(HELLO, options)
        answer = list(speaker.stream(prompt, options))[-1].answer
        assert answer is not None
        assert len(prompt.tokens) + len(answer.tokens) <= 256
        assert "context of 256" in answer.notice

    def test_a_message_that_fits_in_no_way_is_an_error(self, folder):
        with pytest.raises(UserError, match="message is too long") as error:
            open_speaker(str(folder), template="vicuna_v1.1").prompt([Message("user", "word " * 300)], GREEDY)
        assert "256" in error.value.expected


def test_answers_to_several_prompts_are_those_given_alone(folder):
    speaker = open_speaker(str(folder), template="alpaca")
    prompts = [
        speaker.prompt([Message("user", text)], GREEDY) for text in ("Hi", "What is the capital?", "Add 1 and 2")
    ]
    together = speaker.answer(prompts, GREEDY)
    alone = [speaker.answer([prompt], GREEDY)[0] for prompt in prompts]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
