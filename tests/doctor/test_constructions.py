"""What cannot happen here, shown: options that do not exist, batches of any number, loads that are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.config.run import DataSection, LoraSection, ModelSection, SftSection
from zhibei.data.batches import Batches, BatchPlan, epoch_order
from zhibei.data.prepared import PreparedRows
from zhibei.model.load import Need, load_for_training
from zhibei.train.optimizer import make_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sft.gradient_accumulation_steps=8", "global_batch"),
        ("sft.per_device_train_batch_size=4", "global_batch"),
        ("sft.accimulation_steps=8", "global_batch"),
        ("sft.load_best_model_at_end=true", "keep_best"),
        ("sft.logging_nan_inf_filter=true", "remove it"),
        ("model.device_map=auto", "one device"),
        ("ppo.tis_imp_ratio_cap=2", "remove it"),
        ("data.train_on_inputs=true", "supervise"),
    ],
)
def test_options_of_other_trainers_are_refused_with_what_to_write(option: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {sources: [a.json]}\n")
    with pytest.raises(UserError, match="unknown key") as caught:
        read_run(file, [option])
    assert words in caught.value.fix


def rows_of(lengths: np.ndarray) -> PreparedRows:
    borders = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(borders[-1], dtype=np.int32)
    return PreparedRows(tokens, np.ones_like(tokens, dtype=bool), borders, [f"#{i}" for i in range(len(lengths))])


@pytest.mark.parametrize("global_batch", [1, 3, 7, 11, 13])
def test_any_global_batch_is_cut_into_passes_that_hold_each_row_once(global_batch: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 91)
    batches = Batches(rows_of(lengths), BatchPlan(global_batch=global_batch, micro_batch_tokens=128))
    seen = [
        number for step in range(batches.num_steps) for one in batches.micro_batches(step) for number in one.row_numbers
    ]
    assert sorted(seen) == list(range(91))


def test_groups_of_similar_length_come_in_random_order() -> None:
    lengths = np.random.default_rng(1).integers(2, 400, 3200)
    plan = BatchPlan(global_batch=8, micro_batch_tokens=8192, packing=False, group_by_length=True)
    means = lengths[epoch_order(lengths, plan, 0)].reshape(-1, 8).mean(axis=1)
    window = np.arange(len(means)) % 50
    assert abs(np.corrcoef(window, means)[0, 1]) < 0.2
    sawtooth = np.concatenate([np.sort(part)[::-1] for part in means.reshape(-1, 50)])
    assert np.corrcoef(window, sawtooth)[0, 1] < -0.9


def test_a_stored_inv_freq_changes_nothing_and_a_missing_weight_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    need = Need(device=CPU, precision="fp32", longest_row=64)
    plain = load_for_training(ModelSection(path=str(folder)), LoraSection(), need).hf.state_dict()
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(2)}
    save_file({**tensors, **stored}, weights, metadata={"format": "pt"})
    with_table = load_for_training(ModelSection(path=str(folder)), LoraSection(), need).hf.state_dict()
    assert plain.keys() == with_table.keys()
    assert all(torch.equal(plain[name], with_table[name]) for name in plain)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing, e\.g\. model\.layers\.1\.mlp\.up_proj\.weight"):
        load_for_training(ModelSection(path=str(folder)), LoraSection(), need)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_weight_decay_reaches_matrices_and_nothing_else_in_every_optimizer(name: str) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    matrix, norm = (torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (64,)))
    section = SftSection.model_validate({"optimizer": name, "weight_decay": 0.5})
    optimizer = make_optimizer({"matrix": matrix, "norm": norm}, section)
    zeros = {"matrix": torch.zeros_like(matrix), "norm": torch.zeros_like(norm)}
    optimizer.step(zeros, learning_rate=0.1, scale=1.0)
    assert torch.allclose(matrix, torch.full_like(matrix, 0.95), atol=1e-3)
    assert torch.equal(norm, torch.ones_like(norm))


def test_the_whole_model_lies_on_the_device_of_the_run(tmp_path: Path) -> None:
    need = Need(device=CPU, precision="fp32", longest_row=64)
    model = load_for_training(ModelSection(path=str(tiny_model_folder(tmp_path)), method="lora"), LoraSection(), need)
    assert {tensor.device for tensor in (*model.hf.parameters(), *model.hf.buffers())} == {CPU}


def test_only_answers_are_learned_unless_it_is_said() -> None:
    assert DataSection(sources=["a.json"]).supervise == "answers"
