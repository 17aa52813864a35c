"""What a family cannot do is refused with what could."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flame.errors import RecipeError
from flame.models.registry import families
from flame.parallel.mesh import Layout
from flame.parallel.support import WAYS, check_layout


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_lacks_is_refused(way: str) -> None:
    family = replace(families()[0], **dict.fromkeys(WAYS, False))
    check_layout(family, None, Layout(replicate=2, shard=4))
    with pytest.raises(RecipeError, match=rf"parallel\.{way}: 2, but {family.name} models"):
        check_layout(family, None, Layout(**{way: 2}))


@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_a_family_has_is_allowed(way: str) -> None:
    check_layout(replace(families()[0], **{way: True}), None, Layout(**{way: 2}))
