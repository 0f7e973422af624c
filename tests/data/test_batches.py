"""Steps are pure functions of seed and step; packed rows keep tokens, targets and positions; budgets hold."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhibei.config.errors import UserError
from zhibei.data.batches import NOT_LEARNED, Batches, BatchPlan, split_packed, split_padded
from zhibei.data.prepared import PreparedRows


def rows_of(lengths, seed: int = 0) -> PreparedRows:
    random = np.random.default_rng(seed)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = random.integers(0, 1000, borders[-1]).astype(np.int32)
    return PreparedRows(tokens, random.random(borders[-1]) < 0.5, borders, [str(i) for i in range(len(lengths))])


def make(num_rows: int = 50, **changes) -> Batches:
    plan = dataclasses.replace(BatchPlan(global_batch=8, micro_batch_tokens=128, seed=1), **changes)
    return Batches(rows_of(np.random.default_rng(2).integers(2, 60, num_rows)), plan, epochs=2)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_sees_every_row_once_whatever_the_packing(packing):
    batches = make(packing=packing)
    stream = np.concatenate([batches.items_of_step(step) for step in range(batches.num_steps)])
    assert len(stream) == 100
    assert sorted(stream[:50]) == sorted(stream[50:]) == list(range(50))
    assert list(stream[:50]) != list(stream[50:])


def test_a_step_does_not_depend_on_what_was_asked_before():
    batches, again = make(), make()
    backwards = {step: list(again.items_of_step(step)) for step in reversed(range(again.num_steps))}
    assert all(list(batches.items_of_step(step)) == backwards[step] for step in range(batches.num_steps))


def test_seed_and_epoch_change_the_order_and_shuffle_off_keeps_it():
    assert list(make(seed=1).items_of_step(0)) != list(make(seed=2).items_of_step(0))
    assert list(make(shuffle=False).items_of_step(0)) == list(range(8))


def test_steps_from_the_middle_are_the_rest_of_the_steps():
    batches = make()
    all_steps = [(step, [b.row_numbers for b in micro]) for step, micro in batches.steps()]
    rest = [(step, [b.row_numbers for b in micro]) for step, micro in batches.steps(5)]
    assert rest == all_steps[5:]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("pad_multiple", [1, 16])
def test_a_batch_holds_exactly_its_rows(packing, pad_multiple):
    batches = make(packing=packing, pad_multiple=pad_multiple)
    for batch in batches.micro_batches(3):
        tokens, targets = batch.tokens_BT.numpy(), batch.targets_BT.numpy()
        positions = batch.positions_BT.numpy()
        start = 0
        for index, number in enumerate(batch.row_numbers):
            part = slice(int(batches.rows.borders[number]), int(batches.rows.borders[number + 1]))
            expected, learned = batches.rows.tokens[part], batches.rows.supervised[part]
            where = (0, slice(start, start + len(expected))) if packing else (index, slice(0, len(expected)))
            assert (tokens[where] == expected).all()
            assert (positions[where] == np.arange(len(expected))).all()
            assert (targets[where][:-1] == np.where(learned[1:], expected[1:], NOT_LEARNED)).all()
            assert targets[where][-1] == NOT_LEARNED
            start += len(expected)
        if packing:
            assert (targets[0, start:] == NOT_LEARNED).all()
            assert list(np.diff(batch.borders.numpy())) == list(batch.row_lengths)
            assert max(batch.row_lengths) == max(batches.rows.lengths[list(batch.row_numbers)])
        assert batch.num_units == (targets != NOT_LEARNED).sum()
        assert batch.num_tokens == batches.rows.lengths[list(batch.row_numbers)].sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(64, 300))
def test_both_splits_keep_every_row_once_and_the_budget(lengths, budget):
    sizes = np.array(lengths)
    packed, padded = split_packed(sizes, budget), split_padded(sizes, budget)
    for groups in (packed, padded):
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sizes[group].sum() <= budget for group in packed)
    assert all(sizes[group].max() * len(group) <= budget for group in padded)


def test_length_groups_hold_similar_rows_and_still_every_row():
    lengths = np.random.default_rng(0).integers(2, 100, 400)
    plan = BatchPlan(global_batch=8, micro_batch_tokens=1024, packing=False, group_by_length=True)
    grouped = Batches(rows_of(lengths), plan)
    plain = Batches(rows_of(lengths), dataclasses.replace(plan, group_by_length=False))

    def spread(batches: Batches) -> float:
        return float(np.mean([np.ptp(lengths[batches.items_of_step(step)]) for step in range(batches.num_steps)]))

    assert sorted(np.concatenate([grouped.items_of_step(s) for s in range(50)])) == list(range(400))
    assert spread(grouped) < 0.1 * spread(plain)


def test_fewer_rows_than_a_step_takes_is_an_error_that_names_the_remedy():
    with pytest.raises(UserError, match="fewer than one optimiser step") as caught:
        Batches(rows_of([5, 5]), BatchPlan(global_batch=8, micro_batch_tokens=100))
    assert "sft.global_batch" in caught.value.where


def test_a_row_longer_than_the_budget_is_an_error_that_names_the_remedy():
    with pytest.raises(UserError, match="longest row has 50 tokens") as caught:
        Batches(rows_of([50, 5]), BatchPlan(global_batch=1, micro_batch_tokens=49))
    assert "micro_batch_tokens: 50" in caught.value.fix


@pytest.mark.parametrize("packing", [True, False])
def test_items_of_two_rows_are_never_torn_apart_and_bring_their_columns(packing: bool) -> None:
    lengths = [5, 3, 9, 2, 4, 4, 7, 6, 3, 3, 8, 1]
    margins = np.arange(6) / 10
    plan = BatchPlan(global_batch=4, micro_batch_tokens=24, packing=packing, rows_per_item=2, unit="items")
    batches = Batches(rows_of(lengths), plan, epochs=1, columns_I={"margin": margins})
    assert batches.num_items == 6
    assert batches.num_steps == 2
    seen: list[int] = []
    for _, passes in batches.steps():
        for batch in passes:
            firsts, seconds = batch.row_numbers[::2], batch.row_numbers[1::2]
            assert [first + 1 for first in firsts] == list(seconds)
            assert all(first % 2 == 0 for first in firsts)
            assert batch.num_units == len(firsts)
            assert batch.columns_I["margin"].tolist() == [margins[first // 2] for first in firsts]
            assert batch.tokens_BT.numel() <= 24
            seen += firsts
    assert sorted(seen) == [0, 2, 4, 6, 8, 10]
