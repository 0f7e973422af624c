"""The border to vLLM, with a module of its public interface that answers with our engine. vLLM itself is not run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.generate.rollouts import write_answers
from zhibei.generate.sampler import generate
from zhibei.generate.vllm_engine import VllmWriter, named_weights

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 40, 41], [1, 90], [1, 7, 8, 9]]
GREEDY = SamplingOptions(max_new_tokens=12, temperature=0)


class Record(types.SimpleNamespace):
    """Attributes by name."""


class FakeLlm:
    """vLLM's `LLM` as far as it is used: a model of its own, whose weights change only through `load_weights`."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.model, self.resets = settings, tiny_model(seed=9), 0

    def apply_model(self, function: Any) -> list[Any]:
        return [function(Record(load_weights=self._load))]

    def _load(self, weights: Any) -> set[str]:
        own = dict(self.model.named_parameters())
        given = {}
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            given[name] = tensor
        assert given.keys() == own.keys()
        return set(given)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: Any, ways: Any, *, use_tqdm: bool) -> list[Any]:
        assert use_tqdm is False
        outputs = []
        for prompt, way in zip(prompts, ways, strict=True):
            options = SamplingOptions(max_new_tokens=way.max_tokens, temperature=way.temperature)
            (answer,) = generate(self.model, [prompt["prompt_token_ids"]], options=options, stop_ids=way.stop_token_ids)
            logprobs = [{token: Record(logprob=logp)} for token, logp in zip(answer.tokens, answer.logps, strict=True)]
            outputs.append(
                Record(outputs=[Record(token_ids=answer.tokens, logprobs=logprobs, finish_reason=answer.finish)])
            )
        return outputs


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> VllmWriter:
    fake: Any = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeLlm, lambda **settings: Record(**settings)
    fake.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return VllmWriter(folder="base", precision="fp32", max_tokens=64, memory_share=0.4)


def written(write: Any, model: Any) -> Any:
    return write(model, PROMPTS, options=GREEDY, stop_ids=[2, 9], pad_id=3, decode=TOKENIZER.decode)


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


@pytest.mark.parametrize("make", [tiny_model, adapted])
def test_answers_are_those_of_the_policy_whatever_it_has_become(writer: VllmWriter, make: Any) -> None:
    model = make()
    first, expected = written(writer, model), written(write_answers, model)
    assert (first.answers, first.finish, first.texts) == (expected.answers, expected.finish, expected.texts)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(learning)))
    second = written(writer, model)
    assert second.answers == written(write_answers, model).answers
    assert second.answers != first.answers
    assert writer.engine.resets == 2
    assert writer.engine.settings["logprobs_mode"] == "processed_logprobs"


def test_merged_weights_are_those_of_peft_and_the_policy_keeps_its_own() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sent = {name: tensor.clone() for name, tensor in named_weights(model)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(sent[name], tensor.detach())


def test_layers_that_vllm_cannot_be_given_are_refused_by_name(writer: VllmWriter) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match="q_proj"):
        written(writer, model)


def test_without_vllm_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match="not installed") as caught:
        written(VllmWriter(folder="base", precision="fp32", max_tokens=64, memory_share=0.4), tiny_model())
    assert "engine: ours" in str(caught.value.fix)
