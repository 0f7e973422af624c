"""Answers by vLLM, in this process: an engine for each adapter, all on one engine of vLLM's. Knows no HTTP.

Written against the public interface of vLLM 0.8 and later (`EngineArgs`, `LLMEngine`, `SamplingParams`, `LoRARequest`)
and tested with a small module of the same interface, not with vLLM itself. Its draws are its own: the same seed gives
other answers than zhibei's engine.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.data.encode import with_system
from zhibei.generate.answers import Growing, Piece, Token
from zhibei.generate.engine import begun
from zhibei.generate.options import SamplingOptions
from zhibei.generate.vllm_engine import sampling_params
from zhibei.serve.chat import Prompt, Wording, fitting_prompt
from zhibei.text.messages import Message

INSTALL = "pip install vllm"
# vLLM takes these and no others.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class VllmSpeaker:
    """What a model is asked with; its weights are vLLM's."""

    name: str
    wording: Wording
    context_tokens: int | None
    stop_ids: tuple[int, ...]

    @property
    def tokenizer(self) -> Any:
        return self.wording.tokenizer

    @property
    def template(self) -> Any:
        return self.wording.template

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt these messages give."""
        return len(self._encode(messages))

    def prompt(self, messages: Sequence[Message], options: SamplingOptions) -> Prompt:
        """As `Speaker.prompt`."""
        return fitting_prompt(messages, self._encode, context=self.context_tokens, most_new=options.max_new_tokens)

    def decode(self, tokens: list[int]) -> str:
        """The words, without control tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        asked = with_system(messages, self.wording.system)
        return self.tokenizer.encode(self.template.render(asked, answer_next=True).text)


def speaker_of(name: str, wording: Wording) -> VllmSpeaker:
    """The speaker of a model whose folder is read and whose weights are not. Raises UserError for a hub id."""
    folder = Path(wording.found.weights)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--engine vllm with {wording.found.weights}",
            expected="a folder on this machine",
            fix="download the model first, or leave out --engine vllm",
            where="--engine",
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    beside = folder / "generation_config.json"
    own = json.loads(beside.read_text(encoding="utf-8")).get("eos_token_id") if beside.is_file() else None
    named = own if isinstance(own, list) else [] if own is None else [own]
    ends = wording.tokenizer.stop_ids(wording.template.terminator)
    context = config.get("max_position_embeddings")
    return VllmSpeaker(name, wording, context, tuple(dict.fromkeys((*ends, *named))))


def start_vllm(
    weights: str, adapters: Sequence[Path], *, precision: str, context_tokens: int | None, slots: int
) -> Shared:
    """vLLM on these weights, ready for these adapters, whatever their rank. Raises UserError where it is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "--engine vllm, but vLLM is not installed",
            expected="vLLM 0.8 or later",
            fix=f"{INSTALL} (it brings its own torch), or leave out --engine",
            where="--engine",
        )
    import vllm  # pyright: ignore[reportMissingImports]

    named = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    arguments = {"model": weights, "dtype": named, "max_model_len": context_tokens, "max_num_seqs": slots}
    if adapters:
        arguments |= {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank_for(adapters)}
    return Shared(vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments)))


def rank_for(adapters: Sequence[Path]) -> int:
    """The smallest rank that vLLM can be set to and that holds all adapters. Raises UserError beyond its largest."""
    ranks = []
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        ranks.append(max([config["r"], *(config.get("rank_pattern") or {}).values()]))
    if max(ranks) > _RANKS[-1]:
        raise UserError(
            f"an adapter of rank {max(ranks)}",
            expected=f"at most {_RANKS[-1]}, which is as far as vLLM goes",
            fix="merge it (zhibei merge), or leave out --engine vllm",
            where="--engine",
            pitfall="vllm-lora-rank-limit",
        )
    return next(rank for rank in _RANKS if rank >= max(ranks))


@dataclass
class Shared:
    """One engine of vLLM's and what it has said to each of those who share it."""

    engine: Any
    num_requests: int = 0
    heard: dict[str, list[Any]] = field(default_factory=dict)

    def hear(self, mine: Sequence[str]) -> list[Any]:
        """Outputs for these requests; a step is made where nothing is waiting for them."""
        if not any(self.heard.get(id) for id in mine):
            for output in self.engine.step():
                self.heard.setdefault(output.request_id, []).append(output)
        return [output for id in mine for output in self.heard.pop(id, [])]


