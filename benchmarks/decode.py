"""Decode speed of the LLaMA-7B shape with random weights on one GPU: ours beside transformers' generate.

    python -m benchmarks.decode                      # every case, each in a process of its own
    python -m benchmarks.decode --only "ours bf16"   # cases whose name contains this
    python -m benchmarks.decode --case "ours bf16 64"

128 prompt tokens, 128 new ones, greedy. `decode_tokens_per_second` counts what comes after the first token of every
answer; `tokens_per_second` all new tokens over the whole time, prompts included. `preparing_seconds` is the first short
run: kernels compiled, graphs captured. Results are written after every case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.records import RESULTS, Record, merge, version_of, with_surroundings

FILE = RESULTS / "decode.json"
PROMPT_TOKENS, NEW_TOKENS = 128, 128
SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
CASES = (
    "ours bf16 1", "ours bf16 64", "ours bf16 256", "ours int8 1", "ours lora 64", "ours lora 1", "static bf16 1",
    "ours nf4 1", "static bf16 64", "dynamic bf16 1", "dynamic bf16 64", "ours int8 64", "ours nf4 64", "ours lora 256",
    "ours sampled 64",
)  # fmt: skip
SECONDS_PER_CASE = 240


def packed(model: Any, kind: str) -> Any:
    """The model with every linear layer but the head packed as training packs it; quantised where it lies."""
    from zhibei.model.quantized import QuantisedLinear

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        weight = module.weight.data
        shape, how = tuple(weight.shape), "int8"
        if kind == "int8":
            largest = weight.float().abs().amax(dim=1)
            parts = [(weight.float() / largest[:, None] * 127).round().to(torch.int8), largest]
        else:
            from bitsandbytes.functional import quantize_4bit

            codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            second: Any = state.state2
            parts = [codes, state.absmax, second.absmax, second.code, state.offset]
            how = f"nf4 {state.blocksize}"
        layer = QuantisedLinear(parts, how=how, shape=shape, dtype=weight.dtype)
        layer.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.eval())
    return model


def model_of(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).eval()
    if kind in ("int8", "nf4"):
        model = packed(model, kind)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    torch.cuda.empty_cache()
    return model


def prompts_of(batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPE["vocab_size"], (batch, PROMPT_TOKENS), generator=generator).tolist()


def ours(model: Any, batch: int, *, temperature: float = 0.0) -> dict[str, float]:
    from zhibei.generate.engine import Engine, Request
    from zhibei.generate.options import SamplingOptions

    engine = Engine(model, slots=batch, cache_tokens=PROMPT_TOKENS + NEW_TOKENS)

    def run(new_tokens: int) -> tuple[float, float, int]:
        options = SamplingOptions(max_new_tokens=new_tokens, temperature=temperature)
        for number, prompt in enumerate(prompts_of(batch)):
            engine.submit(Request(prompt, options, (), number=number, pieces=False))
        torch.cuda.synchronize()
        begun = time.perf_counter()
        while engine.num_waiting:
            engine.step()
        torch.cuda.synchronize()
        read = time.perf_counter()
        left = sum(one.growing.budget - one.num_launched for one in engine._active)
        while engine.num_active:
            engine.step()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, time.perf_counter() - read, left

    begun = time.perf_counter()
    run(4)
    preparing = time.perf_counter() - begun
    runs = [run(NEW_TOKENS) for _ in range(3)]
    assert engine.road == "fast"
    whole, decode, left = sorted(runs)[1]
    return {
        "decode_tokens_per_second": left / decode,
        "tokens_per_second": batch * NEW_TOKENS / whole,
        "fastest_decode": max(one[2] / one[1] for one in runs),
        "preparing_seconds": preparing,
    }


def sampled(model: Any, batch: int) -> dict[str, float]:
    return ours(model, batch, temperature=1.0)


def theirs(model: Any, batch: int, *, cache: str | None = None) -> dict[str, float]:
    ids_BT = torch.tensor(prompts_of(batch), device="cuda")
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache:
        settings |= {"cache_implementation": cache}

    def run(new_tokens: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            **settings,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    preparing = run(NEW_TOKENS)
    runs = sorted(run(NEW_TOKENS) for _ in range(3 if cache else 1))
    first = run(1)
    whole = runs[len(runs) // 2]
    return {
        "decode_tokens_per_second": batch * (NEW_TOKENS - 1) / (whole - first),
        "tokens_per_second": batch * NEW_TOKENS / whole,
        "preparing_seconds": preparing - whole,
    }


def static(model: Any, batch: int) -> dict[str, float]:
    """transformers compiles its step by itself where the cache is static."""
    return theirs(model, batch, cache="static")


METHODS = {"ours": "engine", "static": "generate, static cache, compiled", "dynamic": "generate, dynamic cache"}
WAYS = {"ours": ours, "static": static, "dynamic": theirs}


def measure(case: str) -> Record:
    """One case in this process."""
    way, kind, batch = case.split()
    model = model_of("bf16" if kind == "sampled" else kind)
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        figures = (sampled if kind == "sampled" else WAYS[way])(model, int(batch))
    figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    figures["weights_gib"] = weights / 2**30
    who = "zhibei" if way == "ours" else "transformers"
    record = {
        "benchmark": "decode",
        "who": who,
        "version": version_of(who),
        "method": METHODS[way],
        "settings": {
            "case": case,
            "model": "LLaMA-7B shape",
            "weights": "bf16" if kind == "sampled" else kind,
            "choice": "temperature 1" if kind == "sampled" else "greedy",
            "batch": int(batch),
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
        },
        **{name: round(value, 3) for name, value in figures.items()},
    }
    return with_surroundings(record, f"python -m benchmarks.decode --case '{case}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.case:
        merge(FILE, [measure(arguments.case)])
        return
    for case in CASES:
        if arguments.only in case:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.decode", "--case", case], timeout=SECONDS_PER_CASE, check=False
                )
                print(f"{case}: exit code {done.returncode}", flush=True)
            except subprocess.TimeoutExpired:
                print(f"{case}: not done in {SECONDS_PER_CASE} s", flush=True)


if __name__ == "__main__":
    main()
