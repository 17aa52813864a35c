"""`flame tokenizer train`: a tokenizer learnt from the data that a recipe trains on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flame.data.catalog import open_sources
from flame.data.config import BYTES
from flame.data.plan import DataPlan
from flame.data.sample import sample_texts
from flame.data.tokens import FILE_NAME, load_tokenizer, train_tokenizer
from flame.errors import Exit, RecipeError
from flame.recipe import read_recipe
from flame.schema import count_option

MEASURED_CHARACTERS = 4_000_000  # of the sample, encoded again to say how it does


def train(path: str, flags: dict[str, str], vocabulary: str, characters: str) -> Exit:
    """Trains on at most `characters` of the recipe's documents; refuses to replace another tokenizer."""
    recipe = read_recipe(Path(path), flags)
    target = Path(recipe.tokenizer.path)
    folder = _folder(target)
    size, wanted = count_option("--vocabulary", vocabulary), count_option("--characters", characters)
    plan = DataPlan.of(recipe.data, recipe.batch.tokens_per_step, recipe.run.seed)
    sources = open_sources(recipe.data, plan, Path())
    seen: list[int] = []

    def texts() -> Iterator[str]:
        for text in sample_texts(sources, wanted):
            seen.append(len(text))
            yield text

    train_tokenizer(texts(), size, folder)
    tokenizer = load_tokenizer(folder, bos=False)
    print(
        f"{folder}: {tokenizer.vocab_size:,} tokens, from {len(seen):,} documents, {sum(seen):,} characters"
    )
    measured = list(sample_texts(sources, min(wanted, MEASURED_CHARACTERS)))
    tokens = sum(len(ids) - 1 for ids in tokenizer.encode(measured))
    print(f"{sum(len(text.encode()) for text in measured) / tokens:.2f} bytes per token on the recipe's data")
    return Exit.DONE


def _folder(target: Path) -> Path:
    """Where to write. Raises RecipeError where something is there."""
    if str(target) == BYTES:
        raise RecipeError('tokenizer.path: "bytes" needs no training; name a new directory to train another')
    if target.suffix and target.name != FILE_NAME and not target.is_dir():
        raise RecipeError(
            f"tokenizer.path: {target}: name a new directory, or a file called {FILE_NAME} in one"
        )
    folder = target.parent if target.name == FILE_NAME else target
    if target.is_file() or (folder / FILE_NAME).exists() or (target.is_dir() and any(target.iterdir())):
        raise RecipeError(
            f"tokenizer.path: {target}: exists, and runs may depend on it; name another path or remove it"
        )
    return folder
