"""What transformers objects to in a generation_config.json, without importing it. Knows rules, no model.

The rules are those of GenerationConfig.validate(strict=True), which `save_pretrained` runs on every changed config
(transformers 5.17 to 5.23); a test compares verdicts with the library's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SAMPLING_ONLY: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0, "top_k": 50,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
BEAMS_ONLY: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
CACHES = ("static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid",
          "offloaded_hybrid_chunked", "dynamic", "offloaded", "quantized", "paged")  # fmt: skip
GENERATE_ARGUMENTS = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "streamer",
    "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip
EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def generation_fault(config: Mapping[str, Any]) -> str:
    """Every objection in one line, the wrong fields with their values; "" when saving would succeed."""
    try:
        return "; ".join(_objections(config))
    except TypeError as error:
        return f"a value has the wrong type: {error}"


def _objections(config: Mapping[str, Any]) -> Iterator[str]:
    does_sample = config.get("do_sample") is True
    beams = config.get("num_beams") or 1
    has_beams = beams != 1
    yield from _single_values(config)
    if not does_sample:
        for name, neutral in SAMPLING_ONLY.items():
            if config.get(name) is not None and config[name] != neutral:
                yield f"{name} is {config[name]!r}, which only sampling uses, and do_sample is not true"
    if not has_beams:
        for name, neutral in BEAMS_ONLY.items():
            if config.get(name) is not None and config[name] != neutral:
                yield f"{name} is {config[name]!r}, which only beam search uses, and num_beams is 1"
    answers = config.get("num_return_sequences") or 1
    if answers > 1 and not has_beams and not config.get("do_sample"):
        yield f"num_return_sequences is {answers}, and greedy search gives one answer"
    elif answers > 1 and has_beams and answers > beams:
        yield f"num_return_sequences is {answers}, more than num_beams {beams}"
    yield from _combinations(config)


def _single_values(config: Mapping[str, Any]) -> Iterator[str]:
    stopping = config.get("early_stopping")
    if stopping not in (None, True, False, "never"):
        yield f"early_stopping is {stopping!r}, neither true, false nor 'never'"
    longest = config.get("max_new_tokens")
    if longest is not None and longest <= 0:
        yield f"max_new_tokens is {longest}"
    pad = config.get("pad_token_id")
    if pad is not None and pad < 0:
        yield f"pad_token_id is {pad}, which is no token"
    weight = config.get("assistant_ensemble_weight")
    if weight is not None and not 0 < weight < 1:
        yield f"assistant_ensemble_weight is {weight}, not between 0 and 1"
    cache = config.get("cache_implementation")
    if cache is not None and cache not in CACHES:
        yield f"cache_implementation is {cache!r}, which is not known"
    for name in GENERATE_ARGUMENTS:
        if name in config:
            yield f"{name} is an argument of generate(), not of the config"


def _combinations(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("use_cache") is False:
        for name in ("cache_implementation", "cache_config"):
            if config.get(name) is not None:
                yield f"{name} is {config[name]!r}, and use_cache is false"
    if config.get("return_dict_in_generate") is not True:
        for name in EXTRA_OUTPUTS:
            if config.get(name) is True:
                yield f"{name} is true, and return_dict_in_generate is not"
    suppressed = set(config.get("suppress_tokens") or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = config.get(name)
        wanted = {forced} if isinstance(forced, int) else set(forced or ())
        if wanted and wanted <= suppressed:
            yield f"{name} is {forced}, and suppress_tokens forbids it"
