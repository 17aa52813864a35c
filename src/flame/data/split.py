"""Which documents are held out of training: by a hash of what they say, and of nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def content_key(content: str | np.ndarray) -> int:
    """64 bits of a document's text, or of its token ids without BOS and EOS: the same for each copy."""
    data = content.encode() if isinstance(content, str) else content.astype("<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_held_out(content: str | np.ndarray, fraction: float) -> bool:
    """Whether a document belongs to the fraction that is never trained. No seed, file or source has a say, so
    that any run on any data holds out the same texts."""
    return is_key_held_out(content_key(content), fraction)


def is_key_held_out(key: int, fraction: float) -> bool:
    """The same of its `content_key`, where that is known."""
    return key < fraction * 2**64
