"""Recipes: TOML and flags to dataclasses and back, with errors that name the place."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame import schema
from flame.errors import RecipeError
from flame.recipe import Recipe, read_recipe
from flame.schema import Duration, FlagText, parse_count, parse_duration, section, setting


@dataclass
class Inner:
    rate: float = setting(0.5, help="a rate", identity=True)
    count: int = setting(7, help="a count", identity=True, parse=parse_count)
    name: str | None = setting(None, help="a name", identity=False)
    kind: str = setting("red", help="a kind", identity=True, choices=("red", "green"))
    loud: bool = setting(False, help="a switch", identity=False)
    every: Duration = setting(
        Duration(1, "steps"), help="how often", identity=False, parse=parse_duration("steps", "tokens")
    )


@dataclass
class Item:
    name: str = setting(help="a name", identity=True)


@dataclass(kw_only=True)
class Outer:
    inner: Inner = section(Inner)
    items: list[Item] = setting([], help="some items", identity=True)


def build(raw: dict[str, Any]) -> Outer:
    return schema.build(Outer, raw, "r.toml")


@pytest.mark.parametrize(
    ("text", "value"), [(3, 3), ("3", 3), ("512Ki", 2**19), ("1.5M", 1_500_000), ("10B", 10**10)]
)
def test_counts_take_suffixes(text: Any, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "ten", "1.5", "-3", "3 apples", True, 1.5])
def test_other_counts_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(text)


def test_durations_carry_their_unit() -> None:
    parse = parse_duration("steps", "tokens")
    assert parse("1 step") == Duration(1, "steps")
    assert parse("8B tokens") == Duration(8 * 10**9, "tokens")
    assert Duration(1000, "tokens").steps(tokens_per_step=300) == 4
    with pytest.raises(ValueError, match="steps, tokens"):
        parse("3 minutes")
    with pytest.raises(ValueError, match="steps, tokens"):
        parse(100)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"inner": {"raet": 1.0}}, ["r.toml", "inner.raet", "did you mean rate", "count"]),
        ({"inner": {"count": "ten"}}, ["inner.count", '"ten"', "512Ki"]),
        ({"inner": {"rate": "fast"}}, ["inner.rate", '"fast"', "a number"]),
        ({"inner": {"kind": "gren"}}, ["inner.kind", "did you mean green", "red, green"]),
        ({"inner": 3}, ["inner", "table"]),
        ({"items": [{}]}, ["items[0].name", "missing", "a name"]),
        ({"items": {"name": "x"}}, ["items", "[[items]]"]),
        ({"inner": {"loud": 1}}, ["inner.loud", "true or false"]),
    ],
)
def test_errors_name_place_found_and_allowed(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        build(raw)
    for word in words:
        assert word in str(caught.value)


def test_flags_take_the_type_of_their_field() -> None:
    flags = {"inner.rate": "2e-3", "inner.count": "4Ki", "inner.name": "12", "inner.loud": "true"}
    made = build(schema.apply_flags({"inner": {"rate": 1.0, "kind": "green"}}, flags)).inner
    assert (made.rate, made.count, made.name, made.loud, made.kind) == (2e-3, 4096, "12", True, "green")
    assert schema.parse_strings(FlagText('["a", "b"]')) == ["a", "b"]


@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    count=st.integers(0, 2**40),
    name=st.none() | st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r")),
    items=st.lists(st.text("abc", min_size=1), max_size=3),
)
def test_a_config_written_is_read_back_equal(
    rate: float, count: int, name: str | None, items: list[str]
) -> None:
    if name in ("none", "None"):
        return
    made = Outer(inner=Inner(rate, count, name), items=[Item(i) for i in items])
    assert build(schema.tomllib.loads(schema.to_toml(made))) == made


def test_only_identity_fields_make_another_run() -> None:
    one = build({"inner": {"rate": 1.0}, "items": [{"name": "a"}]})
    two = build({"inner": {"rate": 2.0, "name": "x", "loud": True}, "items": [{"name": "b"}]})
    found = schema.identity_differences(Outer, one, two)
    assert found == [("inner.rate", 1.0, 2.0), ("items[0].name", "a", "b")]
    three = build({"items": []})
    assert schema.identity_differences(Outer, one, three)[-1] == ("items", "1 of them", "0 of them")


def test_every_setting_of_a_recipe_is_explained() -> None:
    for leaf in schema.leaves(Recipe):
        assert len(leaf.help) > 5, leaf.path


def test_a_recipe_needs_one_length(tmp_path: Path) -> None:
    base = (
        '[run]\ndirectory = "r"\n{}\n[model]\nconfig = "c.json"\n[tokenizer]\npath = "t"\n[data]\n'
        'sequence_length = 8\n[[data.sources]]\nname = "a"\nfiles = "a.txt"\n'
        "[batch]\ntokens_per_step = 16\n"
    )
    path = tmp_path / "r.toml"
    for length in ("", "steps = 3\ntokens = 9"):
        path.write_text(base.format(length))
        with pytest.raises(RecipeError, match="steps or tokens"):
            read_recipe(path)
    path.write_text(base.format('tokens = "33"'))
    recipe = read_recipe(path)
    assert recipe.total_steps == 3
    assert Path(recipe.model.config).is_absolute()


def test_a_list_left_empty_is_read_back(tmp_path: Path) -> None:
    text = '[run]\ndirectory = "r"\nsteps = 1\n[model]\nconfig = "m"\n[tokenizer]\npath = "bytes"\n'
    text += '[data]\nsequence_length = 8\n[[data.sources]]\nname = "hub"\ndataset = "org/name"\n'
    recipe = schema.build(Recipe, tomllib.loads(text + "[batch]\ntokens_per_step = 8\n"), "r")
    assert recipe.data.sources[0].files == recipe.data.sources[0].validation == []
    assert schema.build(Recipe, tomllib.loads(schema.to_toml(recipe)), "r") == recipe
