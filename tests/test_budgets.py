"""Sizes of batches, and items that are dealt into them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.base import budgets
from errata.base.budgets import groups, padded_groups


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 100))
def test_groups_hold_all_in_order_and_no_item_of_the_next_fits(costs, most):
    found = list(groups(costs, most))
    assert [i for group in found for i in group] == list(range(len(costs)))
    for group, following in itertools.pairwise(found):
        assert sum(costs[i] for i in group) + costs[following[0]] > most
    assert all(len(group) == 1 or sum(costs[i] for i in group) <= most for group in found)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), max_size=30), st.integers(1, 200))
def test_padded_groups_hold_all_and_no_more_than_fits_with_padding(items, most):
    lengths, rows = [length for length, _ in items], [count for _, count in items]
    found = list(padded_groups(lengths, most, rows))
    assert sorted(i for group in found for i in group) == list(range(len(items)))
    assert [lengths[i] for group in found for i in group] == sorted(lengths)
    for group in found:
        assert len(group) == 1 or max(lengths[i] for i in group) * sum(rows[i] for i in group) <= most
    for group, following in itertools.pairwise(found):
        assert lengths[following[0]] * (sum(rows[i] for i in group) + rows[following[0]]) > most


def test_there_is_always_room_for_one_prediction(monkeypatch):
    assert budgets.predictions(50257) == 2**26 // 50257
    assert budgets.predictions(10, 35) == 3
    assert budgets.predictions(2**30) == budgets.predictions(10, 0) == 1


@pytest.mark.parametrize(("kind", "tokens"), [("cpu", 512), ("cuda", 16384), ("mps", 16384)])
def test_a_device_of_another_kind_is_sized_like_a_gpu(kind, tokens):
    assert budgets.tokens(torch.device(kind)) == tokens


def test_items_that_fit_into_a_part_of_free_memory(monkeypatch):
    monkeypatch.setattr(budgets, "free_memory", lambda *devices: 1000)
    cpu = torch.device("cpu")
    assert budgets.fitting([cpu], 30) == 8
    assert budgets.fitting([cpu], 30, part=2) == 16
    assert budgets.fitting([cpu], 251) == 0
