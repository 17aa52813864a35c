"""What a family cannot do is refused with what could."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from models.small_models import SMALL
from transformers import LlamaConfig

from flame.errors import RecipeError
from flame.models.family import ContextPlan
from flame.models.registry import families, family_of
from flame.parallel.mesh import Layout
from flame.parallel.support import WAYS, check_layout, check_rows

HAS: dict[str, Any] = {"tensor": True, "pipeline": True, "context": ContextPlan(lambda config: {})}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_lacks_is_refused(way: str) -> None:
    lacks: dict[str, Any] = {"tensor": False, "pipeline": False, "context": None}
    family = replace(families()[0], **lacks)
    check_layout(family, None, Layout(replicate=2, shard=4))
    with pytest.raises(RecipeError, match=rf"parallel\.{way}: 2, but {family.name} models"):
        check_layout(family, None, Layout(**{way: 2}))


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_has_is_allowed(way: str) -> None:
    check_layout(replace(families()[0], **{way: HAS[way]}), None, Layout(**{way: 2}))


@pytest.mark.parametrize(
    ("name", "ranks", "method", "words"),
    [
        ("gla", 4, "heads", "num_heads, 2; these do: 1, 2"),
        ("gated_deltanet-gva", 3, "heads", "num_v_heads, 4; these do: 1, 2, 4"),
        ("transformer-gqa", 8, "heads", "num_heads, 4"),
        ("kda-hybrid", 4, "heads", "num_heads, 2"),
        ("hgrn", 5, "heads", "hidden_size, 32"),
        ("qwen3", 8, "heads", "num_attention_heads, 4"),
        ("lightnet", 4, "auto", "num_heads, 2; these do: 1, 2"),
        ("lightnet", 2, "state", 'use "heads"'),
    ],
)
def test_context_ranks_that_do_not_divide_are_refused(name: str, ranks: int, method: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_layout(family_of(SMALL[name]), SMALL[name], Layout(context=ranks), method)
    assert words in str(caught.value)


def test_where_the_method_is_open_what_does_not_divide_hands_its_state_on() -> None:
    for name, config in SMALL.items():
        if not name.startswith("lightnet"):
            check_layout(family_of(config), config, Layout(context=7))


def test_rotary_embeddings_that_look_at_a_whole_batch_keep_rows_whole() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = LlamaConfig(rope_parameters=rope)
    with pytest.raises(RecipeError, match="whole: rope_type: found"):
        check_layout(family_of(config), config, Layout(context=2))


@pytest.mark.parametrize(("length", "ranks", "words"), [(65, 2, "64 and 66 can"), (3, 4, "parts; 4 can")])
def test_rows_that_cannot_be_cut_equally_are_refused(length: int, ranks: int, words: str) -> None:
    check_rows([64, 128], Layout(context=2))
    with pytest.raises(RecipeError, match=words):
        check_rows([ranks, length], Layout(context=ranks))
