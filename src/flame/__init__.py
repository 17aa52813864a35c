"""flame: a light training framework for language models, on PyTorch's own distributed engine.

The names in `__all__` are the stable ones, for use from Python (docs/python.md). Each is imported when it is
first asked for, so that `import flame` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame.api import LoadedRun as LoadedRun
    from flame.api import Trained as Trained
    from flame.api import export as export
    from flame.api import load_run as load_run
    from flame.api import train as train
    from flame.batch import IGNORED as IGNORED
    from flame.batch import Batch as Batch
    from flame.batch import Counts as Counts
    from flame.batch import StepRows as StepRows
    from flame.data.catalog import fingerprint as fingerprint
    from flame.data.catalog import fingerprint_difference as fingerprint_difference
    from flame.data.catalog import open_catalog as open_catalog
    from flame.data.config import DataConfig as DataConfig
    from flame.data.config import SourceConfig as SourceConfig
    from flame.data.config import TokenizerConfig as TokenizerConfig
    from flame.data.loader import Loader as Loader
    from flame.data.plan import DataPlan as DataPlan
    from flame.data.state import DataState as DataState
    from flame.errors import FlameError as FlameError
    from flame.models.attention import varlen_attention as varlen_attention
    from flame.models.build import build_on_meta as build_on_meta
    from flame.models.build import initialize as initialize
    from flame.models.registry import family_of as family_of
    from flame.models.registry import load_config as load_config
    from flame.recipe import Recipe as Recipe
    from flame.recipe import read_recipe as read_recipe
    from flame.train.loss import LossModule as LossModule
    from flame.train.loss import cross_entropy as cross_entropy

__version__ = "0.1.0"

_HOMES = {
    "Batch": "flame.batch",
    "Counts": "flame.batch",
    "DataConfig": "flame.data.config",
    "DataPlan": "flame.data.plan",
    "DataState": "flame.data.state",
    "FlameError": "flame.errors",
    "IGNORED": "flame.batch",
    "LoadedRun": "flame.api",
    "Loader": "flame.data.loader",
    "LossModule": "flame.train.loss",
    "Recipe": "flame.recipe",
    "SourceConfig": "flame.data.config",
    "StepRows": "flame.batch",
    "TokenizerConfig": "flame.data.config",
    "Trained": "flame.api",
    "build_on_meta": "flame.models.build",
    "cross_entropy": "flame.train.loss",
    "export": "flame.api",
    "family_of": "flame.models.registry",
    "fingerprint": "flame.data.catalog",
    "fingerprint_difference": "flame.data.catalog",
    "initialize": "flame.models.build",
    "load_config": "flame.models.registry",
    "load_run": "flame.api",
    "open_catalog": "flame.data.catalog",
    "read_recipe": "flame.recipe",
    "varlen_attention": "flame.models.attention",
}
__all__ = ["__version__", "train", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A stable name, from the module that has it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flame' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Train(ModuleType):
    """The package `flame.train`, which is called as the function of its name: whoever has imported a module
    of the package has the package as `flame.train`, whatever else were put there."""

    def __call__(self, recipe: Any) -> Any:
        """Trains a recipe in this process: see `flame.api.train`."""
        return import_module("flame.api").train(recipe)


import_module("flame.train")  # imports nothing
sys.modules["flame.train"].__class__ = _Train
