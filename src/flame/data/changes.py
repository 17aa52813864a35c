"""Files that are new, gone or changed since a run began: what it goes on with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from flame.data.blocks import Blocks
from flame.data.catalog import Catalog, fingerprint, fingerprint_difference
from flame.data.lanes import UNKNOWN
from flame.data.plan import DataPlan
from flame.data.sources import FORMATS, Source, cut
from flame.data.state import DataState
from flame.errors import DataError

Files = dict[str, dict[str, Any]]  # by name, as in the fingerprint


@dataclass(frozen=True, slots=True)
class Rejoined:
    """The data of a run that goes on."""

    catalog: Catalog
    state: DataState
    changes: list[str]  # a sentence for each file that is not as it was


def rejoin(catalog: Catalog, plan: DataPlan, state: DataState, accept: bool) -> Rejoined:
    """The catalog as the run that left `state` knows it: which files joined it at which epoch.

    With `accept`, files may differ. New ones join their source at the epoch after the last one that any
    lane has begun, and until then nothing changes. Where a file is gone or changed, all lanes begin that
    epoch of the source at once, and pack the rest of their open windows anew. Raises DataError naming what
    differs.
    """
    changes: list[str] = []
    accepted: set[str] = set()
    saved: list[dict[str, Any]] = copy.deepcopy(state.fingerprint.get("sources", []))
    known = {str(entry["name"]): entry for entry in saved}
    for source in catalog.sources:
        if source.name not in known:
            continue
        old: Files = {file["name"]: file for file in known[source.name]["files"]}
        new: Files = {file.name: {"size": file.size, "hash": file.hash} for file in source.files}
        joined = {name: int(old[name].get("first_epoch", 0)) if name in old else 0 for name in new}
        found = differences(source.name, old, new)
        if found and accept:
            changes += found
            column = state.columns.index(f"{source.name}.begun")
            epoch = int(state.lanes[:, column].max()) + 1
            if all(name in new and same(old[name], new[name]) for name in old):
                joined |= dict.fromkeys(new.keys() - old.keys(), epoch)
            else:
                joined = dict.fromkeys(joined, 0)
                state = begin_epoch(state, source.name, epoch)
            accepted.add(source.name)
            known[source.name]["files"] = []
        if any(joined.values()):
            late = {name: first for name, first in joined.items() if first}
            generations = catalog.generations | {source.name: cut_generations(source, joined, plan.lanes)}
            catalog = replace(catalog, joined=catalog.joined | {source.name: late}, generations=generations)
    check(catalog, plan, saved, state, accepted)
    return Rejoined(catalog, replace(state, fingerprint=fingerprint(catalog, plan)), changes)


def check(
    catalog: Catalog, plan: DataPlan, saved: list[dict[str, Any]], state: DataState, accepted: set[str]
) -> None:
    """All but the files of `accepted` sources must be as it was."""
    now = fingerprint(catalog, plan)
    for entry in cast("list[dict[str, Any]]", now["sources"]):
        if entry["name"] in accepted:
            entry["files"] = []
    difference = fingerprint_difference(state.fingerprint | {"sources": saved}, now)
    if difference is not None:
        hint = (
            "; --data.accept-changed-sources goes on with the files as they are"
            if ".files[" in difference
            else ""
        )
        raise DataError(f"{difference}{hint}")


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two entries are of one file."""
    return (old["size"], old["hash"]) == (new["size"], new["hash"])


def differences(source: str, old: Files, new: Files) -> list[str]:
    """A sentence for each file of a source that is not as it was."""
    found: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            found.append(f'source "{source}": {name} is new')
        elif name not in new:
            found.append(f'source "{source}": {name} is gone')
        elif not same(old[name], new[name]):
            sizes = f"{old[name]['size']} bytes when the run began, {new[name]['size']} now"
            found.append(f'source "{source}": {name} has changed: {sizes}')
    return found


def begin_epoch(state: DataState, source: str, epoch: int) -> DataState:
    """The state with every lane at the beginning of an epoch of a source, its open window unknown."""
    lanes = state.lanes.copy()
    for field, value in (
        ("epoch", epoch),
        ("begun", epoch),
        ("group", 0),
        ("document", 0),
        ("offset", 0),
        ("cut", 0),
    ):
        lanes[:, state.columns.index(f"{source}.{field}")] = value
    lanes[:, state.columns.index("window_hash")] = UNKNOWN
    return replace(state, lanes=lanes)


def cut_generations(source: Source, joined: dict[str, int], lanes: int) -> list[tuple[int, Blocks]]:
    """(first epoch, blocks) for each epoch at which files joined a source, cut from the files it had then."""
    generations: list[tuple[int, Blocks]] = []
    for first in sorted({0, *joined.values()}):
        numbers = [i for i, file in enumerate(source.files) if joined[file.name] <= first]
        files = [source.files[i] for i in numbers]
        blocks = cut(FORMATS[source.format](files, source.field, source.access), len(files), lanes)
        generations.append((first, replace(blocks, file=np.array(numbers, dtype=np.int32)[blocks.file])))
    return generations
