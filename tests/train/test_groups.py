"""Every parameter is in one group, and a pattern that means none is answered with names near it."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import RecipeError
from flame.recipe import Recipe, read_recipe
from flame.schema import identity_differences
from flame.train.config import GroupConfig, OptimizerConfig
from flame.train.groups import Group, ParameterGroups, group_parameters

BLOCK = {"attn.q_proj.weight": (8, 8), "attn.conv.weight": (8, 1, 4), "norm.weight": (8,)}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embeddings.weight": (50, 8),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(12)
        for name, shape in [
            ("attn.q_proj.weight", (8, 8)),
            ("attn.conv.weight", (8, 1, 4)),
            ("norm.weight", (8,)),
        ]
    },
    "lm_head.weight": (50, 8),
}
VECTORS = {name for name in SHAPES if "norm" in name}
MATRICES = {name for name in SHAPES if "q_proj" in name}
EMBEDDINGS = {"model.embeddings.weight"}


def grouped(config: OptimizerConfig) -> dict[str, Group]:
    return of_model(config).of


def of_model(config: OptimizerConfig) -> ParameterGroups:
    return group_parameters(config, SHAPES, undecayed=VECTORS, matrices=MATRICES, embeddings=EMBEDDINGS)


def refusal(config: OptimizerConfig) -> str:
    with pytest.raises(RecipeError) as caught:
        grouped(config)
    return str(caught.value)


def test_adamw_decays_all_but_vectors_and_embeddings_where_asked() -> None:
    found = grouped(OptimizerConfig())
    assert {group.optimizer for group in found.values()} == {"adamw"}
    assert {name for name, group in found.items() if group.weight_decay == 0} == VECTORS
    found = grouped(OptimizerConfig(decay_embeddings=False))
    assert {name for name, group in found.items() if group.weight_decay == 0} == VECTORS | EMBEDDINGS


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest_at_its_own_rate() -> None:
    found = grouped(OptimizerConfig(name="muon", learning_rate=0.02, adamw_learning_rate=0.003))
    assert {name for name, group in found.items() if group.optimizer == "muon"} == MATRICES
    assert {group.learning_rate for name, group in found.items() if name in MATRICES} == {0.02}
    assert {group.learning_rate for name, group in found.items() if name not in MATRICES} == {0.003}
    found = grouped(OptimizerConfig(name="muon", learning_rate=0.02))
    assert {group.learning_rate for group in found.values()} == {0.02}


def test_patterns_change_what_they_name_and_the_first_that_matches_counts() -> None:
    config = OptimizerConfig(
        learning_rate=0.01,
        groups=[
            GroupConfig("*.layers.1.*", learning_rate_factor=0.5),
            GroupConfig("*.q_proj.*", name="muon", learning_rate=0.04),
            GroupConfig("*.norm.*", weight_decay=0.3),
        ],
    )
    found = grouped(config)
    matrix, norm = ("model.layers.{}.attn.q_proj.weight", "model.layers.{}.norm.weight")
    assert found[matrix.format(1)] == Group("*.layers.1.*", "adamw", 0.005, 0.1)
    assert found[norm.format(1)] == Group("*.layers.1.*", "adamw", 0.005, 0.0)
    assert found[matrix.format(10)] == Group("*.q_proj.*", "muon", 0.04, 0.1)
    assert found[norm.format(10)] == Group("*.norm.*", "adamw", 0.01, 0.3)
    assert found["lm_head.weight"] == Group("weights", "adamw", 0.01, 0.1)


def test_a_pattern_that_matches_nothing_is_answered_with_names_near_it() -> None:
    text = refusal(OptimizerConfig(groups=[GroupConfig("lm_head.*"), GroupConfig("*.embedding.*")]))
    assert text.startswith("optimizer.groups[1].pattern: no parameter matches '*.embedding.*'; near it: ")
    assert "model.embeddings.weight" in text
    text = refusal(OptimizerConfig(groups=[GroupConfig("model.layers.*.attn.qproj.weight")]))
    assert "model.layers.0.attn.q_proj.weight" in text
    assert text.count("q_proj") == 1, "one of a kind, not one of each layer"
    text = refusal(OptimizerConfig(groups=[GroupConfig("*"), GroupConfig("lm_head.*")]))
    assert "groups[1].pattern: all that 'lm_head.*' matches is in an earlier group, such as lm_head" in text


def test_muon_on_what_is_no_matrix_is_refused_by_name_and_shape() -> None:
    text = refusal(OptimizerConfig(groups=[GroupConfig("*.layers.0.*", name="muon")]))
    assert "model.layers.0.attn.conv.weight has shape (8, 1, 4)" in text
    with pytest.raises(RecipeError, match="this model names none"):
        group_parameters(
            OptimizerConfig(name="muon"), SHAPES, undecayed=VECTORS, matrices=(), embeddings=EMBEDDINGS
        )


PATTERNS = st.sampled_from(["*", "*.weight", "lm_head.*", "*.layers.?.*", "*.norm.*", "*q_proj*", "*.1*.*"])


@given(st.lists(PATTERNS, max_size=4), st.sampled_from(["adamw", "muon", "sgd"]))
def test_every_parameter_is_in_the_group_of_its_first_pattern_or_kind(patterns: list[str], name: str) -> None:
    config = OptimizerConfig(name=name, groups=[GroupConfig(pattern) for pattern in patterns])
    first = {n: next((p for p in patterns if fnmatchcase(n, p)), None) for n in SHAPES}
    if set(patterns) - set(first.values()) or len(set(patterns)) < len(patterns):
        assert "earlier group" in refusal(config)
        return
    found = grouped(config)
    assert found.keys() == SHAPES.keys()
    assert all(group.rule == first[n] for n, group in found.items() if first[n])
    listed = of_model(config).records()
    assert sorted(n for record in listed for n in record["parameters"]) == sorted(SHAPES)
    assert len(of_model(config).table().splitlines()) == 1 + len(listed)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ('[[optimizer.groups]]\npattern = "*"\nname = "muno"', 'found "muno"; did you mean muon?'),
        ('[[optimizer.groups]]\nname = "muon"', "optimizer.groups[0].pattern: missing"),
        ('[[optimizer.groups]]\npattern = "*"\nlearning_rate = -1', "groups[0].learning_rate: found -1.0"),
        (
            '[[optimizer.groups]]\npattern = "*"\nlearning_rate = 1e-3\nlearning_rate_factor = 2',
            "optimizer.groups[0]: give learning_rate or learning_rate_factor, not both",
        ),
        ("ema = 1.0", "optimizer.ema: found 1.0, expected 0 or more and below 1"),
        ("momentum = 1", "optimizer.momentum: found 1.0"),
        ("weight_decay = -0.1", "optimizer.weight_decay: found -0.1"),
        ("[loss]\nz_loss = -1e-4", "loss.z_loss: found -0.0001, expected 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(
    write_recipe, settings: str, told: str
) -> None:
    recipe = write_recipe(replaced={"learning_rate = 3e-3": f"learning_rate = 3e-3\n{settings}"})
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert told in str(caught.value)


def test_a_rate_of_its_own_needs_a_schedule_that_is_not_zero(write_recipe) -> None:
    recipe = write_recipe(replaced={"learning_rate = 3e-3": "learning_rate = 0\nadamw_learning_rate = 1e-3"})
    with pytest.raises(RecipeError, match="learning_rate: found 0, but adamw_learning_rate is not"):
        read_recipe(recipe)


def test_groups_make_another_run(write_recipe) -> None:
    groups = 'learning_rate = 3e-3\n[[optimizer.groups]]\npattern = "*.norm.*"\nweight_decay = 0.2'
    one = read_recipe(write_recipe("one", replaced={"learning_rate = 3e-3": groups}))
    two = read_recipe(write_recipe("two"))
    assert {path for path, *_ in identity_differences(Recipe, one, two)} == {"optimizer.groups"}
    two.optimizer.groups = [GroupConfig("*.norm.*", weight_decay=0.1)]
    assert identity_differences(Recipe, one, two) == [("optimizer.groups[0].weight_decay", 0.2, 0.1)]