@dataclass
class _Open:
    request: Any
    growing: Growing
    num_read: int = 0


class VllmEngine:
    """`zhibei.generate.engine.Engine`'s methods for one adapter (or none) of a shared vLLM."""

    def __init__(
        self, shared: Shared, *, context_tokens: int | None, adapter: Path | None = None, number: int = 0
    ) -> None:
        self._shared, self._context, self._adapter, self._number = shared, context_tokens, adapter, number
        self._open: dict[int, _Open] = {}

    @property
    def num_active(self) -> int:
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """vLLM keeps its own queue and does not say."""
        return 0

    def submit(self, request: Any) -> int:
        """Queue a request; its id. Raises UserError for what vLLM is not asked for here."""
        if request.mask is not None:
            raise UserError(
                "a mask was asked of vLLM",
                expected="an answer without response_format",
                fix="serve without --engine vllm",
                where="mask",
            )
        growing = begun(request, self._context, shows_text=True)
        self._shared.num_requests += 1
        id = self._shared.num_requests
        self._shared.engine.add_request(
            str(id),
            {"prompt_token_ids": list(growing.prompt)},
            _parameters(request, growing.budget),
            lora_request=self._lora(),
        )
        self._open[id] = _Open(request, growing)
        return id

    def step(self) -> list[tuple[int, Piece]]:
        """What came since the last step; the last piece of a request carries its Answer."""
        pieces: list[tuple[int, Piece]] = []
        for output in self._shared.hear([str(id) for id in self._open]):
            id = int(output.request_id)
            if id in self._open:
                pieces += self._take(id, output.outputs[0])
        return pieces

    def cancel(self, id: int) -> None:
        """Give up a request; unknown ids are ignored."""
        if self._open.pop(id, None) is not None:
            self._shared.engine.abort_request([str(id)])
            self._shared.heard.pop(str(id), None)

    def _take(self, id: int, output: Any) -> list[tuple[int, Piece]]:
        one = self._open[id]
        text = ""
        for place in range(one.num_read, len(output.token_ids)):
            text += one.growing.take(_token(output, place, one.request.top_logprobs), frozenset(one.request.stop_ids))
            if one.growing.ended:
                answer = one.growing.answer()
                self.cancel(id)  # a stop string ends it here, and vLLM has not heard of that
                return [(id, Piece(text, answer))]
        one.num_read = len(output.token_ids)
        return [(id, Piece(text))] if text else []

    def _lora(self) -> Any:
        if self._adapter is None:
            return None
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        return LoRARequest(self._adapter.name, self._number, str(self._adapter))


def _token(output: Any, place: int, num_top: int) -> Token:
    row = output.logprobs[place]
    id = int(output.token_ids[place])
    likeliest = sorted(((int(token), float(one.logprob)) for token, one in row.items()), key=lambda pair: -pair[1])
    return Token(id, float(row[id].logprob), float(row[id].logprob), likeliest[:num_top] if num_top else None)


def _parameters(request: Any, num_new: int) -> Any:
    return sampling_params(
        replace(request.options, max_new_tokens=num_new),
        request.stop_ids,
        # A choice of one request draws otherwise than its neighbours.
        seed=(request.options.seed + request.number * 0x9E3779B1) % 2**63,
        ignore_eos=True,  # the ends are those above, as in training
        logprobs=request.top_logprobs,
        detokenize=False,
    )
