"""Answers written by vLLM, whose weights are brought up to the policy's before each writing. Knows no loop.

vLLM keeps weights of its own: a second copy beside the policy's. They are replaced tensor by tensor, an adapter's
product added to each matrix on the way, so that no third copy exists. Its draws are its own, and its log-probabilities
differ from the trainer's by more than rounding: `importance_clip` corrects for it, and the health board shows the gap.

This was written against the public interface of vLLM 0.8 and later (`LLM`, `SamplingParams`, `LLM.apply_model`,
`LLM.reset_prefix_cache`) and is tested with a small module of the same interface, not with vLLM itself.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.generate.rollouts import Rollout
from zhibei.model.answering import plain_model
from zhibei.model.joined import part_of


@dataclass
class VllmWriter:
    """Writes answers with vLLM in this process. `folder` holds config and tokenizer of the policy's base."""

    folder: str
    precision: str
    max_tokens: int
    """Most tokens of prompt and answer together."""
    memory_share: float
    """Of the GPU's memory that vLLM may take, its weights included."""
    seed: int = 0
    engine: Any = None

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        options: SamplingOptions,
        stop_ids: Sequence[int],
        pad_id: int,
        decode: Callable[[list[int]], str],
        numbers: Sequence[int] | None = None,
    ) -> Rollout:
        """The policy's answers to these prompts; `numbers` as in `write_answers`. Raises UserError where vLLM is
        missing or cannot take the weights."""
        del pad_id
        self.engine = self.engine or self._start()
        send_weights(self.engine, model)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        own = {"stop": list(options.stop_strings) or None, "logprobs": 0, "skip_special_tokens": False}
        ways = [
            sampling_params(options, stop_ids, seed=(options.seed + number) % 2**31, **own)
            for number in numbers or range(len(prompts))
        ]
        outputs = [output.outputs[0] for output in self.engine.generate(asked, ways, use_tqdm=False)]
        tokens = [list(output.token_ids) for output in outputs]
        content = [[token for token in row if token not in stop_ids] for row in tokens]
        return Rollout(
            prompts=[list(prompt) for prompt in prompts],
            answers=tokens,
            logps=[_logps_of(output) for output in outputs],
            finish=[_finish_of(output) for output in outputs],
            texts=[_cut(decode(row), options.stop_strings) for row in content],
        )

    def _start(self) -> Any:
        require_vllm()
        # The weights are handed over as tensors of this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm  # pyright: ignore[reportMissingImports]

        return vllm.LLM(
            model=self.folder,
            dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.precision],
            max_model_len=self.max_tokens,
            gpu_memory_utilization=self.memory_share,
            # Log-probabilities of the distribution that is drawn from, temperature and filters included.
            logprobs_mode="processed_logprobs",
            seed=self.seed,
        )


def require_vllm() -> None:
    """Raises UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine: vllm asks for vLLM, which is not installed",
            expected="vLLM 0.8 or later",
            fix="pip install vllm (it brings its own torch), or set engine: ours",
            where="engine",
        )


def send_weights(engine: Any, model: Any) -> None:
    """Replace vLLM's weights by the policy's. Raises UserError for layers whose weights cannot be named to it."""
    weights = list(named_weights(model, only_check=True))
    del weights

    def load(held: Any) -> None:
        held.load_weights(named_weights(model))

    engine.apply_model(load)
    # Keys and values of prompts read with the old weights.
    engine.reset_prefix_cache()


def named_weights(model: Any, *, only_check: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name as transformers saves it, tensor) one after the other; a matrix with an adapter is that of both together.

    The sum is made in fp32 and rounded once. Raises UserError for layers that are more than a matrix and an adapter.
    """
    inner = plain_model(model)
    for name, module in inner.named_modules():
        if hasattr(module, "base_layer"):
            part = part_of(module)
            if part is None:
                raise UserError(
                    f"{name}: vLLM can be given plain matrices and LoRA only, this layer is more than that",
                    expected="an adapter without DoRA, biases or other variants, not merged",
                    fix="set engine: ours, or use plain LoRA",
                    where="engine",
                )
            if only_check:
                continue
            weight = part.layer.weight.detach()
            if part.adapter is not None:
                added = part.adapter.up.detach().float() @ part.adapter.down.detach().float()
                weight = (weight.float() + part.adapter.factor * added).to(weight.dtype)
            yield f"{name}.weight", weight
            if part.bias is not None:
                yield f"{name}.bias", part.bias.detach()
        elif not only_check and ".base_layer" not in name and ".lora_" not in name:
            own = [*module.named_parameters(recurse=False)]
            if type(module).__name__ == "QuantisedLinear":
                own = [("weight", module.weight), *own]
            for last, tensor in own:
                yield f"{name}.{last}".lstrip("."), tensor.detach()


def sampling_params(options: SamplingOptions, stop_ids: Sequence[int], *, seed: int, **more: Any) -> Any:
    """What vLLM calls these options; `more` are settings of its own."""
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm.SamplingParams(
        max_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or -1,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=seed,
        stop_token_ids=list(stop_ids),
        **more,
    )


def _logps_of(output: Any) -> list[float]:
    return [float(place[token].logprob) for token, place in zip(output.token_ids, output.logprobs, strict=True)]


def _finish_of(output: Any) -> Literal["stop", "length"]:
    return "length" if output.finish_reason == "length" else "stop"


def _cut(text: str, stop_strings: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else text
