"""What is written is what was meant: types, bytes, parts, importance matrices, adapters, and the proof of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.making import adapter_folder, with_adapter
from tests.shared_data import shared_path
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.export.gguf.export import export_gguf
from zhibei.export.gguf.hand_over import Wanted, faithful_probes, hand_over_gguf
from zhibei.export.gguf.importance import Importance, measure_importance, read_importance
from zhibei.export.gguf.kinds import BLOCK_BYTES, BLOCKS, KINDS, PLAIN, Shape, find_kind, fitting, types_of
from zhibei.export.gguf.quantizer import IN_NUMPY, quantizer, tried_ggml, with_ggml
from zhibei.export.gguf_side import GgufSide, parts_of
from zhibei.export.hand_over import Proving
from zhibei.export.probes import Probes
from zhibei.generate.llama_cpp import GgufModel
from zhibei.text.messages import Message

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


def _values(rows: int = 8, width: int = 512) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, width)).astype(np.float32)


def test_the_size_of_every_type_is_that_of_the_library() -> None:
    for name, num_bytes in BLOCK_BYTES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (BLOCKS.get(name, 256), num_bytes)
    for kind in KINDS.values():
        assert {entry.value for entry in gguf.LlamaFileType} >= {kind.number}


@pytest.mark.parametrize("name", IN_NUMPY[:2])
def test_bytes_equal_those_of_the_package_gguf(name: str) -> None:
    expected = gguf.quants.quantize(_values(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(with_ggml(name, _values()), expected)


@pytest.mark.parametrize(
    ("name", "worst"),
    [
        ("Q8_0", 0.006),
        ("Q6_K", 0.02),
        ("Q5_K", 0.04),
        ("Q4_K", 0.08),
        ("Q3_K", 0.16),
        ("IQ4_XS", 0.08),
        ("IQ3_S", 0.18),
    ],
)
def test_quantised_values_come_back_near(name: str, worst: float) -> None:
    back = gguf.quants.dequantize(with_ggml(name, _values()), gguf.GGMLQuantizationType[name])
    assert np.sqrt(np.mean((back - _values()) ** 2)) < worst


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    weights = np.ones(512, dtype=np.float32)
    weights[:256:2] = 100.0
    number = gguf.GGMLQuantizationType["Q4_K"]

    def errors(importance: np.ndarray | None) -> np.ndarray:
        return (gguf.quants.dequantize(with_ggml("Q4_K", _values(), importance), number) - _values()) ** 2

    assert (errors(weights) * weights).mean() < (errors(None) * weights).mean()


def test_another_build_of_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tried_ggml.cache_clear()
    monkeypatch.setattr("zhibei.export.gguf.quantizer.with_ggml", lambda name, values: np.zeros((4, 8), np.uint8))
    monkeypatch.setattr("zhibei.export.gguf.quantizer.WORST_ERROR", {})
    with pytest.raises(UserError, match="gives other bytes than the package gguf"):
        tried_ggml()
    tried_ggml.cache_clear()


def test_without_the_engine_numpy_writes_the_plain_types_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zhibei.export.gguf.quantizer.is_installed", lambda: False)
    for name in (*PLAIN, "Q8_0"):
        assert quantizer(name)(_values(), None).dtype == np.uint8
    with pytest.raises(UserError, match=r"zhibei\[gguf\]"):
        quantizer("Q4_K")


def _seven_b(**changes: Any) -> tuple[dict[str, tuple[int, ...]], Shape]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (32000, 4096), "output.weight": (32000, 4096)}
    for layer in range(32):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{layer}.{part}.weight"] = (4096, 4096)
        tensors[f"blk.{layer}.ffn_gate.weight"] = tensors[f"blk.{layer}.ffn_up.weight"] = (11008, 4096)
        tensors[f"blk.{layer}.ffn_down.weight"] = (4096, 11008)
        tensors[f"blk.{layer}.attn_norm.weight"] = (4096,)
    return tensors, Shape("llama", 32, 1, is_tied=False, **changes)


def test_the_mixture_of_q4_k_m_is_that_of_published_7b_files() -> None:
    """LLaMA 7B in Q4_K_M: 225 matrices, of them 33 in Q6_K: the output, 16 values and 16 downs; 4.08 GB."""
    tensors, shape = _seven_b()
    types = types_of(find_kind("q4_k_m"), tensors, shape)
    six = [name for name, kind in types.items() if kind == "Q6_K"]
    assert len(six) == 33
    assert "output.weight" in six
    assert types["token_embd.weight"] == "Q4_K"
    assert [int(name.split(".")[1]) for name in six if "attn_v" in name] == [
        0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31,
    ]  # fmt: skip
    num_bytes = sum(
        int(np.prod(tensors[name])) // BLOCKS.get(kind, 256) * BLOCK_BYTES[kind] for name, kind in types.items()
    )
    assert num_bytes == pytest.approx(4.08e9, rel=0.01)


def test_rows_that_are_no_multiple_of_a_block_fall_back_as_in_llama_cpp() -> None:
    assert [fitting(name, 192) for name in ("Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ4_XS")] == [
        "Q5_0", "Q5_1", "Q8_0", "Q4_0", "IQ4_NL",
    ]  # fmt: skip
    assert fitting("Q4_K", 172) == "F16"
    assert fitting("Q8_0", 64) == "Q8_0"


def test_a_tied_embedding_gets_the_type_of_the_output() -> None:
    shape = Shape("llama", 4, 1, is_tied=True)
    assert types_of(find_kind("Q4_K_M"), {"token_embd.weight": (32000, 4096)}, shape) == {"token_embd.weight": "Q6_K"}


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_greedy_text_of_real_models_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = shared_path("data", "models", name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([[1]]), do_sample=False, max_new_tokens=60, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    for made in export_gguf(str(folder), tmp_path, types=["F32", "F16"]):
        with GgufModel.load(made.paths[0]) as engine:
            context, said = engine.open(context_tokens=128), [1]
            for _ in range(60):
                said.append(int(context.feed([said[-1]])[0].argmax()))
        assert said == expected


def test_parts_are_read_as_the_whole(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    (whole,) = export_gguf(str(folder), tmp_path / "whole.gguf", types=["F16"])
    (split,) = export_gguf(str(folder), tmp_path / "split", types=["F16"], split_bytes=20_000)
    assert len(split.paths) > 2
    assert split.paths[0].name.endswith(f"-00001-of-{len(split.paths):05d}.gguf")
    assert parts_of(split.paths[0]) == list(split.paths)
    row = list(range(4, 40))
    sides = [GgufSide(whole.paths[0]), GgufSide(split.paths[0])]
    one, other = (side.logits([row])[0] for side in sides)
    for side in sides:
        side.close()
    assert np.array_equal(one, other)


def test_an_adapter_is_merged_while_it_is_read(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path)
    adapter = adapter_folder(base, tmp_path / "adapter", size=0.02)
    (made,) = export_gguf(str(adapter), tmp_path / "out.gguf", types=["F32"])
    row = list(range(4, 40))
    with torch.no_grad():
        expected = with_adapter(base, adapter)(torch.tensor([row])).logits[0].numpy()
    side = GgufSide(made.paths[0])
    found = side.logits([row])[0]
    side.close()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("targets", "num_matrices"), [(["q_proj", "lm_head"], 2), (["q_proj", "embed_tokens"], 2), (["q_proj"], 1)]
)
def test_an_adapter_on_one_half_of_a_tied_embedding_makes_two_matrices(
    targets: list[str], num_matrices: int, tmp_path: Path
) -> None:
    base = tiny_model_folder(tmp_path, family="qwen2")
    adapter = adapter_folder(base, tmp_path / "adapter", size=0.05, target_modules=targets)
    (made,) = export_gguf(str(adapter), tmp_path / "out.gguf", types=["F32"])
    names = [tensor.name for tensor in gguf.GGUFReader(made.paths[0]).tensors]
    assert ("output.weight" in names) + ("token_embd.weight" in names) == num_matrices
    row = list(range(4, 40))
    with torch.no_grad():
        expected = with_adapter(base, adapter)(torch.tensor([row])).logits[0].numpy()
    side = GgufSide(made.paths[0])
    found = side.logits([row])[0]
    side.close()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_folder(tmp_path)
    monkeypatch.setattr("zhibei.store.files.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="too full"):
        export_gguf(str(folder), tmp_path / "out", types=["F16"])
    assert list((tmp_path / "out").iterdir()) == []


def test_an_importance_matrix_is_the_mean_square_of_what_a_layer_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [[1, 5, 6, 7], [1, 8, 9]]
    found = measure_importance(model, rows, source="two rows")
    assert found.num_tokens == 7
    assert any("7 tokens only" in note for note in found.notes)
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    handle.remove()
    expected = torch.cat(seen).square().mean(dim=0).numpy()
    np.testing.assert_allclose(found.means["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    found.save(tmp_path / "imatrix.gguf")
    again = read_importance(tmp_path / "imatrix.gguf")
    assert set(again.means) == set(found.means)
    assert again.source == "two rows"
    np.testing.assert_allclose(again.means["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    with pytest.raises(UserError, match="exists already"):
        found.save(tmp_path / "imatrix.gguf")


def test_a_matrix_of_another_model_and_a_type_that_needs_one_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    with pytest.raises(UserError, match="IQ3_S needs an importance matrix"):
        export_gguf(str(folder), tmp_path / "out", types=["iq3_s"])
    other = Importance({"blk.0.ffn_down.weight": np.ones(7, dtype=np.float32)}, 10, 1, "elsewhere")
    with pytest.raises(UserError, match="7 columns"):
        export_gguf(str(folder), tmp_path / "out", types=["q4_k_m"], imatrix=other)
    with pytest.raises(UserError, match="not a readable GGUF file"):
        read_importance(folder / "config.json")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    export_gguf(str(folder), tmp_path / "out.gguf")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(str(folder), tmp_path / "out.gguf")
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-4:] = b"\xff\xff\xff\x7f"
    weights.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="NaN"):
        export_gguf(str(folder), tmp_path / "again" / "out.gguf")
    assert list((tmp_path / "again").iterdir()) == []
    with pytest.raises(UserError, match="no GGUF type is called"):
        export_gguf(str(folder), tmp_path / "x", types=["q9_k"])
    with pytest.raises(UserError, match="2 types do not fit into one file"):
        export_gguf(str(folder), tmp_path / "x.gguf", types=["q8_0", "f16"])


def _text(tmp_path: Path) -> Proving:
    path = tmp_path / "heldout.txt"
    path.write_text("USER: What is the capital of France? ASSISTANT: The capital of France is Paris. " * 4)
    return Proving(text=path)


def test_a_file_is_handed_over_with_its_proof(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    wanted = Wanted(types=("F16", "BF16"))
    made = hand_over_gguf(str(folder), out=tmp_path / "gguf", wanted=wanted, proving=_text(tmp_path))
    names = {path.name for path in made.path.iterdir()}
    assert {"tiny-llama-F16.gguf", "tiny-llama-BF16.gguf", "parity-F16.json", "Modelfile.BF16"} <= names
    report = made.reports[0]
    assert report is not None
    assert report.tokenizer.is_whole
    assert report.kl_mean < 1e-3
    assert all(path.is_file() for one in made.files for path in one.paths)


def test_a_template_that_was_asked_for_is_the_one_compared(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    wanted = Wanted(types=("F16",), template="vicuna_v1.1")
    made = hand_over_gguf(str(folder), out=tmp_path / "gguf", wanted=wanted, proving=_text(tmp_path))
    report = made.reports[0]
    assert report is not None
    assert report.template.is_whole
    assert "ASSISTANT:" in (made.path / "Modelfile").read_text()


def test_a_file_beyond_its_limits_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_folder(tmp_path)
    monkeypatch.setattr("zhibei.export.gguf.families.interleaved", lambda values, heads: values)
    with pytest.raises(UserError, match="is not the model"):
        hand_over_gguf(str(folder), out=tmp_path / "gguf", wanted=Wanted(types=("F16",)), proving=_text(tmp_path))
    assert not (tmp_path / "gguf").exists()


def test_an_imatrix_of_a_text_is_made_and_used(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the cat and the dog went to the house. " * 100)
    wanted = Wanted(types=("IQ4_XS",), imatrix_text=text)
    how = Proving(is_wanted=False)
    made = hand_over_gguf(str(folder), out=tmp_path / "gguf", wanted=wanted, proving=how)
    assert (made.path / "imatrix.gguf").is_file()
    with GgufModel.load(made.files[0].paths[0]) as model:
        assert model.value_of("quantize.imatrix.dataset") == str(text)


def test_texts_that_a_tokenizer_rewrites_are_no_probes() -> None:
    from zhibei.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_path("data", "models", "stories260K")))
    asked = Probes(["two  spaces", "one space"], [[Message("user", "  two")], [Message("user", "one")]])
    kept = faithful_probes(tokenizer, asked)
    assert kept == Probes(["one space"], [[Message("user", "one")]])
