"""Described machines: every way a person or a driver writes a card, and what is refused with which words."""

from __future__ import annotations

import pytest

from zhibei.config.errors import UserError
from zhibei.plan.cards import CARDS, card_of, known_card
from zhibei.plan.described import machine_from
from zhibei.plan.machines import parse_machine


@pytest.mark.parametrize(
    ("text", "name", "num_gpus", "capability"),
    [
        ("v100-32g:4", "v100-32g:4", 4, (7, 0)),
        ("V100-32GB:4", "v100-32g:4", 4, (7, 0)),
        ("a100-40g:4", "a100-40g:4", 4, (8, 0)),
        ("A100-80GB:2", "a100-80g:2", 2, (8, 0)),
        ("a100-80", "a100-80g", 1, (8, 0)),
        ("rtx4090", "rtx4090", 1, (8, 9)),
        ("RTX 4090", "rtx4090", 1, (8, 9)),
        ("4090", "rtx4090", 1, (8, 9)),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 1, (8, 9)),
        ("geforce-rtx-3090:2", "rtx3090:2", 2, (8, 6)),
        ("t4", "t4", 1, (7, 5)),
        ("Tesla T4", "t4", 1, (7, 5)),
        ("1080ti", "rtx1080ti", 1, (6, 1)),
        ("GTX 1080 Ti", "rtx1080ti", 1, (6, 1)),
        ("h100", "h100-80g", 1, (9, 0)),
        ("h100-pcie", "h100-80g-pcie", 1, (9, 0)),
        ("h100-80g:8x2", "h100-80g:8x2", 16, (9, 0)),
        ("2xv100-32g", "v100-32g:2", 2, (7, 0)),
        ("4 x v100-32g", "v100-32g:4", 4, (7, 0)),
        ("v100-32g x4", "v100-32g:4", 4, (7, 0)),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", 1, (8, 0)),
        ("NVIDIA H100 80GB HBM3", "h100-80g", 1, (9, 0)),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada", 1, (8, 9)),
        ("rtxa6000", "a6000", 1, (8, 6)),
        ("RTX 4070 Ti", "rtx4070ti", 1, (8, 9)),
        ("rtx4090-laptop", "rtx4090laptop", 1, (8, 9)),
        ("mi300x:8", "mi300x:8", 8, (9, 4)),
        ("  L40S : 4 ", "l40s:4", 4, (8, 9)),
        ("4060ti-16g", "rtx4060ti-16g", 1, (8, 9)),
    ],
)
def test_a_machine_is_read_however_it_is_written(text, name, num_gpus, capability):
    machine = parse_machine(text)
    assert (machine.name, machine.num_gpus, machine.gpus[0].capability) == (name, num_gpus, capability)
    assert machine.is_described


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.key}-{card.form}")
def test_the_key_of_every_card_reads_back_to_it(card):
    assert card_of(card.key) == card
    assert 0.85 * card.size_gb < card.memory_gib < card.size_gb


