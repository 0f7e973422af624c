"""Models from disk or hub into memory. The only file that knows how transformers loads; knows no rows and no loops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model import attention
from zhibei.model.device import DTYPES, choose_device, choose_precision
from zhibei.model.language_model import LanguageModel, check_head
from zhibei.model.locate import Located, locate
from zhibei.model.lora import add_adapters, read_adapter
from zhibei.model.quantized import QuantizeKind, forget_loading, is_quantized, packing_of, put_own_layers
from zhibei.store.manifest import require_base
from zhibei.text.hub import hub_options, silence


@dataclass(frozen=True)
class Need:
    """What a stage asks of the model besides the run file's model section."""

    device: torch.device
    precision: str
    packing: bool = True
    longest_row: int = 1024
    seed: int = 0
    neftune_alpha: float = 0.0
    is_skeleton: bool = False
    """Modules without values (on the meta device): the values come from rank 0 when the model is divided."""
    loaded_on: torch.device | None = None
    """Where weights lie before they are divided; by default on `device`."""


def load_for_training(section: ModelSection, lora: LoraSection, need: Need) -> LanguageModel:
    """The model of a run file, with adapters when its method asks for them; frozen parts do not require gradients.

    Raises UserError for missing or damaged weights, non-finite weights, rows longer than the model's positions,
    adapter targets that match nothing, and families this package cannot train exactly.
    """
    hf, name = load_base(section, lora, need)
    refuse_scores(hf, section.path)
    if section.method != "full":
        hf = add_adapters(hf, lora, seed=need.seed)
    model = LanguageModel(hf, attention_name=name, longest_row=need.longest_row, neftune_alpha=need.neftune_alpha)
    make_ready(model, need)
    if not need.is_skeleton:
        check_head(model)
    return model


def refuse_scores(hf: Any, path: str) -> None:
    """Raises UserError where a language model is needed and a reward model lies."""
    if is_score_config(hf.config.to_dict()):
        raise UserError(
            f"{path} is a reward model: it scores text and cannot write any",
            expected="a language model",
            fix="name the model that the reward model was made from, or one that was trained to answer",
            where="model.path",
        )


def load_base(section: ModelSection, lora: LoraSection, need: Need) -> tuple[Any, str]:
    """The transformers model that training begins with, an adapter of model.path merged into it, and the name of its
    attention. Raises UserError as `load_for_training`."""
    attention.register()
    found = locate(section.path)
    has_adapters = section.method != "full"
    if found.adapter is not None and has_adapters:
        raise UserError(
            f"model.path {section.path} is an adapter on {found.weights}",
            expected="a base model under model.path, and the adapter to continue under lora.adapter",
            fix=f"set model.path: {found.weights} and lora.adapter: {found.adapter}",
            where="model.path",
        )
    for adapter in (found.adapter, Path(lora.adapter) if has_adapters and lora.adapter else None):
        if adapter is not None:
            require_base(adapter, Path(found.weights))
    name = choose_attention(section.attention, need)
    hf = load_weights(found, section, need, attention_name=name)
    if not has_adapters and is_quantized(hf):
        raise UserError(
            f"{section.path} is held in few bits, and model.method: full trains every weight",
            expected="16-bit weights for full training and for merging an adapter, or adapters on the packed base",
            fix="set model.method: qlora, or remove model.quantize and name a folder with 16-bit weights",
            where="model.method",
            pitfall="full-training-of-a-quantised-base",
        )
    return (hf if found.adapter is None else _merged(hf, found.adapter)), name


def make_ready(model: LanguageModel, need: Need) -> None:
    """Training mode, and attention that keeps packed rows apart. Raises UserError for families that cannot."""
    if need.packing and not model.inner._supports_attention_backend:
        raise UserError(
            f"{type(model.inner).__name__} does not let its attention be replaced: packed rows would see one another",
            expected="a family that supports packing",
            fix="set data.packing: false",
            where="data.packing",
        )
    if model.attention_name == attention.VARLEN and (model.config.to_dict().get("attn_logit_softcapping") is not None):
        model.attention_name = attention.DOCUMENTS
        model.inner.set_attn_implementation(attention.DOCUMENTS)
    model.hf.train()


