"""The uniform numbers: their reference values, and what they must not depend on."""

from __future__ import annotations

import torch

from zhibei.generate.draws import _mix, _to_unit, uniform

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> list[int]:
    """SplitMix64 as its authors wrote it, in whole numbers."""
    words = []
    for _ in range(count):
        state = (state + GAMMA) % WORD
        word = state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % WORD
        words.append(word ^ (word >> 31))
    return words


def test_reference_generator_gives_the_published_values():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_draws_equal_the_reference_generator_with_each_rows_key():
    draws_BT = uniform(17, [0, 5], start=0, count=40)
    for draws_T, row in zip(draws_BT, [0, 5], strict=True):
        key = _mix(_mix(17 + GAMMA) + (row + 1) * GAMMA)
        assert draws_T.tolist() == [(word >> 11) * 2.0**-53 for word in splitmix64(key, 40)]


def test_draws_do_not_depend_on_how_they_are_asked_for():
    whole = uniform(3, range(6), start=0, count=100)
    assert torch.equal(uniform(3, [4], start=0, count=100)[0], whole[4])
    assert torch.equal(uniform(3, [2, 1], start=37, count=10), whole[[2, 1], 37:47])


def test_draws_differ_by_seed_row_and_position_and_are_uniform():
    draws_BT = torch.cat([uniform(seed, range(50), start=0, count=200) for seed in (0, 1, 2**63 - 1)])
    assert draws_BT.unique().numel() == draws_BT.numel()
    counts = torch.histc(draws_BT.flatten().float(), bins=10, min=0, max=1)
    expected = draws_BT.numel() / 10
    # chi-square with 9 degrees of freedom is below 27.9 with probability 0.999
    assert ((counts - expected) ** 2 / expected).sum() < 27.9
    assert draws_BT.min() >= 0
    assert draws_BT.max() < 1


def test_largest_word_stays_below_one():
    assert _to_unit(torch.tensor([-1]))[0] == 1 - 2.0**-53
