"""Is a Hugging Face or PEFT folder whole and of the shapes its config promises? Loads no model, unpickles nothing.

Shapes are decided from config.json for families whose tensor names are known; other families get every other check.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zhibei.store.headers import TensorEntry
from zhibei.store.weights import FileFindings, inspect_json, inspect_weight_files

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma")
TIED_BY_DEFAULT = ("gemma",)
LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


def inspect_model_folder(folder: Path) -> list[FileFindings]:
    """Everything about a complete model: config, weights, shapes, tokenizer files, and what must not be opened."""
    config_file, config = inspect_json(folder / "config.json")
    weights = inspect_weight_files(folder, stem="model")
    files = [config_file, *weights.files]
    if not weights.files:
        config_file.problems.append("no model.safetensors beside it: the folder has no weights that can be read safely")
    elif isinstance(config, dict) and not any(file.problems for file in weights.files):
        config_file.problems += shape_problems(config, weights.entries)
    if isinstance(config, dict):
        files += inspect_tokenizer(folder, vocab_size=_text_config(config).get("vocab_size"))
    return [*files, *other_files(folder, known={file.path.name for file in files}, has_weights=bool(weights.files))]


def inspect_adapter_folder(folder: Path) -> list[FileFindings]:
    """Everything about a PEFT folder: pairs of A and B of the announced rank, and that there is anything in it."""
    config_file, config = inspect_json(folder / "adapter_config.json")
    weights = inspect_weight_files(folder, stem="adapter_model")
    files = [config_file, *weights.files]
    if not weights.files:
        config_file.problems.append("no adapter_model.safetensors beside it: there is no adapter")
    for file in weights.files:
        if file.path.suffix == ".safetensors" and not file.problems and file.num_tensors == 0:
            file.problems.append(f"empty adapter: {file.num_bytes} bytes and no tensor; training saved nothing")
    if isinstance(config, dict) and not any(file.problems for file in weights.files):
        config_file.problems += adapter_problems(config, weights.entries)
        config_file.notes += untrained_notes(weights.entries, [file.path for file in weights.files])
    files += inspect_tokenizer(folder, vocab_size=None, is_required=False)
    return [*files, *other_files(folder, known={file.path.name for file in files}, has_weights=bool(weights.files))]


def other_files(folder: Path, *, known: set[str], has_weights: bool) -> list[FileFindings]:
    """Pickle files are named and never opened; further JSON files must be JSON."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.name in known or not path.is_file():
            continue
        if path.suffix in PICKLE_SUFFIXES:
            findings = FileFindings(path, num_bytes=path.stat().st_size)
            what = "pickle file: not opened, because loading it can run any program"
            if has_weights:
                findings.notes.append(f"{what}; the safetensors files are used instead")
            else:
                findings.problems.append(f"{what}; convert it to safetensors with the tool it came from")
            files.append(findings)
        elif path.suffix == ".json":
            files.append(inspect_json(path)[0])
    return files


def inspect_tokenizer(folder: Path, *, vocab_size: int | None, is_required: bool = True) -> list[FileFindings]:
    """The tokenizer's files; no id of tokenizer.json may lie beyond the embedding."""
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        if not is_required:
            return []
        return [FileFindings(folder / "tokenizer.json", notes=["no tokenizer in this folder: it cannot be used alone"])]
    files = []
    for path in present:
        if path.name != "tokenizer.json":
            files.append(FileFindings(path, num_bytes=path.stat().st_size))
            continue
        findings, content = inspect_json(path)
        highest = _highest_id(content)
        if vocab_size is not None and highest is not None and highest >= vocab_size:
            findings.problems.append(f"has token id {highest:,}, but config.json says vocab_size {vocab_size:,}")
        files.append(findings)
    return files


def _highest_id(content: Any) -> int | None:
    if not isinstance(content, dict):
        return None
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.get("id", 0) for token in content.get("added_tokens") or []]
    return max((number for number in ids if isinstance(number, int)), default=None)


def shape_problems(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Where the tensors are not those that config.json promises: emptied, missing layers or parts, other shapes."""
    problems = [
        f"tensor {name} is empty: shape {list(entry.shape)}" for name, entry in entries.items() if 0 in entry.shape
    ]
    config = _text_config(config)
    family = config.get("model_type")
    if family not in LLAMA_LIKE or "quantization_config" in config:
        return problems
    try:
        expected = _llama_shapes(config)
    except (KeyError, TypeError, ZeroDivisionError):
        return [*problems, "lacks a size that its model_type needs"]
    parts: dict[int, dict[str, TensorEntry]] = defaultdict(dict)
    for name, entry in entries.items():
        match = LAYER_NAME.search(name)
        part = match.group(2) if match else name.rpartition("model.")[2]
        if match:
            parts[int(match.group(1))][part] = entry
        if part in expected and entry.shape != expected[part]:
            problems.append(f"tensor {name} has shape {list(entry.shape)}, config.json says {list(expected[part])}")
    num_layers = config["num_hidden_layers"]
    if sorted(parts) != list(range(num_layers)):
        lost = sorted(set(range(num_layers)) - set(parts))
        extra = sorted(set(parts) - set(range(num_layers)))
        parts_of_it = [f"layers {lost} are missing"] if lost else []
        parts_of_it += [f"layers {extra} are too many"] if extra else []
        problems.append(f"num_hidden_layers is {num_layers}, and of the weights {' and '.join(parts_of_it)}")
    everything = set().union(*parts.values())
    for number, layer in sorted(parts.items()):
        problems += [
            f"layer {number} lacks {part}, which other layers have" for part in sorted(everything - set(layer))
        ]
    ends = {name.rpartition("model.")[2] for name in entries}
    wanted = ["embed_tokens.weight", "norm.weight"]
    if any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        wanted.append("score.weight")
    elif not config.get("tie_word_embeddings", family in TIED_BY_DEFAULT):
        wanted.append("lm_head.weight")
    problems += [f"there is no tensor {name}" for name in wanted if name not in ends]
    return problems


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_size, (config.get("num_key_value_heads") or heads) * head_size
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    return {
        "embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "norm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def adapter_problems(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Half pairs, and ranks that adapter_config.json does not announce."""
    problems = []
    rank = config.get("r")
    ranks = {rank, *(config.get("rank_pattern") or {}).values()}
    for name, entry in entries.items():
        for mine, other, axis in (("lora_A", "lora_B", 0), ("lora_B", "lora_A", 1)):
            if f".{mine}." not in name:
                continue
            if name.replace(f".{mine}.", f".{other}.") not in entries:
                problems.append(f"tensor {name} has no {other} beside it")
            if rank is not None and entry.shape[axis] not in ranks:
                problems.append(f"tensor {name} has rank {entry.shape[axis]}, adapter_config.json says {rank}")
    return problems


def untrained_notes(entries: Mapping[str, TensorEntry], paths: list[Path]) -> list[str]:
    """B matrices begin as zeros: if all of them still are, the adapter changes nothing."""
    names = [name for name in entries if ".lora_B." in name]
    if not names:
        return []
    import torch
    from safetensors import safe_open

    for path in paths:
        if path.suffix != ".safetensors":
            continue
        with safe_open(str(path), framework="pt") as file:
            for name in set(file.keys()) & set(names):
                if bool(torch.count_nonzero(file.get_tensor(name))):
                    return []
    return [f"all {len(names)} lora_B matrices are zero: this adapter changes nothing"]