def load_for_inference(
    path: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    base: str | None = None,
    quantize: QuantizeKind = "none",
) -> LanguageModel:
    """A run directory, Hugging Face folder, hub id or adapter folder, ready to sample from.

    `quantize` holds the weights (under an adapter: its base) as int8 or nf4; a folder that is stored so needs no word.
    Raises UserError as `load_for_training`.
    """
    place = choose_device(device)
    found = locate(path, base=base)
    need = Need(device=place, precision=choose_precision(precision, place), packing=False, longest_row=0)
    hf = load_weights(found, ModelSection(path=path, quantize=quantize), need, attention_name="auto")
    refuse_scores(hf, path)
    if found.adapter is not None:
        require_base(found.adapter, Path(found.weights))
        hf = with_adapter(hf, found.adapter)
    model = LanguageModel(hf, attention_name="auto", longest_row=0)
    model.hf.eval()
    return model


def choose_attention(asked: str, need: Need) -> str:
    """The transformers name of the attention: packed rows need one that knows their borders."""
    if not need.packing:
        if asked in ("varlen", "documents"):
            raise UserError(
                f"model.attention: {asked} works on packed rows only",
                expected="sdpa or eager with data.packing: false",
                fix="set model.attention: auto, or data.packing: true",
                where="model.attention",
            )
        return asked
    can_varlen = attention.varlen_is_available(need.device) and need.precision != "fp32"
    if asked == "varlen" and not can_varlen:
        raise UserError(
            f"model.attention: varlen on {need.device.type} in {need.precision}",
            expected="a CUDA device of compute capability 8.0 or newer, in bf16 or fp16",
            fix="set model.attention: auto",
            where="model.attention",
        )
    return attention.VARLEN if can_varlen and asked in ("auto", "varlen") else attention.DOCUMENTS


def load_weights(found: Located, section: ModelSection, need: Need, *, attention_name: str) -> Any:
    """The transformers model, complete and finite, on its device: a language model, or a reward model where the folder
    holds one (`config.json` names a class for sequences)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    # Our own checks below say what is wrong with a file or field; the load report and its bars say it less well.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trust = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    options = {**trust, **hub_options(found.weights)}
    refuse_pickles(found.weights)
    try:
        config = AutoConfig.from_pretrained(found.weights, **options)
        _apply_rope_scaling(config, section, need)
        kind = AutoModelForSequenceClassification if is_score_config(config.to_dict()) else AutoModelForCausalLM
        packing = packing_of(section, config, found.weights)
        if need.is_skeleton:
            return _skeleton(kind, config, need, attention_name=attention_name)
        with packing.watched() as finite:
            loaded: Any = kind.from_pretrained(
                found.weights,
                config=config,
                dtype=DTYPES[need.precision],
                attn_implementation=_their_attention(config, attention_name),
                device_map={"": need.loaded_on or need.device},
                use_safetensors=True,
                output_loading_info=True,
                **packing.options,
                **options,
            )
        hf, info = loaded
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds; the user needs one message
        raise _loading_error(found.weights, error) from error
    if attention_name in _OURS:
        hf.config._attn_implementation = attention_name
    _check_complete(found.weights, info)
    if packing.kind != "none":
        put_own_layers(hf, DTYPES[need.precision])
    check_finite(hf, found.weights, packed=finite)
    return hf


def _skeleton(kind: Any, config: Any, need: Need, *, attention_name: str) -> Any:
    """The modules of a model, none of whose weights are read or made. Layers that rank 0 holds packed are plain here
    until the model is divided."""
    with torch.device("meta"):
        hf = kind.from_config(
            config, dtype=DTYPES[need.precision], attn_implementation=_their_attention(config, attention_name)
        )
    if attention_name in _OURS:
        hf.config._attn_implementation = attention_name
    forget_loading(hf)
    return hf


def is_score_config(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a model that scores sequences instead of continuing them."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _their_attention(config: Any, name: str) -> str | None:
    """What transformers is told while loading; ours are put in afterwards. None: the family's own choice."""
    plain = attention.plain_attention(config)
    if name == "sdpa" and plain != "sdpa":
        raise UserError(
            "model.attention: sdpa, but this family caps its attention scores, which sdpa leaves out",
            expected="eager for this family",
            fix="set model.attention: auto",
            where="model.attention",
        )
    if name not in (*_OURS, "auto"):
        return name
    return plain if plain == "eager" else None


_OURS = (attention.VARLEN, attention.DOCUMENTS)


