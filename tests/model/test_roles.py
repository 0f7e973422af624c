"""Policy, critic and reference: one base or several, each learns alone, and the reference stays what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.batches import Batch, BatchPlan, collate_packed, collate_padded
from zhibei.data.prepared import PreparedRows
from zhibei.model.load import Need
from zhibei.model.lora import add_adapters
from zhibei.model.roles import Cast, Roles, load_roles

CPU = Need(device=torch.device("cpu"), precision="fp32", longest_row=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("roles"))


def batch(collate=collate_packed) -> Batch:
    lengths = np.array([9, 5, 7])
    tokens = np.arange(21, dtype=np.int32) * 7 % 250 + 4
    borders = np.concatenate([[0], np.cumsum(lengths)])
    rows = PreparedRows(tokens, np.ones(21, dtype=bool), borders, ["a", "b", "c"])
    return collate(rows, [0, 1, 2], BatchPlan(global_batch=3, micro_batch_tokens=64))


def roles_of(folder: Path, kind: str, **lora) -> Roles:
    method = "full" if kind == "full" else "lora"
    section = ModelSection(path=str(folder), method=method)
    return load_roles(section, LoraSection(rank=4, **lora), CPU, Cast(has_critic=True, is_shared=kind == "shared"))


def logits(roles: Roles) -> torch.Tensor:
    return roles.policy.logits(roles.policy.hidden(batch()))


@pytest.mark.parametrize("kind", ["shared", "lora", "full"])
def test_each_role_learns_alone_and_the_reference_stays(kind: str, folder: Path) -> None:
    roles = roles_of(folder, kind)
    before = logits(roles).detach()
    with roles.as_reference() as reference:
        base = reference.logits(reference.hidden(batch()))
    assert torch.equal(before, base)
    with roles.as_critic() as critic:
        assert critic.values(batch()).abs().max() == 0
        torch.nn.init.normal_(critic.head.weight)
        critic.values(batch()).square().sum().backward()
        reached = {name for name, p in critic.parameters.items() if p.grad is not None}
    assert reached == set(critic.parameters)
    assert all(parameter.grad is None for parameter in roles.policy.trainable().values())
    own = {id(parameter) for parameter in critic.parameters.values()}
    assert not own & {id(parameter) for parameter in roles.policy.trainable().values()}
    with torch.no_grad():
        for parameter in critic.parameters.values():
            parameter += 0.1
    assert torch.equal(logits(roles), before)
    with torch.no_grad():
        for parameter in roles.policy.trainable().values():
            parameter += 0.1
    assert not torch.allclose(logits(roles), before)
    with roles.as_reference() as reference:
        assert torch.equal(reference.logits(reference.hidden(batch())), base)


def test_one_base_is_one_base(folder: Path) -> None:
    shared, separate = roles_of(folder, "shared"), roles_of(folder, "lora")
    assert shared.critic is not None
    assert separate.critic is not None
    assert shared.critic.model is shared.policy
    assert shared.reference is None
    base = shared.policy.num_parameters()[1]
    policy, critic = shared.policy.trainable(), shared.critic.parameters
    assert all(".default." in name for name in policy)
    adapters = sum(parameter.numel() for parameter in policy.values())
    assert sum(parameter.numel() for parameter in critic.values()) == adapters + 33
    assert separate.policy.num_parameters()[1] + separate.critic.model.num_parameters()[1] > 1.9 * (base - 2 * adapters)


def test_the_padding_changes_no_value(folder: Path) -> None:
    roles = roles_of(folder, "shared")
    padded_roles = load_roles(
        ModelSection(path=str(folder), method="lora", attention="sdpa"),
        LoraSection(rank=4),
        Need(device=CPU.device, precision="fp32", packing=False, longest_row=64),
        Cast(has_critic=True, is_shared=True),
    )
    found = []
    for one, collate in ((roles, collate_packed), (padded_roles, collate_padded)):
        rows = batch(collate)
        with one.as_critic() as critic, torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            critic.head.weight.copy_(torch.randn(1, 32, generator=generator))
            values_N = critic.values(rows)
        real = torch.ones_like(values_N, dtype=torch.bool) if rows.mask_BT is None else rows.mask_BT.flatten().bool()
        found.append(values_N[real])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


def test_a_policy_that_goes_on_from_an_adapter_keeps_that_adapter_as_its_reference(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    hf = add_adapters(AutoModelForCausalLM.from_pretrained(folder), LoraSection(rank=4), seed=3)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    hf.save_pretrained(str(tmp_path / "tuned"))
    section = ModelSection(path=str(folder), method="lora")
    lora = LoraSection(adapter=str(tmp_path / "tuned"))
    roles = load_roles(section, lora, CPU, Cast(has_critic=True, is_shared=True))
    before = logits(roles).detach()
    with roles.policy.without_adapters():
        assert not torch.allclose(logits(roles), before)
    with roles.as_reference() as reference:
        assert torch.equal(reference.logits(reference.hidden(batch())), before)
    assert all(".default." in name for name in roles.policy.trainable())


def test_shared_models_need_adapters(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.method: full"):
        load_roles(ModelSection(path=str(folder)), LoraSection(), CPU, Cast(has_critic=True, is_shared=True))