def test_a_machine_without_cards():
    assert parse_machine("CPU").gpus == ()
    machine = parse_machine("cpu-64g:16")
    assert (machine.host_gib, machine.cpu_cores) == (64.0, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v100", ("16 GB or 32 GB", "v100-16g or v100-32g")),
        ("a100:4", ("40 GB or 80 GB", "a100-40g or a100-80g")),
        ("a100-32g", ("no a100 with 32 GB", "a100-40g or a100-80g")),
        ("a101-40g", ("no card called", "or a100")),
        ("rtx4091", ("no card called", "rtx4090")),
        ("v100-32g:0", ("numbers of cards", "1 to 16")),
        ("v100-32g:four", ("numbers of cards",)),
        ("v100-32g:4:4", ("numbers of cards",)),
        ("v100-32g:-1", ("numbers of cards",)),
        ("2xv100-32g:4", ("twice",)),
        ("t4-sxm", ("no t4 as sxm",)),
        ("", ("empty",)),
        ("cpu:0", ("numbers of cards",)),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(text, words):
    with pytest.raises(UserError) as caught:
        parse_machine(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "memory_gib", "key"),
    [
        ("Tesla V100-SXM2-32GB", 31.74, "v100-32g"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx4060ti-16g"),
        ("NVIDIA GH200 480GB", 94.5, "gh200-96g"),
        ("AMD Instinct MI250X / MI250", 63.98, "mi250x"),
        ("Some Card 9", 8.0, None),
    ],
)
def test_a_driver_s_name_and_memory_find_the_card(name, memory_gib, key):
    card = known_card(name, memory_gib)
    assert (card and card.key) == key


def test_a_yaml_machine_overrides_what_is_assumed():
    machine = machine_from(
        {
            "card": "v100-32g",
            "gpus": 4,
            "cores": 40,
            "host_memory": "512 GiB",
            "shared_memory": "64GB",
            "disk_free": "2TB",
        },
        where="box.yaml",
    )
    assert (machine.num_gpus, machine.cpu_cores, machine.host_gib) == (4, 40, 512.0)
    assert machine.shared_memory_gib == pytest.approx(59.6, abs=0.1)
    assert machine.disk_free_gib == pytest.approx(1862.6, abs=0.1)
    assert machine.host_free_gib == pytest.approx(460.8)
    assert machine.gpu_link == "nvlink"


def test_a_yaml_machine_can_mix_cards_and_describe_unknown_ones():
    machine = machine_from(
        {"card": ["a100-40g", {"name": "X9", "memory": 20, "capability": "8.6", "half_tflops": 80}]}, where="box.yaml"
    )
    assert [gpu.name for gpu in machine.gpus] == ["A100-40G", "X9"]
    assert machine.smallest_gpu is not None
    assert machine.smallest_gpu.capability == (8, 6)
    assert machine_from({"host_memory": 16, "cores": 4}, where="box.yaml").gpus == ()


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"card": "v100-32g", "gpu": 4}, ("box.yaml", "unknown field gpu", "gpus")),
        ({"card": "v100-32g", "num_gpus": 4}, ("unknown field num_gpus", "did you mean gpus")),
        ({"card": "v100-32g", "gpus": "4"}, ("box.yaml", "gpus: '4'", "whole number")),
        ({"card": "v100-32g", "gpus": -1}, ("gpus: -1",)),
        ({"card": "v100-32g", "gpus": True}, ("gpus: True",)),
        ({"gpus": 4}, ("card is missing",)),
        ({"card": "v10-32g"}, ("no card called", "field card")),
        ({"card": "v100-32g", "host_memory": "lots"}, ("host_memory: 'lots'", "512 GiB")),
        ({"card": "v100-32g", "host_memory": 64, "host_free": 100}, ("host_free", "64")),
        ({"card": {"name": "X9", "memory": 20}}, ("no card called 'X9'",)),
        ({"card": {"memory": 20}}, ("card.capability is missing",)),
        ({"card": {"name": "X9", "memory": 20, "capability": "seven"}}, ("card.capability: 'seven'",)),
        ({"card": {"nam": "X9"}}, ("unknown field card.nam", "name")),
        ({"card": "t4", "gpu_link": "nvlnk"}, ("gpu_link: 'nvlnk'", "nvlink, pcie or none")),
        ({"card": ["t4", "t4"], "gpus": 3}, ("gpus: 3", "2, the length")),
        ({}, ("description of a machine",)),
        ([1], ("description of a machine",)),
        (None, ("description of a machine",)),
    ],
)
def test_a_wrong_yaml_machine_names_file_field_and_remedy(mapping, words):
    with pytest.raises(UserError) as caught:
        machine_from(mapping, where="box.yaml")
    for word in ("box.yaml", *words):
        assert word in str(caught.value)


def test_lines_of_the_file_are_named():
    with pytest.raises(UserError) as caught:
        machine_from({"card": "v100-32g", "gpus": 0.5}, where="box.yaml", lines={"gpus": 2})
    assert caught.value.where == "box.yaml:2"
