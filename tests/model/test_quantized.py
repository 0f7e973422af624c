"""Bases in few bits: the product is that with the unpacked matrix, nothing is kept twice, nothing is reordered."""

import copy
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("bitsandbytes")

from safetensors.torch import load_file, save_file

from tests.model.test_language_model import LENGTHS, rows
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.run import LoraSection, ModelSection
from zhibei.data.batches import BatchPlan, collate_packed, collate_padded
from zhibei.model.load import Need, load_for_inference, load_for_training
from zhibei.model.quantized import (
    QuantisedLinear,
    held_bytes,
    import_bitsandbytes,
    is_quantized,
    quantised_layers,
    quantization_config,
)
from zhibei.model.savings import checkpoint_activations

CPU = torch.device("cpu")
KINDS: Any = ("int8", "nf4")


def wide_model_folder(folder):
    """Wide enough that scales are few beside the values, and that bitsandbytes' own layer runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder / "wide")
    return folder / "wide"


def trained(folder, kind: Any, *, packing=True, precision="fp32", **lora):
    """A model with adapters that do something: their second matrices begin at zero otherwise."""
    need = Need(CPU, precision, packing=packing, longest_row=64)
    section = ModelSection(path=str(folder), method="qlora", quantize=kind)
    model = load_for_training(section, LoraSection(**lora), need)
    torch.manual_seed(0)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def with_unpacked_base(model):
    """A copy whose packed layers are ordinary fp32 ones that hold the unpacked matrices."""
    plain = copy.deepcopy(model)
    for name, layer in quantised_layers(plain.hf).items():
        ordinary = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        ordinary.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
        if layer.bias is not None:
            ordinary.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(plain.hf.get_submodule(parent), last, ordinary)
    return plain


def gradients(model, batch):
    model.hf.zero_grad()
    (model.hidden(batch) ** 2).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.trainable().items()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_equal_those_on_the_unpacked_base(tmp_path, kind, family):
    model = trained(tiny_model_folder(tmp_path, family=family), kind)
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512))
    plain = with_unpacked_base(model)
    assert not is_quantized(plain.hf)
    torch.testing.assert_close(model.hidden(packed), plain.hidden(packed), atol=1e-5, rtol=1e-4)
    expected = gradients(plain, packed)
    for name, value in gradients(model, packed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(tmp_path, kind):
    folder = tiny_model_folder(tmp_path)
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512))
    expected = gradients(trained(folder, kind), packed)
    for how in ("selective", "full"):
        model = trained(folder, kind)
        checkpoint_activations(model, how)
        for name, value in gradients(model, packed).items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=f"{how} {name}")


def test_int8_errs_by_no_more_than_half_a_step_of_a_row_and_nf4_by_half_its_widest_gap(tmp_path):
    folder = tiny_model_folder(tmp_path)
    plain = dict(load_for_inference(str(folder), device="cpu").inner.named_modules())
    for kind in KINDS:
        for name, layer in quantised_layers(load_for_inference(str(folder), device="cpu", quantize=kind).inner).items():
            matrix = plain[name].weight
            error = (layer.weight - matrix).abs()
            if kind == "int8":
                # The matrix passes through fp16 on its way, whose rounding is 2^-11 of a value.
                assert bool((error <= matrix.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-10)).all()), name
            else:
                largest = matrix.reshape(-1, 64).abs().amax(1, keepdim=True)
                # The widest gap of the NF4 code is 0.304; scales are rounded to 8 bits on top.
                assert bool((error.reshape(-1, 64) <= largest * 0.17 + 0.02).all()), name


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_equal_padded_rows_and_rows_alone(tmp_path, kind):
    folder = tiny_model_folder(tmp_path)
    plan, numbers = BatchPlan(8, 512, pad_multiple=16), list(range(len(LENGTHS)))
    packed, padded = collate_packed(rows(), numbers, plan), collate_padded(rows(), numbers, plan)
    model, plain = trained(folder, kind), trained(folder, kind, packing=False)
    with torch.no_grad():
        together_ND = model.hidden(packed)
        beside_BTD = plain.hidden(padded).view(*padded.tokens_BT.shape, -1)
    start = 0
    for number, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            together_ND[start : start + length], beside_BTD[number, :length], atol=2e-5, rtol=1e-4
        )
        start += length


def test_a_base_takes_the_bytes_its_bits_say(tmp_path):
    folder = wide_model_folder(tmp_path)
    values = {
        name: module.weight.numel()
        for name, module in load_for_inference(str(folder), device="cpu").inner.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    sizes: Any = (("int8", 8, 32 / 128), ("nf4", 4, 8 / 64 + 32 / (64 * 256)))
    for kind, bits, scale_bits in sizes:
        layers = quantised_layers(load_for_inference(str(folder), device="cpu", quantize=kind).inner)
        assert layers.keys() == values.keys()
        for name, layer in layers.items():
            large = sum(part.numel() * part.element_size() for part in layer.parts if part.numel() > 256)
            small = sum(part.numel() * part.element_size() for part in layer.parts if part.numel() <= 256)
            assert large + small <= values[name] * (bits + 2 * scale_bits) / 8 + 1100, name
            assert large >= values[name] * bits / 8


def test_head_embeddings_and_norms_stay_as_they_are(tmp_path):
    model = load_for_inference(str(tiny_model_folder(tmp_path)), device="cpu", precision="bf16", quantize="nf4")
    plain = [name for name, parameter in model.inner.named_parameters()]
    assert "lm_head.weight" in plain
    assert "model.embed_tokens.weight" in plain
    assert not any("proj" in name for name in plain)
    assert {parameter.dtype for parameter in model.inner.parameters()} == {torch.bfloat16}
    assert held_bytes(model.inner) < 0.6 * held_bytes(
        load_for_inference(str(tmp_path / "tiny-llama"), device="cpu", precision="fp32").inner
    )


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_adapters_follow_the_type_of_the_run(tmp_path, kind):
    model = trained(tiny_model_folder(tmp_path), kind, precision="bf16")
    assert {parameter.dtype for parameter in model.trainable().values()} == {torch.bfloat16}
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512))
    assert model.hidden(packed).dtype == torch.bfloat16


def test_evaluation_changes_no_weight_though_bitsandbytes_own_layer_does(tmp_path):
    """On AVX512-BF16 the library's layer reorders its matrix when it runs without gradients."""
    bitsandbytes = import_bitsandbytes()
    folder = wide_model_folder(tmp_path)
    model = load_for_inference(str(folder), device="cpu", quantize="nf4")
    before = {name: layer.weight.clone() for name, layer in quantised_layers(model.inner).items()}
    with torch.no_grad():
        model.inner(torch.arange(5, 40)[None])
    assert all(torch.equal(before[name], layer.weight) for name, layer in quantised_layers(model.inner).items())
    theirs = bitsandbytes.nn.Linear4bit(128, 256, bias=False, quant_type="nf4").to("cpu")
    if not theirs.support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16")
    unpack = bitsandbytes.functional.dequantize_4bit
    matrix = unpack(theirs.weight.data, theirs.weight.quant_state).clone()
    with torch.no_grad():
        theirs.eval()(torch.randn(3, 128))
    after = unpack(theirs.weight.data.reshape(-1, 1), theirs.weight.quant_state)
    assert after.shape != matrix.shape or not torch.allclose(after.float(), matrix.float(), atol=1e-3), (
        "the library mended this"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_with_nan_is_refused_though_quantising_hides_it(tmp_path, kind):
    folder = tiny_model_folder(tmp_path)
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity"):
        load_for_inference(str(folder), device="cpu", quantize=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_stored_in_few_bits_is_used_as_it_is(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(tmp_path)
    stored = tmp_path / "stored"
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(kind), device_map={"": "cpu"}, dtype=torch.float32
    )
    model.save_pretrained(stored)
    tokens = torch.arange(5, 40)[None]
    read = load_for_inference(str(stored), device="cpu").inner(tokens).logits
    assert torch.equal(read, load_for_inference(str(folder), device="cpu", quantize=kind).inner(tokens).logits)
    need = Need(CPU, "fp32", packing=False, longest_row=64)
    assert is_quantized(load_for_training(ModelSection(path=str(stored), method="lora"), LoraSection(), need).hf)
    with pytest.raises(UserError, match="trains every weight"):
        load_for_training(ModelSection(path=str(stored)), LoraSection(), need)
    other: Any = {"int8": "nf4", "nf4": "int8"}[kind]
    with pytest.raises(UserError, match=f"are stored as {kind}"):
        load_for_inference(str(stored), device="cpu", quantize=other)


def test_other_kinds_of_stored_weights_are_refused_by_name(tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(tiny_model_folder(tmp_path), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="stored quantised as gptq"):
        load_for_inference(str(folder), device="cpu")


def test_a_packed_layer_cannot_be_trained_in_full_beside_the_adapters(tmp_path):
    folder = tiny_model_folder(tmp_path)
    with pytest.raises(UserError, match="down_proj is a layer whose weights are held in few bits"):
        trained(folder, "nf4", modules_to_save=["down_proj"])
    assert trained(folder, "nf4", modules_to_save=["embed_tokens"]).trainable()


def test_weight_decomposed_adapters_see_the_unpacked_matrix(tmp_path):
    model = trained(tiny_model_folder(tmp_path), "nf4", dora=True)
    packed = collate_packed(rows(), [1], BatchPlan(8, 512))
    expected = gradients(with_unpacked_base(model), packed)
    for name, value in gradients(model, packed).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_keep_no_unpacked_matrix(tmp_path, kind):
    """Traced as the compiler does it, without making kernels: one graph per layer, and only activations are kept."""
    folder = tiny_model_folder(tmp_path)
    packed = collate_packed(rows(), list(range(len(LENGTHS))), BatchPlan(8, 512, pad_multiple=16))
    expected = gradients(trained(folder, kind), packed)
    model = trained(folder, kind)
    matrices = {tuple(layer.weight.shape) for layer in quantised_layers(model.hf).values()}
    for layer in model.layers():
        layer.compile(backend="aot_eager_decomp_partition")
    kept = []

    def note(tensor):
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = gradients(model, packed)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3, msg=name)
    unpacked = [(dtype, shape) for dtype, shape in kept if dtype.is_floating_point and shape in matrices]
    adapters = {tuple(parameter.shape) for parameter in model.trainable().values()}
    assert [shape for _, shape in unpacked if shape not in adapters] == []
    assert any(shape in {tuple(part.shape) for part in layer.parts} for layer in quantised_layers(model.hf).values()
               for _, shape in kept)  # fmt: skip


def test_the_cost_of_a_packed_product_is_counted(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    layer: QuantisedLinear = next(
        iter(quantised_layers(load_for_inference(str(tiny_model_folder(tmp_path)), quantize="nf4").inner).values())
    )
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(3, 7, layer.in_features))
    assert counter.get_total_flops() == 2 * 21 * np.prod([layer.in_features, layer.out_features])


def test_rows_that_are_no_whole_number_of_blocks_get_their_own_scales():
    """The library's reader for processors with AVX512 takes others; ours is held to the code book, value by value."""
    bitsandbytes = import_bitsandbytes()
    torch.manual_seed(0)
    for shape in ((64, 96), (32, 32), (300, 100), (128, 128)):
        matrix = torch.randn(shape)
        packed, state = bitsandbytes.functional.quantize_4bit(matrix, quant_type="nf4")
        layer = QuantisedLinear([packed, state.absmax], how="nf4 64", shape=shape, dtype=torch.float32)
        codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        expected = state.code[codes] * state.absmax.repeat_interleave(64)[: matrix.numel()]
        torch.testing.assert_close(layer.weight, expected.view(shape), atol=1e-6, rtol=1e-5)
        assert (layer.weight - matrix).norm() < 0.1 * matrix.norm()
