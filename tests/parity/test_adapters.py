"""Adapter folders go both ways between zhibei and plain PEFT, with the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_model_folder
from zhibei.config.run import LoraSection, ModelSection
from zhibei.model.load import Need, load_for_inference, load_for_training
from zhibei.model.save import write_weights

pytestmark = pytest.mark.parity

TOKENS_BT = torch.arange(5, 45).reshape(2, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "heads": {"modules_to_save": ["lm_head"]},
    "some-layers": {"targets": ["q_proj", "down_proj"]},
}


def logits_BTV(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS_BT).logits


def filled(model: torch.nn.Module) -> None:
    """Give every trainable tensor a value of its own: fresh adapters change nothing, and equality would be empty."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_loads_what_zhibei_wrote(tmp_path: Path, variant: str) -> None:
    base = tiny_model_folder(tmp_path)
    section = LoraSection(rank=4, alpha=8, **VARIANTS[variant])
    need = Need(device=torch.device("cpu"), precision="fp32", packing=False, longest_row=20)
    model = load_for_training(ModelSection(path=str(base), method="lora"), section, need)
    filled(model.hf)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_weights(model, folder)
    expected_BTV = logits_BTV(model.hf)

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    base_BTV = logits_BTV(plain)
    loaded_BTV = logits_BTV(peft.PeftModel.from_pretrained(plain, str(folder)))
    torch.testing.assert_close(loaded_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    assert (loaded_BTV - base_BTV).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_zhibei_loads_what_plain_peft_wrote(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_model_folder(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **options)
    theirs = peft.get_peft_model(plain, config)
    filled(theirs)
    folder = tmp_path / "peft"
    theirs.save_pretrained(str(folder))
    expected_BTV = logits_BTV(theirs)

    chatting = load_for_inference(str(folder), device="cpu", precision="fp32", base=str(base))
    torch.testing.assert_close(logits_BTV(chatting.hf), expected_BTV, rtol=1e-5, atol=1e-5)
    need = Need(device=torch.device("cpu"), precision="fp32", packing=False, longest_row=20)
    section = LoraSection(adapter=str(folder))
    continued = load_for_training(ModelSection(path=str(base), method="lora"), section, need)
    torch.testing.assert_close(logits_BTV(continued.hf), expected_BTV, rtol=1e-5, atol=1e-5)
    assert {name.split(".")[-3] for name in continued.trainable()} >= {"lora_A", "lora_B"}
