"""What a family cannot do is refused with what could."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from models.small_models import SMALL
from transformers import LlamaConfig

from flame.errors import RecipeError
from flame.models.family import ContextPlan, StagePlan
from flame.models.registry import families, family_of
from flame.models.tensor_plan import UNITS
from flame.parallel.mesh import Layout
from flame.parallel.support import WAYS, check_layout, check_lengths

LACKING: dict[str, Any] = {"tensor": None, "context": None, "pipeline": None}
HAS: dict[str, Any] = {
    "pipeline": StagePlan("norm", lambda states, _: states),
    "context": ContextPlan(lambda config: {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_lacks_is_refused(way: str) -> None:
    family = replace(families()[0], **LACKING)
    check_layout(family, None, Layout(replicate=2, shard=4))
    with pytest.raises(RecipeError, match=rf"parallel\.{way}: 2, but {family.name} models"):
        check_layout(family, None, Layout(**{way: 2}))


@pytest.mark.parametrize("way", ["context", "pipeline"])
def test_a_way_that_a_family_has_is_allowed(way: str) -> None:
    check_layout(replace(families()[0], **{way: HAS[way]}), None, Layout(**{way: 2}))


def check_tensor(name: str, ranks: int, **settings) -> None:
    config = type(SMALL[name])(**{**SMALL[name].to_dict(), **settings})
    check_layout(family_of(config), config, Layout(tensor=ranks))


@pytest.mark.parametrize(
    ("name", "settings", "ranks", "words"),
    [
        ("gla", {"num_heads": 4}, 3, ["num_heads is 4", "model.layers.0.attn", "that do: 1, 2, 4"]),
        ("gla-conv-mqa", {}, 2, ["num_kv_heads is 1", "that do: 1"]),
        ("llama", {}, 4, ["num_key_value_heads is 2", "LlamaAttention", "that do: 1, 2"]),
        ("llama", {"intermediate_size": 45}, 2, ["intermediate_size is 45", "LlamaMLP"]),
        ("gated_deltanet-hybrid", {"num_heads": 4}, 4, ["num_heads is 2", "layers.0.attn (Attention)"]),
        ("mamba2", {"n_groups": 2}, 4, ["n_groups = 2", "parallel.shard"]),
        ("hgrn", {"hidden_size": 33}, 2, ["input_dim is 33"]),
        ("transformer", {"vocab_size": 5}, 4, ["vocab_size is 5", "fewer ranks"]),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(
    name: str, settings: dict, ranks: int, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_tensor(name, ranks, **settings)
    assert f"parallel.tensor: {ranks}, but" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_parameter_that_no_plan_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tensor("rwkv7", 2)
    without = replace(UNITS["RWKV7Attention"], shared=("x_r",))
    monkeypatch.setitem(UNITS, "RWKV7Attention", without)
    with pytest.raises(RecipeError, match=r"does not know model\.layers\.0\.attn\.x_w"):
        check_tensor("rwkv7", 2)


def test_rows_that_do_not_divide_over_the_ranks_that_share_them_are_refused() -> None:
    check_lengths([64, 128], Layout(tensor=4, context=2))
    check_lengths([63], Layout(shard=4))
    for layout in (Layout(tensor=2), Layout(context=2)):
        with pytest.raises(RecipeError, match=r"found 65, .* take 64 or 66"):
            check_lengths([64, 65], layout)
    with pytest.raises(RecipeError, match=r"found 3, .* take 4$"):
        check_lengths([4, 3], Layout(context=4))
    with pytest.raises(RecipeError, match=r"found 66, .* take 64 or 68"):
        check_lengths([66], Layout(tensor=2, context=2))


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


def test_context_ranks_share_the_heads_that_a_tensor_rank_has() -> None:
    config = SMALL["qwen3"]  # 4 heads
    check_layout(family_of(config), config, Layout(context=2, tensor=2), "heads")
    check_layout(family_of(config), config, Layout(context=4, tensor=2), "state")
    with pytest.raises(RecipeError, match=r"4 over parallel.tensor = 2; these do: 1, 2"):
        check_layout(family_of(config), config, Layout(context=4, tensor=2), "heads")
