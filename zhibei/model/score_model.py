"""Reward models: a decoder body with one number per row, read at the row's last token. Knows batches, not losses.

Dimensions: B sequences, T tokens, N = B * T, D hidden width, R rows of a batch.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model import attention
from zhibei.model.device import choose_device, choose_precision
from zhibei.model.language_model import BatchLike, LanguageModel
from zhibei.model.load import Need, choose_attention, is_score_config, load_base, load_weights, make_ready, with_adapter
from zhibei.model.locate import Located, locate
from zhibei.model.lora import add_adapters
from zhibei.model.quantized import QuantizeKind
from zhibei.store.files import read_json
from zhibei.store.manifest import require_base
from zhibei.store.shards import read_tensors

HEAD = "score"
"""The name of the head in the transformers and PEFT folders; also what PEFT calls it."""
HEAD_TENSOR = f"{HEAD}.weight"


def load_score_model(section: ModelSection, lora: LoraSection, need: Need) -> LanguageModel:
    """The reward model of a run file: the base's body with a fresh head, or a reward model that learns on.

    The head is fp32. It begins as N(0, 1 / (D + 1)) (arXiv:2009.01325, appendix B.1). Raises UserError as
    `load_for_training`, and for families that transformers has no sequence classifier for.
    """
    if section.method != "full" and lora.adapter is not None and not _scores(Path(lora.adapter)):
        raise UserError(
            f"lora.adapter {lora.adapter} is the adapter of a language model",
            expected="an adapter of a reward model, or fresh adapters",
            fix="remove lora.adapter; to begin with what it learned, set model.path to it and model.method: full",
            where="lora.adapter",
        )
    hf, name = load_base(section, lora, need)
    hf = as_score_model(hf, locate(section.path), seed=need.seed)
    if section.method != "full":
        hf = add_adapters(hf, lora, seed=need.seed, task="SEQ_CLS")
    model = wrapped(hf, name, longest_row=need.longest_row)
    make_ready(model, need)
    return model


def load_score_model_for_inference(
    path: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    base: str | None = None,
    quantize: QuantizeKind = "none",
) -> LanguageModel:
    """The reward model of a run directory, a Hugging Face folder or an adapter folder, ready to score; its body (under
    an adapter: the base) held in 8 or 4 bits if `quantize` says so.

    Raises UserError when what lies there continues text instead of scoring it.
    """
    place = choose_device(device)
    found = locate(path, base=base)
    require_scores(found, path)
    need = Need(device=place, precision=choose_precision(precision, place), packing=False, longest_row=0)
    section = ModelSection(path=path, quantize=quantize)
    model = wrapped(_stored(found, section, need, attention_name="auto"), "auto", longest_row=0)
    model.hf.eval()
    return model


def load_whole_score_model(path: str, section: ModelSection, need: Need) -> LanguageModel:
    """A reward model with every weight ready to learn, an adapter of it merged: what a critic can begin as. Held and
    attended as the run's model section says. Raises UserError as `load_score_model_for_inference`."""
    found = locate(path)
    require_scores(found, path)
    attention.register()
    name = choose_attention(section.attention, need)
    # Nothing can be merged into a packed base.
    whole = section.model_copy(update={"path": path, "method": "full", "quantize": "none"})
    if need.is_skeleton:
        found = replace(found, adapter=None)  # merged, it leaves no module behind
    hf = _stored(found, whole, need, attention_name=name)
    if found.adapter is not None:
        hf = hf.merge_and_unload(safe_merge=True)
    model = wrapped(hf.requires_grad_(True), name, longest_row=need.longest_row)
    make_ready(model, need)
    return model


def _stored(found: Located, section: ModelSection, need: Need, *, attention_name: str) -> Any:
    """A reward model as it lies there, with its adapter if it is one."""
    hf = as_score_model(load_weights(found, section, need, attention_name=attention_name), found, seed=0)
    if found.adapter is None:
        return hf
    require_base(found.adapter, Path(found.weights))
    return with_adapter(hf, found.adapter)


def wrapped(hf: Any, attention_name: str, *, longest_row: int) -> LanguageModel:
    """The border object of a reward model; its `head` is the one that learns."""
    head = getattr(hf.get_base_model() if hasattr(hf, "get_base_model") else hf, HEAD)
    # PEFT keeps the frozen head and its trained copy side by side.
    head = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    return LanguageModel(hf, attention_name=attention_name, longest_row=longest_row, head=head)


