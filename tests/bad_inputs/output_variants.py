"""More places where a run cannot write, and machines on which it cannot run. Knows no verdict."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.bad_inputs.config_cases import settings
from tests.bad_inputs.output_cases import full_disk
from tests.bad_inputs.place import Place
from tests.bad_inputs.resume_cases import stopped
from tests.bad_inputs.scenario import Build, Scenario

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32, "kv": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40, "kv": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": 64, "kv": 8},
}


def large_model(size: str, machine: str, changes: dict[str, Any], *, verb: str = "check") -> Build:
    """The files of a LLaMA of real size, whose weights are a hole in the disk; tokenizer and rows stay tiny."""

    def build(place: Place) -> None:
        write_large_model(place, size)
        settings({"device": None, "sft.learning_rate": 2e-5, **changes})(place)
        place.verb = verb
        place.arguments += ["--machine", machine]

    return build


def write_large_model(place: Place, size: str) -> None:
    """config.json and one safetensors file of the right names and shapes, a hole but for the beginning of each tensor.

    The vocabulary is the tiny tokenizer's: 2 % of the parameters less.
    """
    shape = SHAPES[size]
    width, inner, kv = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["hidden_size"] // shape["heads"] * shape["kv"],
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "vocab_size": 300,
        "intermediate_size": inner, "num_hidden_layers": shape["num_hidden_layers"], "torch_dtype": "float16",
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv"], "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }  # fmt: skip
    folder = place.model
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [300, width], "model.norm.weight": [width], "lm_head.weight": [300, width],
    }  # fmt: skip
    for number in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {
            layer + "self_attn.q_proj.weight": [width, width], layer + "self_attn.k_proj.weight": [kv, width],
            layer + "self_attn.v_proj.weight": [kv, width], layer + "self_attn.o_proj.weight": [width, width],
            layer + "mlp.gate_proj.weight": [inner, width], layer + "mlp.up_proj.weight": [inner, width],
            layer + "mlp.down_proj.weight": [width, inner], layer + "input_layernorm.weight": [width],
            layer + "post_attention_layernorm.weight": [width],
        }  # fmt: skip
    header, offset = {}, 0
    for name, sizes in shapes.items():
        count = sizes[0] * (sizes[1] if len(sizes) == 2 else 1) * 2
        header[name] = {"dtype": "F16", "shape": sizes, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + len(text) + start)
            count = (end - start) // 2
            whole = len(shapes[name]) == 1 or shapes[name][0] == 300
            drawn = np.ones(count) if "norm" in name else draw.normal(0, 0.02, count if whole else 4096)
            file.write(drawn.astype(np.float16).tobytes())


def _runs_is_a_file(place: Place) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "runs").write_text("notes of mine", encoding="utf-8")


def _run_is_a_file(place: Place) -> None:
    (place.folder / "runs").mkdir(parents=True)
    (place.folder / "runs" / "tried").write_text("notes of mine", encoding="utf-8")


def _other_files(place: Place) -> None:
    (place.folder / "runs" / "tried").mkdir(parents=True)
    (place.folder / "runs" / "tried" / "thesis.tex").write_text("do not lose this", encoding="utf-8")


def _train_again(place: Place, run_dir: object) -> None:
    """Undone by `stopped`, which asks for `resume`."""


def _stopped_then_trained(place: Place) -> None:
    stopped(_train_again)(place)
    place.verb = "train"


OUTPUT_VARIANTS = [
    Scenario(
        "v_o_runs_is_a_file",
        "A file where the folder of runs should be.",
        _runs_is_a_file,
        value=r"is a file|not a (folder|directory)",
        where=r"\bruns\b",
        remedy="to do:.*runs",
    ),
    Scenario(
        "v_o_run_is_a_file",
        "A file where the run's directory should be.",
        _run_is_a_file,
        value="exists already|is a file",
        where=r"runs/tried",
        remedy="to do:.*name",
    ),
    Scenario(
        "v_o_other_files",
        "A directory of the run's name with somebody's files.",
        _other_files,
        value=r"thesis\.tex",
        where=r"runs/tried",
        remedy="to do:.*name",
    ),
    Scenario(
        "v_o_stopped_run",
        "A run of the same name that was stopped and could be resumed.",
        _stopped_then_trained,
        value="exists already|already",
        where=r"runs/tried",
        remedy="zhibei resume",
    ),
    Scenario(
        "v_o_disk_nearly_full",
        "A disk that has room for the model, not for its checkpoints.",
        full_disk(900_000),
        value=r"free",
        where=r"runs",
        remedy="to do:.*(space|disk|keep_checkpoints|runs)",
    ),
    Scenario(
        "v_o_name_with_slash",
        "A name that is a path.",
        lambda place: place.set("name", "../elsewhere"),
        value=r"\.\./elsewhere|name",
        where=r"run\.yaml:\d+",
        remedy="runs",
    ),
]

MACHINE_VARIANTS = [
    Scenario(
        "v_p_bf16_on_v100",
        "bf16 on cards without units for it.",
        large_model("7b", "v100-32g:4", {"model.precision": "bf16", "model.method": "lora", "sft.learning_rate": 2e-4}),
        value=("bf16", "V100"),
        where=r"run\.yaml:\d+|model\.precision",
        remedy="fp16",
    ),
    Scenario(
        "v_p_bf16_on_t4",
        "bf16 on a T4.",
        large_model("7b", "t4", {"model.precision": "bf16", "model.method": "lora", "sft.learning_rate": 2e-4}),
        value=("bf16", "T4"),
        where=r"run\.yaml:\d+|model\.precision",
        remedy="fp16",
    ),
    Scenario(
        "v_p_7b_full_on_24gb",
        "All weights of a 7B model on a card of 24 GB.",
        large_model("7b", "rtx4090", {}),
        value=(r"\d+(\.\d+)? GiB", "4090"),
        where=r"model\.method|run\.yaml:\d+|memory",
        remedy="qlora|lora",
    ),
    Scenario(
        "v_p_70b_lora_on_24gb",
        "Adapters on a 70B model on a card of 24 GB.",
        large_model("70b", "rtx4090", {"model.method": "lora", "sft.learning_rate": 2e-4}),
        value=(r"\d+(\.\d+)? GiB", "4090"),
        where=r"model\.|run\.yaml:\d+|memory",
        remedy="to do:.*",
    ),
    Scenario(
        "v_p_13b_full_on_80gb",
        "All weights of a 13B model on one card of 80 GB.",
        large_model("13b", "h100-80g", {}),
        value=(r"\d+(\.\d+)? GiB", "H100"),
        where=r"model\.|run\.yaml:\d+|memory",
        remedy="to do:.*",
    ),
    Scenario(
        "v_p_unknown_machine",
        "A card that does not exist.",
        large_model("7b", "rtx9999", {"model.method": "lora"}),
        value="rtx9999",
        where="machine",
        remedy="to do:.*",
    ),
    Scenario(
        "v_p_cpu_7b",
        "All weights of a 7B model on a processor.",
        large_model("7b", "cpu", {}),
        value=r"\d+(\.\d+)? GiB",
        where=r"model\.|run\.yaml:\d+|memory|device",
        remedy="to do:.*",
        may=("stopped", "warned"),
    ),
]
