"""Merging: the logits of base and adapter, PEFT's own merge, exact mixtures, little memory, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.making import adapter_folder, load, logits_of, tiny_model_folder, with_adapter
from zhibei.config.errors import UserError
from zhibei.export.merge import merge_weights
from zhibei.export.sources import find_merge, weighted_path
from zhibei.store.shards import read_tensors

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.down_proj": 32}},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding lora": {"target_modules": ["embed_tokens", "v_proj"]},
}


def merged(paths: list[str], out: Path, **options: Any) -> Path:
    out.mkdir()
    merge_weights(find_merge(paths), out, **options)
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_model_folder(folder, name) for name in ("llama", "qwen2", "gemma", "phi3")}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_and_adapter_and_what_peft_merges(kind, bases, tmp_path):
    base = bases["llama"]
    adapter = adapter_folder(base, tmp_path / "adapter", **KINDS[kind])
    out = merged([str(adapter)], tmp_path / "merged")
    beside = with_adapter(base, adapter)
    expected = logits_of(beside)
    assert (expected - logits_of(load(base))).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(logits_of(load(out)), expected, atol=1e-5, rtol=1e-5)
    theirs, ours = beside.merge_and_unload().state_dict(), read_tensors(out)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma", "phi3"])
def test_tied_and_fused_families(family, bases, tmp_path):
    base = bases[family]
    adapter = adapter_folder(base, tmp_path / "adapter")
    out = merged([str(adapter)], tmp_path / "merged")
    torch.testing.assert_close(logits_of(load(out)), logits_of(with_adapter(base, adapter)), atol=1e-5, rtol=1e-5)
    assert set(read_tensors(out)) == set(read_tensors(base)), "what was tied stays tied"


@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_tensor_becomes_two_when_the_adapter_has_one_of_them(target, bases, tmp_path):
    base = bases["gemma"]
    adapter = adapter_folder(base, tmp_path / "adapter", target_modules=[target, "q_proj"])
    out = merged([str(adapter)], tmp_path / "merged")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    expected = logits_of(with_adapter(base, adapter))
    assert (expected - logits_of(load(base))).abs().max() > 0.01
    torch.testing.assert_close(logits_of(load(out)), expected, atol=1e-4, rtol=1e-4)


def test_new_tokens_make_the_merged_model_longer(bases, tmp_path):
    import peft

    for family in ("llama", "qwen2"):
        base, adapter = bases[family], tmp_path / f"{family}-adapter"
        model = load(base)
        model.resize_token_embeddings(303)
        torch.manual_seed(0)
        saved = ["embed_tokens", "lm_head"] if family == "llama" else None
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False)
        )
        expected = logits_of(wrapped.eval())
        wrapped.save_pretrained(str(adapter), save_embedding_layers=True)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        out = merged([str(adapter)], tmp_path / f"{family}-merged")
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 303
        torch.testing.assert_close(logits_of(load(out)), expected, atol=1e-5, rtol=1e-5)


def test_a_mixture_is_the_weighted_sum_of_the_products(bases, tmp_path):
    base = bases["llama"]
    first = adapter_folder(base, tmp_path / "a", seed=1, r=2, lora_alpha=8)
    second = adapter_folder(base, tmp_path / "b", seed=2, r=8, use_rslora=True)
    out = merged([f"{first}:0.7", f"{second}:-0.3"], tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj"
    expected = read_tensors(base)[f"{name}.weight"].double()
    for folder, weight, scale in ((first, 0.7, 8 / 2), (second, -0.3, 6 / 8**0.5)):
        values = load_file(folder / "adapter_model.safetensors")
        a, b = (values[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        expected += weight * scale * b @ a
    torch.testing.assert_close(read_tensors(out)[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_cannot_be_added_up_is_refused_in_a_mixture(settings, bases, tmp_path):
    adapter = adapter_folder(bases["llama"], tmp_path / "a", **settings)
    other = adapter_folder(bases["llama"], tmp_path / "b", **settings)
    for paths in ([str(adapter), str(other)], [f"{adapter}:0.5"]):
        with pytest.raises(UserError, match="weight"):
            merged(paths, tmp_path / f"merged-{len(paths)}")


def test_rounded_once_and_not_beyond_what_the_type_holds(bases, tmp_path):
    base = bases["llama"]
    adapter = adapter_folder(base, tmp_path / "adapter")
    exact = read_tensors(merged([str(adapter)], tmp_path / "exact"))
    half = read_tensors(merged([str(adapter)], tmp_path / "half", dtype="bf16"))
    for name in exact:
        assert torch.equal(half[name], exact[name].to(torch.bfloat16)), "one rounding of the fp32 result"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    huge = adapter_folder(base, tmp_path / "huge", size=1e3, lora_alpha=1000)
    with pytest.raises(UserError, match="NaN or infinite"):
        merged([str(huge)], tmp_path / "overflown", dtype="fp16")
    with pytest.raises(UserError, match="no type int4"):
        merged([str(adapter)], tmp_path / "int4", dtype="int4")


def test_refusals(bases, tmp_path):
    base = bases["llama"]
    adapter = adapter_folder(base, tmp_path / "adapter")
    with pytest.raises(UserError, match="nothing to merge"):
        find_merge([str(base)])
    with pytest.raises(UserError, match="different bases"):
        find_merge([str(adapter), str(adapter_folder(bases["qwen2"], tmp_path / "other"))])
    elsewhere = find_merge([str(adapter)], base=str(bases["phi3"]))
    with pytest.raises(UserError, match="does not have"):
        merge_weights(elsewhere, tmp_path / "on another")
    with pytest.raises(UserError, match="weight 0"):
        find_merge([f"{adapter}:0"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"trainable_token_indices": [1]}, "single rows"),
        ({"task_type": "SEQ_CLS"}, "reward model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            find_merge([str(adapter)])


def test_a_quantised_base_is_refused(bases, tmp_path):
    base = tiny_model_folder(tmp_path, "llama", name="base")
    adapter = adapter_folder(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="stored quantised"):
        merged([str(adapter)], tmp_path / "merged")


def test_a_tensor_of_no_known_kind_is_refused(bases, tmp_path):
    adapter = adapter_folder(bases["llama"], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    values = load_file(file)
    save_file({**values, "base_model.model.model.layers.0.mlp.up_proj.lora_C.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="no known kind"):
        merged([str(adapter)], tmp_path / "merged")
    values.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(values, file)
    with pytest.raises(UserError, match="no B beside it"):
        merged([str(adapter)], tmp_path / "merged2")


def test_a_path_with_a_colon_is_a_path_where_it_exists(tmp_path):
    (tmp_path / "a:2").mkdir()
    assert weighted_path(f"{tmp_path}/a:2") == (f"{tmp_path}/a:2", 1.0)
    assert weighted_path("runs/a:0.25") == ("runs/a", 0.25)
    assert weighted_path("runs/a:b") == ("runs/a:b", 1.0)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from zhibei.export.merge import merge_weights
from zhibei.export.sources import find_merge
source = find_merge([sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = Path(sys.argv[2]); out.mkdir()
merge_weights(source, out, max_shard_bytes=20 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    """A model of 130 MiB with tensors of 4 MiB: merging adds a few such tensors to the process, not the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=512
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base, max_shard_size="40MB")
    adapter = adapter_folder(base, tmp_path / "adapter", r=8)
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    command = [sys.executable, "-c", MEMORY, str(adapter), str(tmp_path / "merged")]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    model_kib = sum(path.stat().st_size for path in base.glob("*.safetensors")) // 1024
    largest_kib = 512 * 2048 * 4 // 1024
    assert model_kib > 120 * 1024
    assert grown_kib < 6 * largest_kib + 16 * 1024 < model_kib / 2, (
        f"{grown_kib:,} KiB for a model of {model_kib:,} KiB"
    )
