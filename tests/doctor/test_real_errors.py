"""Errors that the installed libraries raise today, as they word them, are named."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.tiny import tiny_model
from zhibei.doctor.explain import explain_stream
from zhibei.doctor.pitfalls import load_catalogue


def _two_backward(_: Path) -> None:
    value = torch.ones(1, requires_grad=True)
    loss = (value * value).sum()
    loss.backward()
    loss.backward()


def _meta(_: Path) -> None:
    torch.nn.Linear(2, 2, device="meta").to("cpu")


class Anything:
    """Something that only unpickling can bring back."""


def _pickled(folder: Path) -> None:
    torch.save({"a": Anything()}, folder / "a.bin")
    torch.load(folder / "a.bin")


def _stand_in(folder: Path) -> None:
    (folder / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n" * 3)
    load_file(folder / "a.safetensors")


def _no_tokenizer(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def _other_vocabulary(folder: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(folder)
    model.config.vocab_size += 8
    model.config.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)


def _refused_settings(folder: Path) -> None:
    GenerationConfig(do_sample=False, temperature=0.5).save_pretrained(folder)


def _no_padding(_: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words)(["a", "a b"], padding=True)


CASES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "targets": (
        lambda _: get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["c_attn"])),
        ("lora-targets-not-in-model",),
    ),
    "no targets": (
        lambda _: get_peft_model(torch.nn.Sequential(torch.nn.ReLU()), LoraConfig()),  # type: ignore[arg-type]
        ("lora-targets-not-in-model",),
    ),
    "id beyond the embedding": (
        lambda _: tiny_model("llama")(torch.tensor([[10**6]])),
        ("token-id-beyond-embedding", "device-side-assert"),
    ),
    "number formats": (lambda _: torch.nn.Linear(2, 2)(torch.ones(1, 2).half()), ("number-formats-disagree",)),
    "shapes": (lambda _: torch.ones(2, 3) @ torch.ones(2, 3), ("tensor-shapes-disagree",)),
    "no gradient": (
        lambda _: torch.ones(1).sum().backward(),
        ("nothing-requires-gradient", "lora-resume-trainable-zero"),
    ),
    "backward twice": (_two_backward, ("graph-used-twice",)),
    "meta": (_meta, ("meta-tensor-left",)),
    "pickle": (_pickled, ("pickled-weights-refused",)),
    "stand-in": (_stand_in, ("weights-file-damaged", "weights-incomplete", "truncated-checkpoint-looks-valid")),
    "no tokenizer": (_no_tokenizer, ("tokenizer-not-loadable", "tokenizer-not-saved-with-model")),
    "other vocabulary": (_other_vocabulary, ("shapes-of-weights-differ", "weights-do-not-fit-config")),
    "generation settings": (_refused_settings, ("generation-config-invalid-at-save",)),
    "no padding token": (_no_padding, ("padding-token-missing",)),
    "sampling NaN": (
        lambda _: torch.multinomial(torch.tensor([float("nan"), 1.0]), 1),
        ("nan-while-sampling", "fp16-on-bf16-pretrained-nan"),
    ),
    "host memory": (lambda _: torch.empty(10**15), ("host-memory-exhausted", "host-oom-exit-9-deepspeed")),
    "bytes": (lambda folder: _decoded(folder), ("dataset-not-utf8",)),
    "package": (lambda _: __import__("no_such_package_at_all"), ("package-missing",)),
}


def _decoded(folder: Path) -> str:
    (folder / "a.json").write_bytes("[{'instruction': '你好'}]".encode("gbk"))
    return (folder / "a.json").read_text("utf-8")


@pytest.mark.parametrize("name", CASES)
def test_what_libraries_raise_today_is_named(name: str, tmp_path: Path) -> None:
    fail, accepted = CASES[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail(tmp_path)
    log = "loading\n" + "".join(traceback.format_exception(caught.value))
    explanation = explain_stream(io.BytesIO(log.encode()), name, load_catalogue())
    assert explanation.cause is not None, log
    assert explanation.cause.pitfall.id in accepted, log