def as_score_model(hf: Any, found: Located, *, seed: int) -> Any:
    """The same body under a score head: the folder's own where it has one (in full precision), else a fresh one."""
    if not is_score_config(hf.config.to_dict()):
        return _with_fresh_head(hf, seed=seed)
    head = getattr(hf, HEAD, None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise UserError(
            f"{found.weights} gives {getattr(hf.config, 'num_labels', '?')} numbers per text",
            expected="a reward model: one linear head named score, without bias and with one output",
            fix="start from a language model instead; the head is then added",
            where="model.path",
        )
    folder = Path(found.weights)
    stored = read_tensors(folder, stem="model")[HEAD_TENSOR] if folder.is_dir() else head.weight.data
    head.weight = torch.nn.Parameter(stored.to(head.weight.device, torch.float32))
    return hf


def _with_fresh_head(hf: Any, *, seed: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(hf.config)
    config.num_labels = 1
    # The real attention is the body's; a class that is only built to be filled needs none.
    config._attn_implementation = attention.plain_attention(config)
    try:
        with torch.device("meta"):
            scorer: Any = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise UserError(
            f"transformers has no sequence classifier for the family {config.model_type}",
            expected="a decoder family such as LLaMA, Mistral, Qwen, Gemma or Phi",
            fix="train the reward model on a base of such a family",
            where="model.path",
        ) from None
    width = scorer.score.in_features if isinstance(getattr(scorer, HEAD, None), torch.nn.Linear) else None
    if width is None or type(scorer.base_model) is not type(hf.base_model):
        raise UserError(
            f"{type(scorer).__name__} is not the body of {type(hf).__name__} with a head named {HEAD}",
            expected="a family whose classifier reads the hidden state of the last token",
            fix="train the reward model on a LLaMA, Mistral, Qwen, Gemma or Phi base",
            where="model.path",
        )
    setattr(scorer, scorer.base_model_prefix, hf.base_model)
    device = hf.get_input_embeddings().weight.device
    head = torch.nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    start_1D = torch.randn(1, width, generator=generator) * (width + 1) ** -0.5
    head.weight.data.copy_(start_1D)
    setattr(scorer, HEAD, head)
    shared = hf.config
    shared.num_labels = 1
    shared.architectures = [type(scorer).__name__]
    # One config for body and scorer: attention is chosen on it later.
    scorer.config = shared
    scorer.name_or_path = hf.name_or_path
    scorer.train(hf.training)
    return scorer


def last_tokens(batch: BatchLike, num_rows: int) -> torch.Tensor:
    """Index in the flat [N] of the last real token of each row, [R], whichever side the padding is on."""
    if batch.borders is not None:
        return batch.borders[1 : num_rows + 1].long() - 1
    assert batch.mask_BT is not None
    num_tokens = batch.mask_BT.shape[1]
    places_T = torch.arange(num_tokens, device=batch.mask_BT.device)
    last_B = (places_T * batch.mask_BT).argmax(dim=1)
    return torch.arange(len(last_B), device=last_B.device) * num_tokens + last_B


def row_scores(model: LanguageModel, batch: BatchLike, num_rows: int) -> torch.Tensor:
    """The score of each row in fp32, [R]."""
    last_RD = model.hidden(batch)[last_tokens(batch, num_rows)]
    return torch.nn.functional.linear(last_RD.float(), model.head.weight.float())[:, 0]


def require_scores(found: Located, path: str) -> None:
    """Raises UserError unless a reward model lies there."""
    if not holds_scores(found):
        raise UserError(
            f"{path} is a language model: it continues text and gives no score",
            expected="a run of stage reward, or a folder with a reward model",
            fix="train one with stage: reward",
            where="model.path",
            pitfall="rm-base-is-adapter-path" if found.adapter is not None else "",
        )


def holds_scores(found: Located) -> bool:
    """Whether what was located scores texts instead of continuing them; hub ids are not looked into."""
    return _scores(found.adapter if found.adapter is not None else Path(found.weights))


def _scores(folder: Path) -> bool:
    if (folder / "adapter_config.json").is_file():
        return read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS"
    config = folder / "config.json"
    return config.is_file() and is_score_config(read_json(config))
