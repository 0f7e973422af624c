"""More adapters and adapter settings that cannot work. Knows no verdict."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.adapter_cases import LORA, lora, make_adapter
from tests.bad_inputs.config_cases import settings
from tests.bad_inputs.model_cases import change_json
from tests.bad_inputs.place import Place
from tests.bad_inputs.scenario import Build, Scenario

WEIGHTS = "adapter_model.safetensors"


def adapter(change: Any) -> Build:
    """A sound adapter to continue from, then `change(place, folder)`."""

    def build(place: Place) -> None:
        folder = make_adapter(place.folder / "adapter", place.model)
        settings({**LORA, "lora.adapter": "adapter"})(place)
        change(place, folder)

    return build


def _tensors(change: Any) -> Build:
    def build(place: Place, folder: Any) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return adapter(build)


def _nan(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values())).view(-1)[3] = float("nan")


def _half(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def _other_rank(place: Place, folder: Any) -> None:
    change_json(folder / "adapter_config.json", r=8)


def _truncated(place: Place, folder: Any) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-200])


def _adapter_as_model(place: Place) -> None:
    make_adapter(place.folder / "adapter", place.model)
    settings({**LORA, "model.path": "adapter"})(place)


LORA_VARIANTS = [
    Scenario(
        "v_l_rank_beyond_width",
        "Adapters of a rank that is larger than the layers they stand beside.",
        lora(rank=4096),
        value=(r"\b4096\b", r"\b(32|16|64)\b"),
        where=r"run\.yaml:\d+|lora\.rank",
        remedy="to do:.*rank",
        may=("stopped", "warned"),
    ),
    Scenario(
        "v_l_targets_empty",
        "An empty list of targets.",
        lora(targets=[]),
        value="targets.{0,40}(empty|no)",
        where=r"run\.yaml:\d+",
        remedy="all-linear",
    ),
    Scenario(
        "v_l_targets_other_family",
        "The targets of GPT-2 for a Qwen2 model.",
        lambda place: [setattr(place, "family", "qwen2"), lora(targets=["c_attn", "c_proj", "c_fc"])(place)],
        value=("c_attn", "c_proj", "c_fc"),
        where=r"run\.yaml:\d+|lora\.targets",
        remedy="q_proj|all-linear",
    ),
    Scenario(
        "v_l_targets_pattern",
        "A pattern where names are needed.",
        lora(targets=[".*_proj"]),
        value=r"\.\*_proj",
        where=r"run\.yaml:\d+|lora\.targets",
        remedy="q_proj|all-linear",
    ),
    Scenario(
        "v_l_save_module_missing",
        "A module to be trained in full that the model does not have.",
        lora(modules_to_save=["embed_token"]),
        value="embed_token",
        where=r"run\.yaml:\d+|lora\.modules_to_save",
        remedy="embed_tokens",
    ),
    Scenario(
        "v_l_alpha_zero",
        "A scale of zero: the adapters would do nothing.",
        lora(alpha=0),
        value=r"lora\.alpha.{0,40}\b0\b",
        where=r"run\.yaml:\d+",
        remedy="to do:.*alpha",
    ),
    Scenario(
        "v_l_dropout_one",
        "A dropout of 1: nothing passes through.",
        lora(dropout=1.0),
        value=r"lora\.dropout.{0,40}\b1(\.0)?\b",
        where=r"run\.yaml:\d+",
        remedy="to do:.*dropout",
    ),
    Scenario(
        "v_l_save_packed",
        "A layer that is held in 4 bits is to be trained in full.",
        settings({"model.method": "qlora", "lora.modules_to_save": ["down_proj"]}),
        value="down_proj.{0,60}few bits",
        where=r"run\.yaml:\d+|lora\.modules_to_save",
        remedy="to do:.*modules_to_save",
    ),
    Scenario(
        "v_l_adapter_no_weights",
        "An adapter folder without its weights.",
        adapter(lambda place, folder: (folder / WEIGHTS).unlink()),
        value=r"adapter_model\.safetensors",
        where="adapter",
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_truncated",
        "An adapter whose file ends too early.",
        adapter(_truncated),
        value="ends|truncated|incomplete|bytes|too short",
        where=r"adapter_model\.safetensors|lora\.adapter",
        remedy="to do:.*copy",
    ),
    Scenario(
        "v_l_adapter_nan",
        "One NaN in an adapter.",
        _tensors(_nan),
        value="nan",
        where=(r"adapter", r"lora_[AB]"),
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_half",
        "An adapter that lacks half of its layers.",
        _tensors(_half),
        value=r"layers\.1\.|missing|lacks",
        where="adapter",
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_empty",
        "An adapter without one tensor, as a save under DeepSpeed leaves it.",
        _tensors(lambda tensors: tensors.clear()),
        value="no tensors|empty|0 tensors|missing",
        where="adapter",
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_other_rank",
        "adapter_config.json says another rank than the weights have.",
        adapter(_other_rank),
        value=(r"\b8\b", r"\b4\b"),
        where="adapter",
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_not_lora",
        "An adapter of another kind.",
        adapter(lambda place, folder: change_json(folder / "adapter_config.json", peft_type="IA3")),
        value="IA3",
        where="adapter",
        remedy="to do:.*",
    ),
    Scenario(
        "v_l_adapter_as_model",
        "An adapter where the model is asked for, in a run that trains adapters.",
        _adapter_as_model,
        value="adapter",
        where=r"model\.path",
        remedy=r"lora\.adapter",
    ),
    Scenario(
        "v_l_adapter_missing",
        "An adapter folder that is not there.",
        lambda place: settings({**LORA, "lora.adapter": "adaptor"})(place),
        value="adaptor",
        where=r"lora\.adapter|run\.yaml:\d+",
        remedy="to do:.*",
    ),
]
