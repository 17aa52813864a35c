"""Where held out documents meet the model: the validation of a recipe, its set read beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flame.batch import RowSet
from flame.data.catalog import Catalog
from flame.data.plan import DataPlan
from flame.data.tokens import Tokenizer
from flame.data.validation import open_validation, overlaps
from flame.data.validation_set import DOCUMENTS, TOKENS, ValidationSet, read_validation_set
from flame.errors import DataError, RecipeError
from flame.guest import Guest
from flame.parallel.context import PartOfHeldOutRows
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.forward_only import ForwardOnly
from flame.train.hook import Hook, load_hook
from flame.train.journal import event
from flame.train.loss import LossModule
from flame.train.samples import Samples
from flame.train.validation import Follower, Validation


class SetReader:
    """Reads the set once, on rank 0, in a thread; every rank gets its share when it asks. A
    `flame.train.validation.Reader`."""

    def __init__(
        self,
        world: World,
        read: Callable[[], ValidationSet] | None,
        share: Callable[[ValidationSet], RowSet],
        tell: Callable[[ValidationSet, float], None],
    ) -> None:
        """`read`: on rank 0. `share`: this rank's part. `tell`: of the set and the seconds it took."""
        self._world, self._read, self._share, self._tell = world, read, share, tell
        self._thread: threading.Thread | None = None
        self._whole: ValidationSet | None = None
        self._error: BaseException | None = None
        self._mine: RowSet | None = None

    def begin(self) -> None:
        if self._read is None or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="flame-validation", daemon=True)
        self._thread.start()

    def failure(self) -> DataError | None:
        return self._error if isinstance(self._error, DataError) else None

    def rows(self) -> RowSet:
        if self._mine is None:
            self._mine = self._share(self._world.from_rank_zero(self._wait))
            self._whole = None
        return self._mine

    def _wait(self) -> ValidationSet:
        self.begin()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._whole is not None
        return self._whole

    def _run(self) -> None:
        assert self._read is not None
        began = time.perf_counter()
        try:
            self._whole = self._read()
            self._tell(self._whole, time.perf_counter() - began)
        except BaseException as error:  # all of them belong to whoever waits for the set
            self._error = error


def make_validation(
    recipe: Recipe,
    world: World,
    guest: Guest,
    catalog: Catalog,
    plan: DataPlan,
    micro_batch_rows: int,
) -> Validation | None:
    """The validation that a recipe asks for. `micro_batch_rows`: of the first stage of the data. Raises
    FlameError, on every rank, for what cannot be."""
    wanted = recipe.validation
    if wanted.every is None:
        return None
    passes, context = guest.passes, guest.meshes.context if guest.meshes is not None else None
    opened: list[tuple[Catalog, DataPlan]] = []

    def look() -> list[str]:
        """On rank 0 alone, which alone reads the set."""
        found = open_validation(wanted, recipe.data, recipe.tokenizer, catalog, plan, Path())
        opened.append(found)
        return [] if wanted.fraction else overlaps(catalog, found[0])

    notes = world.from_rank_zero(look)
    for note in notes if world.rank == 0 else ():
        print(f"warning: {note}", flush=True)

    def share(whole: ValidationSet) -> RowSet:
        mine = whole.share(guest.place.data, guest.layout.data_ranks, micro_batch_rows)
        if context is None:
            return mine
        return PartOfHeldOutRows(mine, context, recipe.parallel.context_method)

    reader = SetReader(
        world,
        (lambda: read_validation_set(*opened[0])) if world.rank == 0 else None,
        share,
        lambda whole, seconds: tell(recipe, whole, seconds, notes),
    )
    return Validation(
        every=wanted.every,
        at_start=wanted.at_start,
        reader=reader,
        model=passes if isinstance(passes, LossModule) else ForwardOnly(passes),
        device=world.device,
        group=world.control,
        counts=guest.place.tensor == 0,
        followers=followers_of(recipe, world, guest, catalog),
    )


def tell(recipe: Recipe, whole: ValidationSet, seconds: float, warnings: list[str]) -> None:
    """An event for the set, and a line where it is smaller than asked for."""
    tokens, asked = int(whole.counts[:, TOKENS].sum()), recipe.validation.tokens
    fields: dict[str, Any] = {
        "tokens": tokens,
        "documents": int(whole.counts[:, DOCUMENTS].sum()),
        "rows": whole.total_rows,
        "records_skipped": whole.records_skipped,
        "seconds": round(seconds, 3),
    }
    if warnings:
        fields["warnings"] = warnings
    if tokens < asked:
        fields["tokens_asked"] = asked
    event(recipe.directory, "validation_set", **fields)
    if tokens < asked:
        print(
            f"validation: the held out documents have {tokens:,} tokens, fewer than validation.tokens = "
            f"{asked:,}: all of them are used",
            flush=True,
        )


def followers_of(recipe: Recipe, world: World, guest: Guest, catalog: Catalog) -> list[Follower]:
    """The samples and the hook that a recipe asks for."""
    wanted, followers = recipe.validation, list[Follower]()
    if not wanted.prompts and wanted.hook is None:
        return followers
    model = guest.passes
    assert isinstance(model, LossModule), "no rank of a pipeline has the whole model: flame.guest.check_fits"
    tokenizer = catalog.load_tokenizer()
    if wanted.prompts:
        followers.append(
            Samples(
                recipe.directory,
                model,
                world.device,
                prompts=[(text, prompt_ids(recipe, tokenizer, text)) for text in wanted.prompts],
                count=wanted.prompt_tokens,
                eos_id=tokenizer.eos_id,
                decode=tokenizer.decode,
                writes=world.rank == 0,
            )
        )
    if wanted.hook is not None:
        hook = Hook(
            load_hook(wanted.hook),
            model=model,
            guest=guest.model,
            tokenizer=tokenizer,
            recipe=recipe,
            device=world.device,
            group=world.control,
        )
        followers.append(hook)
    return followers


def prompt_ids(recipe: Recipe, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt. Raises RecipeError where it has none, or too many."""
    ids: list[int] = tokenizer.encode_parts([text], [True], [False])[0].tolist() if text else []
    if not ids:
        raise RecipeError("validation.prompts: a prompt has no tokens: give a text of at least one character")
    length, new = recipe.data.sequence_length, recipe.validation.prompt_tokens
    if len(ids) + new > length:
        raise RecipeError(
            f"validation.prompts: {text[:40]!r} has {len(ids)} tokens and prompt_tokens = {new}, more than "
            f"data.sequence_length = {length} together; shorten one of them"
        )
    return ids
