"""The errors that people see, and the exit codes of every command."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, cast

URL = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>]+""")
CREDENTIALS = re.compile(r"(?<=://)[^/?\s]*@")  # of a URL: user:password@
QUERY = re.compile(r"\?.*")  # of a URL: signatures and tokens


class Exit(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    WRONG_INPUT = 1  # the recipe, the data or the environment is wrong: one message, no traceback
    USAGE = 2
    FAILED = 3  # training failed past its recovery budget
    STOPPED = 75  # stopped by a signal, its state saved (or nothing to save yet)


class FlameError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do.

    Commands print the message alone and exit with `exit_code`. Of URLs in it, credentials and queries are
    masked, wherever it is written to.
    """

    exit_code = Exit.WRONG_INPUT

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class RecipeError(FlameError):
    """A recipe, a flag or a combination of settings that cannot be."""


class DataError(FlameError):
    """Data that cannot be read or does not match what the run was started with."""


class ModelError(FlameError):
    """A model that cannot be built, loaded or trained truly."""


class CheckpointError(FlameError):
    """A checkpoint or a run directory that cannot be used."""


class TrainingError(FlameError):
    """Training that has failed past its recovery budget: starting again would not help."""

    exit_code = Exit.FAILED


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`did you mean X? ` where one of `allowed` resembles `word`, else the empty string."""
    found = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""


def without_secrets(value: Any) -> Any:
    """A copy without what URLs in it may hold: user, password, and the query with its signatures."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner) for inner in cast("list[Any]", value)]
    if isinstance(value, str) and "://" in value:
        return URL.sub(lambda url: QUERY.sub("?***", CREDENTIALS.sub("***@", url[0])), value)
    return value
