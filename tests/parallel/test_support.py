"""What a family cannot do is refused with what could."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models.small_models import SMALL

from flame.errors import RecipeError
from flame.models.registry import families, family_of
from flame.models.tensor_plan import UNITS
from flame.parallel.mesh import Layout
from flame.parallel.support import WAYS, check_layout, check_lengths

LACKING = {"tensor": None, "context": False, "pipeline": False}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_lacks_is_refused(way: str) -> None:
    family = replace(families()[0], **LACKING)
    check_layout(family, None, Layout(replicate=2, shard=4))
    with pytest.raises(RecipeError, match=rf"parallel\.{way}: 2, but {family.name} models"):
        check_layout(family, None, Layout(**{way: 2}))


@pytest.mark.parametrize("way", ["context", "pipeline"])
def test_a_way_that_a_family_has_is_allowed(way: str) -> None:
    check_layout(replace(families()[0], **{way: True}), None, Layout(**{way: 2}))


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
    with pytest.raises(RecipeError, match=r"found 65, .* take 64 or 66"):
        check_lengths([64, 65], Layout(tensor=2))
