from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame.data.mixture import next_source

TURN = 100


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=9),
    st.lists(st.integers(1, TURN), min_size=1, max_size=400),
)
def test_every_source_stays_within_a_turn_of_its_share(weights: list[float], turns: list[int]) -> None:
    given_tokens = [0] * len(weights)
    for tokens in turns * 3:
        given_tokens[next_source(given_tokens, weights, TURN)] += tokens
        total = sum(given_tokens)
        for tokens_of_source, weight in zip(given_tokens, weights, strict=True):
            assert abs(tokens_of_source - total * weight / sum(weights)) <= TURN


def test_weight_zero_is_never_chosen() -> None:
    assert all(next_source([n, 0, n], [0.0, 1.0, 0.0], TURN) == 1 for n in range(0, 1000, 100))
