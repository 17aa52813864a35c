"""Digests of parameters, and what is made of digests that differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flame.train import replicas
from flame.train.replicas import Difference, difference, digest


@given(st.integers(1, 70), st.data())
def test_any_flipped_bit_changes_the_digest_of_a_parameter(length: int, data: st.DataObject) -> None:
    tensor = torch.randn(length)
    flipped = tensor.clone()
    bit = data.draw(st.integers(0, 31))
    mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    flipped.view(torch.int32)[data.draw(st.integers(0, length - 1))] ^= mask
    assert digest(flipped) != digest(tensor)


def test_a_digest_does_not_depend_on_the_pieces_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 11)
    whole = digest(tensor)
    monkeypatch.setattr(replicas, "CHUNK_WORDS", 10)
    assert digest(tensor) == whole
    assert digest(tensor.T.contiguous().T) == whole  # nor on how it lies in memory
    assert digest(torch.zeros(0)) == 0


def test_two_values_that_changed_places_are_another_parameter() -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0])
    assert digest(tensor) != digest(tensor.flip(0))


def test_the_rank_that_differs_from_most_is_named_and_of_two_copies_both_are() -> None:
    sound = {"a[0]": 1, "b[0]": 2}
    other = {"a[1]": 7, "b[1]": 8}  # another shard
    assert difference([sound, sound]) == Difference([], [])
    assert difference([sound, other, sound | {"b[0]": 3}, other, sound, other]) == Difference([2], ["b"])
    assert difference([sound, other, sound, other | {"a[1]": 0}]) == Difference([1, 3], ["a"])
    assert difference([sound, sound | {"a[0]": 5}, sound | {"b[0]": 5}]) == Difference([1, 2], ["a", "b"])