def refuse_pickles(weights: str) -> None:
    """A local folder that has only pickled weights is refused: opening a pickle can run any code."""
    folder = Path(weights)
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    what = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
    raise UserError(
        f"{folder} holds {what}",
        expected="model.safetensors, or shards with model.safetensors.index.json",
        fix="convert the weights to safetensors where you trust them; pickles are never opened here"
        if pickled
        else "copy or download the weights into this folder",
        where="model.path",
        pitfall="weights-incomplete",
    )


def _apply_rope_scaling(config: Any, section: ModelSection, need: Need) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    factor = section.rope_scaling_factor
    if factor is not None:
        rope = dict(getattr(config, "rope_parameters", None) or {})
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"model.rope_scaling_factor: {factor}, but the model already scales positions ({rope['rope_type']})",
                expected="a model with plain rotary positions",
                fix="remove model.rope_scaling_factor",
                where="model.rope_scaling_factor",
            )
        config.rope_parameters = {**rope, "rope_type": "linear", "factor": factor}
        positions = int(positions * factor) if positions else None
        config.max_position_embeddings = positions
    if positions is not None and need.longest_row > positions:
        raise UserError(
            f"rows of up to {need.longest_row} tokens, but the model knows {positions} positions",
            expected=f"data.max_tokens of at most {positions}",
            fix=f"set data.max_tokens: {positions}, or model.rope_scaling_factor: {-(-need.longest_row // positions)}",
            where="data.max_tokens",
        )


def _check_complete(weights: str, info: dict[str, Any]) -> None:
    problems = {
        "missing": sorted(str(key) for key in info.get("missing_keys", ())),
        "of another shape": sorted(str(key) for key in info.get("mismatched_keys", ())),
        "that the model has no place for": sorted(str(key) for key in info.get("unexpected_keys", ())),
    }
    for kind, names in problems.items():
        if names:
            raise UserError(
                f"{weights}: {len(names)} tensors {kind}, e.g. {names[0]}",
                expected="weights that fill the model of config.json exactly",
                fix="check that config.json and the weights belong together and that all shards were copied",
                where="model.path",
                pitfall="weights-do-not-fit-config",
            )


def check_finite(hf: torch.nn.Module, weights: str, *, packed: Sequence[torch.Tensor] = ()) -> None:
    """Every weight must be finite: a single NaN makes every loss NaN, hours later. Raises UserError.

    `packed`: what was seen of each matrix when it was quantised, which hides NaN for good.
    """
    flags = {name: torch.isfinite(parameter).all() for name, parameter in hf.named_parameters()}
    flags |= {f"matrix {number + 1} of those that were quantised": flag for number, flag in enumerate(packed)}
    bad = [name for name, flag in flags.items() if not bool(flag)]
    if bad:
        raise UserError(
            f"{weights}: {len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}",
            expected="finite weights",
            fix="get the weights again; if you trained them, go back to an earlier checkpoint (zhibei verify names it)",
            where="model.path",
            pitfall="weights-not-finite",
        )


def _loading_error(weights: str, error: Exception) -> UserError:
    text = silence() if not Path(weights).exists() else ""
    text = text or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if "trust_remote_code" in str(error):
        fix = "set model.trust_remote_code: true if you know and trust the model's authors"
    elif Path(weights).is_dir():
        fix = f"zhibei verify {weights} names the damaged or missing file; copy that file again"
    else:
        fix = "check the hub id and the network, or download the model and set model.path to its folder"
    return UserError(
        f"{weights} cannot be loaded ({text})",
        expected="a complete causal language model in Hugging Face form",
        fix=fix,
        where="model.path",
    )


def with_adapter(hf: Any, folder: Path) -> Any:
    """The model wrapped with the adapter of a folder. Raises UserError when it is incomplete or does not fit."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not (folder / "adapter_model.safetensors").is_file():
            raise FileNotFoundError("adapter_model.safetensors is not there")
        if config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type {config.get('peft_type')} instead of LORA")
        return read_adapter(hf, folder)
    except Exception as error:
        raise UserError(
            f"the adapter {folder} cannot be put on this base ({type(error).__name__}: {error})",
            expected="a complete PEFT LoRA folder made for this base model",
            fix="check that the base is the one it was trained on, and copy the folder again",
            where="model.path",
        ) from error


def _merged(hf: Any, folder: Path) -> Any:
    """Full training that starts from an adapter run continues on its merged weights."""
    # PEFT froze the base when it read the adapter; merged, there is no adapter left, and every weight is to learn.
    return with_adapter(hf, folder).merge_and_unload(safe_merge=True).requires_grad_(True)
