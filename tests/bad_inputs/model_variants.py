"""More model folders in which one file is wrong, of other families and in other ways. Knows no verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from tests.bad_inputs.model_cases import (
    INFINITE,
    NAN,
    change_json,
    change_tensors,
    config,
    more_tokens,
    poison,
    shard,
    weights,
)
from tests.bad_inputs.place import Place, chat_rows
from tests.bad_inputs.scenario import Build, Scenario


def of_family(family: str, build: Build) -> Build:
    """The same fault in a model of another family."""

    def with_family(place: Place) -> None:
        place.family = family
        build(place)

    return with_family


def in_bf16(then: Build) -> Build:
    def build(place: Place) -> None:
        import torch

        def halve(tensors: dict[str, Any]) -> None:
            tensors.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})

        change_tensors(place.model, halve)
        then(place)

    return build


def model_file(name: str, content: str | bytes) -> Build:
    """A file of the model with this very content."""

    def build(place: Place) -> None:
        path = place.model / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    return build


def _no_tokenizer(place: Place) -> None:
    for path in place.model.glob("*token*"):
        path.unlink()
    (place.model / "chat_template.jinja").unlink(missing_ok=True)


def _other_tokenizer(place: Place) -> None:
    """A tokenizer with fewer tokens than the model, in another order: every id exists and means something else."""
    folder = place.folder / "tokenizer"
    shutil.copytree(place.models("llama"), folder)
    (folder / "model.safetensors").unlink()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    names = [name for name, number in sorted(vocabulary.items(), key=lambda item: item[1]) if number >= 4]
    numbers = [vocabulary[name] for name in names]
    vocabulary.update(zip(reversed(names), numbers, strict=True))
    path.write_text(json.dumps(content), encoding="utf-8")
    place.set("model.tokenizer", "tokenizer")


def _dangling_link(place: Place) -> None:
    path = place.model / "model.safetensors"
    path.unlink()
    path.symlink_to(place.folder / "blobs" / "0123abcd")


def _shard_without_tensor(place: Place) -> None:
    """The index names a file for a tensor that is in neither."""
    shard(place)
    path = place.model / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index), encoding="utf-8")


def _emptied(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:0]


def _not_causal(place: Place) -> None:
    change_json(place.model / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def _broken_chat_template(place: Place) -> None:
    place.rows = chat_rows()
    place.set("data.template", None)
    (place.model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }", encoding="utf-8")


def _without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


MODEL_VARIANTS = [
    Scenario(
        "v_m_infinite_qwen",
        "One infinite number in a Qwen2 model.",
        of_family("qwen2", poison("model.layers.0.self_attn.q_proj.bias", INFINITE)),
        value="infinit|inf\b",
        where=r"model\.layers\.0\.self_attn\.q_proj\.bias",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_nan_bf16_mistral",
        "One NaN in the head of a Mistral model in bf16.",
        of_family("mistral", in_bf16(poison("lm_head.weight", NAN))),
        value="nan",
        where=r"lm_head\.weight",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_nan_norm_gemma",
        "One NaN in a norm of a Gemma model.",
        of_family("gemma", poison("model.norm.weight", NAN)),
        value="nan",
        where=r"model\.norm\.weight",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_weights_empty",
        "A weight file of no bytes.",
        model_file("model.safetensors", b""),
        value=r"\b0 bytes|empty|no bytes|ends",
        where=r"model\.safetensors",
        remedy="to do:.*(copy|download)",
    ),
    Scenario(
        "v_m_weights_lfs",
        "The pointer of git-lfs instead of the weights.",
        model_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"),
        value="git.?lfs|safetensors",
        where=r"model\.safetensors",
        remedy="to do:.*(copy|download|git lfs)",
    ),
    Scenario(
        "v_m_config_html",
        "A web page under the name config.json.",
        model_file("config.json", "<!DOCTYPE html><html>Sign in</html>"),
        value="json",
        where=r"config\.json",
        remedy="to do:.*(copy|download)",
    ),
    Scenario(
        "v_m_no_model_type",
        "A config.json that does not say what model it is.",
        config(model_type=None),
        value="model_type",
        where=r"config\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_more_layers",
        "config.json says three layers, the weights have two.",
        config(num_hidden_layers=3),
        value=r"layers\.2\.|missing",
        where=r"config\.json|model\.safetensors",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_fewer_layers",
        "config.json says one layer, the weights have two.",
        config(num_hidden_layers=1),
        value=(r"num_hidden_layers", r"\b1\b"),
        where=r"config\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_tensor_missing",
        "A file that lacks one tensor.",
        weights(_without("model.layers.1.self_attn.o_proj.weight")),
        value="missing|lacks",
        where=r"layers?[ .]1\b.*self_attn\.o_proj\.weight",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_vocab_smaller",
        "config.json says 280 tokens, the embedding has 300 rows.",
        config(vocab_size=280),
        value=(r"\b280\b", r"\b300\b"),
        where=(r"embed_tokens|lm_head", r"config\.json"),
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_pad_just_beyond",
        "The padding id is the size of the vocabulary.",
        config(pad_token_id=300),
        value=r"\b300\b",
        where=(r"config\.json", "pad_token_id"),
        remedy="to do:.*pad",
    ),
    Scenario(
        "v_m_eos_beyond",
        "The end-of-text id is beyond the vocabulary.",
        config(eos_token_id=5000),
        value=r"\b5000\b",
        where=(r"config\.json", "eos_token_id"),
        remedy="to do:.*eos",
    ),
    Scenario(
        "v_m_tokenizer_one_more",
        "A tokenizer with one token more than the model has rows.",
        lambda place: more_tokens(place, count=1),
        value=(r"\b300\b", r"<new0>|\b301\b"),
        where="tokenizer",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_no_tokenizer",
        "A model folder without a tokenizer.",
        _no_tokenizer,
        value="tokenizer",
        where=r"\bmodel\b",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_other_tokenizer",
        "A tokenizer of the right size that gives other ids than the model's own.",
        _other_tokenizer,
        value="tokenizer",
        where=(r"model\.tokenizer|run\.yaml:\d+",),
        remedy="to do:.*(remove model\\.tokenizer|own tokenizer)",
    ),
    Scenario(
        "v_m_dangling_link",
        "A weight file that is a link to nowhere.",
        _dangling_link,
        value="link|no weights|missing|not there",
        where=r"model\.safetensors|\bmodel\b",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_index_names_more",
        "The index of the weight files names a file that is not there.",
        _shard_without_tensor,
        value="missing|not there|no such",
        where=r"model-00003-of-00003\.safetensors",
        remedy="to do:.*(copy|download)",
    ),
    Scenario(
        "v_m_emptied_tensor",
        "A tensor of no rows, as a broken sharded save leaves it.",
        weights(_emptied),
        value=r"\b0\b.*(64|32)|\[0|shape",
        where=r"model\.layers\.0\.mlp\.up_proj\.weight",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_not_causal",
        "A model that fills gaps instead of going on.",
        _not_causal,
        value="bert",
        where=r"config\.json|\bmodel\b",
        remedy="to do:.*",
    ),
    Scenario(
        "v_m_path_of_file",
        "A file where the model's folder is needed.",
        lambda place: place.set("model.path", "model/config.json"),
        value=r"is a file",
        where=r"model\.path",
        remedy="to do:.*model",
    ),
    Scenario(
        "v_m_broken_chat_template",
        "A chat template that does not parse.",
        _broken_chat_template,
        value="template",
        where=r"chat_template|\bmodel\b",
        remedy="data\\.template|to do:.*",
    ),
    Scenario(
        "v_m_gptq_full",
        "All weights of a base that is stored in 4 bits are to be trained.",
        config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        value="gptq",
        where=r"config\.json|model\.(path|method)",
        remedy="to do:.*",
    ),
]
