"""Model folders in which one file is wrong, missing or somebody else's. Knows only what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.config_cases import manifest_says
from tests.bad_inputs.place import Place, chat_rows
from tests.bad_inputs.scenario import Scenario


def change_json(path: Path, **changes: Any) -> None:
    """Fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def config(**changes: Any) -> Callable[[Place], None]:
    """config.json of the model with other values."""
    return lambda place: change_json(place.model / "config.json", **changes)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Reads the weights of a folder, lets `change` work on them, and writes them again."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], None]:
    return lambda place: change_tensors(place.model, change)


def poison(name: str, value: float) -> Callable[[Place], None]:
    """One number of one tensor becomes NaN or infinite."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[7] = value

    return weights(change)


def truncate(place: Place) -> None:
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def shard(place: Place) -> Path:
    """The weights in two files with an index; returns the second file."""
    from safetensors.torch import load_file, save_file

    folder = place.model
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder / "model-00002-of-00002.safetensors"


def pickles(place: Place) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(place.model / "model.safetensors")
    torch.save(tensors, place.model / "pytorch_model.bin")
    (place.model / "model.safetensors").unlink()


def more_tokens(place: Place, *, count: int = 40) -> None:
    """The tokenizer learns tokens for which the model has no embedding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    tokenizer.add_tokens([f"<new{number}>" for number in range(count)])
    tokenizer.save_pretrained(place.model)


def without_eos(place: Place) -> None:
    """Neither the tokenizer nor the model names an end-of-text token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = place.model / name
        if path.is_file():
            change_json(path, eos_token=None)
    change_json(place.model / "config.json", eos_token_id=None)
    (place.model / "generation_config.json").unlink(missing_ok=True)


def _no_template(place: Place) -> None:
    place.rows = chat_rows()
    place.set("data.template", None)


def _weights_of_other_model(place: Place) -> None:
    shutil.copy(place.models("qwen2") / "model.safetensors", place.model / "model.safetensors")


def _remote_code(place: Place) -> None:
    change_json(
        place.model / "config.json",
        model_type="tinyown",
        architectures=["TinyOwnForCausalLM"],
        auto_map={"AutoConfig": "own.TinyOwnConfig", "AutoModelForCausalLM": "own.TinyOwnForCausalLM"},
    )
    (place.model / "own.py").write_text("raise SystemExit('code of a stranger was run')\n", encoding="utf-8")


NAN, INFINITE = float("nan"), float("inf")
FOLDER = r"\bmodel\b"

MODEL_CASES = [
    Scenario(
        "m1_missing_folder",
        "A model folder that is not there.",
        lambda place: [place.model, place.set("model.path", "./modle")],
        value="modle",
        where=r"model\.path",
        remedy=r"did you mean \S*model",
    ),
    Scenario(
        "m2_truncated",
        "Weights whose file ends too early.",
        truncate,
        value="truncated|ends|incomplete|bytes|too short",
        where=r"model\.safetensors",
        remedy="to do:.*(copy|download)",
    ),
    Scenario(
        "m3_missing_shard",
        "One of two weight files is not there.",
        lambda place: shard(place).unlink(),
        value="missing|not there|no such",
        where=r"model-00002-of-00002\.safetensors",
        remedy="to do:.*(copy|download)",
    ),
    Scenario(
        "m4_wrong_shapes",
        "config.json describes another size than the weights have.",
        config(hidden_size=48),
        value=r"\b48\b",
        where=(r"config\.json", r"\w+\.weight"),
        remedy="to do:.*",
    ),
    Scenario(
        "m5_pickle",
        "Weights in a pickle, which can run any code when opened.",
        pickles,
        value=r"pytorch_model\.bin",
        where=FOLDER,
        remedy="safetensors",
    ),
    Scenario(
        "m6_nan_weights",
        "One NaN in the base model.",
        poison("model.layers.1.mlp.up_proj.weight", NAN),
        value="nan",
        where=(r"model\.layers\.1\.mlp\.up_proj\.weight", FOLDER),
        remedy="to do:.*",
    ),
    Scenario(
        "m7_weights_of_other_model",
        "The weights of another family beside this config.json.",
        _weights_of_other_model,
        value=r"bias|lm_head|tensors?",
        where=(r"config\.json|model\.safetensors", r"\w+\.\w+"),
        remedy="belong together|to do:.*",
    ),
    Scenario(
        "m8_pad_beyond_vocabulary",
        "The padding id is beyond the vocabulary.",
        config(pad_token_id=32000),
        value=r"\b32000\b",
        where=(r"config\.json", "pad_token_id"),
        remedy="to do:.*pad",
    ),
    Scenario(
        "m9_tokenizer_larger",
        "A tokenizer of 340 tokens for 300 embeddings.",
        more_tokens,
        value=(r"\b3(39|40)\b", r"\b300\b"),
        where=r"model|tokenizer",
        remedy="to do:.*",
    ),
    Scenario(
        "m10_no_eos",
        "A tokenizer without an end-of-text token: no answer would learn to stop.",
        without_eos,
        value="eos|end-of-text|end of text|terminator",
        where=r"tokenizer|model",
        remedy="to do:.*(eos|template|</s>)",
    ),
    Scenario(
        "m11_no_chat_template",
        "Conversations for a model that has no chat template, and none is named.",
        _no_template,
        value=("chat template", "alpaca"),
        where=r"data\.template",
        remedy="vicuna",
        may=("stopped", "handled"),
        proof=lambda place: manifest_says(place, "supervise", "answers"),
    ),
    Scenario(
        "m12_remote_code",
        "A model that brings its own code.",
        _remote_code,
        value=r"own\.py|TinyOwn|auto_map|code",
        where=r"model",
        remedy="trust_remote_code",
    ),
]
