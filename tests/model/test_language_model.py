"""Packed rows see only themselves, in every family; logits are the model's own; what cannot be exact is refused."""

import numpy as np
import pytest
import torch

from tests.tiny import FAMILIES, tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.batches import BatchPlan, collate_packed, collate_padded
from zhibei.data.prepared import PreparedRows
from zhibei.model.language_model import check_head
from zhibei.model.load import Need, load_for_inference, load_for_training
from zhibei.model.locate import locate

CPU = torch.device("cpu")
LENGTHS = [5, 23, 1, 40, 12]


def rows() -> PreparedRows:
    random = np.random.default_rng(1)
    borders = np.concatenate([[0], np.cumsum(LENGTHS)])
    tokens = random.integers(4, 300, borders[-1]).astype(np.int32)
    return PreparedRows(tokens, np.ones(borders[-1], dtype=bool), borders, [str(i) for i in range(len(LENGTHS))])


def loaded(folder, *, packing: bool = True, neftune_alpha: float = 0.0, **section):
    need = Need(CPU, "fp32", packing=packing, longest_row=64, neftune_alpha=neftune_alpha)
    return load_for_training(ModelSection(path=str(folder), **section), LoraSection(), need)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_padded_rows_equal_rows_alone(tmp_path, family):
    folder = tiny_model_folder(tmp_path, family=family)
    plan, numbers = BatchPlan(8, 512, pad_multiple=16), list(range(len(LENGTHS)))
    packed, padded = collate_packed(rows(), numbers, plan), collate_padded(rows(), numbers, plan)
    model, plain = loaded(folder), loaded(folder, packing=False)
    with torch.no_grad():
        together_ND = model.hidden(packed)
        beside_BTD = plain.hidden(padded).view(*padded.tokens_BT.shape, -1)
        start = 0
        for number, length in enumerate(LENGTHS):
            alone_ND = model.hidden(collate_packed(rows(), [number], BatchPlan(8, 512)))
            torch.testing.assert_close(together_ND[start : start + length], alone_ND, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(beside_BTD[number, :length], alone_ND, atol=2e-5, rtol=1e-4)
            start += length


def test_the_comparison_bites_when_rows_see_one_another(tmp_path):
    folder = tiny_model_folder(tmp_path, family="llama")
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512))
    model = loaded(folder)
    with torch.no_grad():
        right_ND = model.hidden(packed)
        model.inner.set_attn_implementation("sdpa")
        output = model.body(input_ids=packed.tokens_BT, attention_mask=torch.ones_like(packed.tokens_BT))
    assert (output.last_hidden_state[0] - right_ND).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_and_sampling_leaves_no_trace(tmp_path, family):
    model = loaded(tiny_model_folder(tmp_path, family=family))
    check_head(model)
    before = model.inner.config._attn_implementation
    with model.sampling() as hf:
        assert not hf.training
    assert model.hf.training
    assert model.inner.config._attn_implementation == before


def test_a_head_that_is_not_the_models_own_is_refused(tmp_path):
    model = loaded(tiny_model_folder(tmp_path, family="gemma2"))
    assert model.head_shape.softcap is not None
    model.head_shape = type(model.head_shape)(scale=0.5)
    with pytest.raises(UserError, match="differ from the model's own"):
        check_head(model)


def test_rounding_of_a_soft_capped_head_in_half_precision_is_no_other_head(tmp_path):
    """Random weights of Gemma 2's size gave logits up to 30 whose cap, computed in bf16, differs by 0.1 from fp32."""
    model = loaded(tiny_model_folder(tmp_path, family="gemma2"))
    model.hf.to(torch.bfloat16)
    with torch.no_grad():
        model.head.weight.mul_(20)
    check_head(model)
    model.head_shape = type(model.head_shape)(scale=0.5, softcap=model.head_shape.softcap)
    with pytest.raises(UserError, match="differ from the model's own"):
        check_head(model)


def test_sdpa_is_refused_where_it_would_leave_out_the_soft_cap(tmp_path):
    folder = tiny_model_folder(tmp_path, family="gemma2")
    with pytest.raises(UserError, match="caps its attention scores"):
        loaded(folder, packing=False, attention="sdpa")
    assert loaded(folder, packing=False).inner.config._attn_implementation == "eager"


def test_neftune_noise_has_the_size_of_its_formula_by_row_length(tmp_path):
    folder = tiny_model_folder(tmp_path, family="llama")
    model = loaded(folder, neftune_alpha=5.0)
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512))
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([model._noisy_embeddings(packed)[0] for _ in range(200)])
        noise_STD = draws - model.inner.get_input_embeddings()(packed.tokens_BT)[0]
    start = 0
    for length in LENGTHS:
        bound = 5.0 / (length * noise_STD.shape[-1]) ** 0.5
        part = noise_STD[:, start : start + length]
        assert part.abs().max() <= bound * (1 + 1e-5)
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        start += length
    model.hf.eval()
    with torch.no_grad():
        assert torch.equal(model.hidden(packed), loaded(folder).hidden(packed))


def test_linear_position_scaling_admits_longer_rows(tmp_path):
    folder = tiny_model_folder(tmp_path, family="llama")
    need = Need(CPU, "fp32", longest_row=500)
    with pytest.raises(UserError, match="256 positions") as caught:
        load_for_training(ModelSection(path=str(folder)), LoraSection(), need)
    assert "rope_scaling_factor: 2" in caught.value.fix
    model = load_for_training(ModelSection(path=str(folder), rope_scaling_factor=2.0), LoraSection(), need)
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["factor"] == 2.0


def test_paths_that_lead_nowhere_say_what_is_near(tmp_path, monkeypatch):
    folder = tiny_model_folder(tmp_path, family="llama")
    cases = {
        str(folder)[:-1]: str(folder),
        str(folder / "config.json"): str(folder),
        str(tmp_path): str(folder),
    }
    for path, remedy in cases.items():
        with pytest.raises(UserError) as caught:
            locate(path)
        assert remedy in caught.value.fix
    assert locate("org/name").weights == "org/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="there is no folder runs/typo"):
        locate("runs/typo")


def test_only_pickled_weights_are_refused_unopened(tmp_path):
    folder = tiny_model_folder(tmp_path, family="llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match="only pickled weights"):
        load_for_inference(str(folder))


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_attention_that_cannot_keep_rows_apart_is_a_setting_error(tmp_path, asked):
    folder = tiny_model_folder(tmp_path, family="llama")
    assert loaded(folder, packing=False, attention=asked).inner.config._attn_implementation == asked
    with pytest.raises(UserError, match="packed rows only"):
        loaded(folder, packing=False, attention="documents")
    with pytest.raises(UserError, match="varlen on cpu"):
        loaded(folder, attention="varlen")
