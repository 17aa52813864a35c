"""Hashes of rows of tokens, to tell at little cost whether two runs, or one before and after, saw the same.

Multilinear (Carter and Wegman, 1979): a sum of words times fixed random numbers, modulo 2^64, which numpy
makes at the speed of memory. A row with one changed word never has the same hash; others have it by chance
alone. Nothing here guards against a row that is made to collide.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from flame.data.blocks import mix_each


@lru_cache(maxsize=8)
def _factors(words: int) -> np.ndarray:
    """Odd random numbers, always the same: uint64 [words]."""
    return np.random.Philox(key=np.array([1979, 64], dtype=np.uint64)).random_raw(words) | np.uint64(1)


def row_hashes(tokens: np.ndarray) -> np.ndarray:
    """Of each row (int32 [rows, L]): uint64 [rows]."""
    if tokens.shape[1] % 2:
        tokens = np.pad(tokens, ((0, 0), (0, 1)))
    words = np.ascontiguousarray(tokens).view(np.uint64)
    words = words ^ (words >> np.uint64(32))  # else the high token of a word has half of the hash's bits
    return np.einsum("rw,w->r", words, _factors(words.shape[1]))


def window_hash(rows: np.ndarray) -> int:
    """Of a window, from the hashes of its rows in their order: int64."""
    return of_bytes(rows)


def of_bytes(content: np.ndarray) -> int:
    """64 bits of any array, as int64."""
    digest = hashlib.blake2b(content.reshape(-1).data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def digest(indices: list[int], hashes: list[int]) -> int:
    """Of rows with their numbers in the global order, in any order: int64. Digests of parts add up to that of
    the whole, wrapping around."""
    if not indices:
        return 0
    mixed = mix_each(np.array(indices, dtype=np.uint64), np.array(hashes, dtype=np.uint64))
    return int(mixed.sum(dtype=np.uint64).view(np.int64))
