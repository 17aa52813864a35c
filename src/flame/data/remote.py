"""Remote files by URL (http, s3, whatever fsspec knows): listed once, fetched in chunks into the block cache.

A request that may succeed later (429, a server's error, a reset, a timeout, a short answer) is tried again
with exponential back-off and jitter; then, as at once for any other error, the run stops with the URL.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from flame.data.cache import Access
from flame.data.raw import RawFile, shrunk
from flame.errors import DataError, FlameError

T = TypeVar("T")

TRIES = 6
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 30.0
TIMEOUT_SECONDS = 60.0
CHUNK = 4 * 2**20  # bytes fetched at once and kept as an entry of the cache
FETCHED_AHEAD = 8  # chunks of all files, at the same time
OPEN_CHUNKS = 4  # of a file
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

core = cast("Any", fsspec).core
_pools: dict[int, ThreadPoolExecutor] = {}  # by process: a forked one has no threads


class ShortAnswer(Exception):
    """A server sent less than it was asked for."""


def list_url(pattern: str) -> tuple[list[str], str, bool]:
    """The files that a URL names (itself, those that match, or all in a directory), the fixed prefix, and
    whether it is a directory. Raises DataError."""
    system, path = _system(pattern)
    magic = any(sign in path for sign in "*[")
    if not magic and retried(pattern, lambda: system.isfile(path)):
        return [pattern], pattern.rpartition("/")[0], False
    if not magic:
        held: list[str] = retried(pattern, lambda: system.find(path))
        return [system.unstrip_protocol(name) for name in held], pattern.rstrip("/"), True
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*["))
    matched: list[str] = retried(pattern, lambda: system.glob(path))
    names = [system.unstrip_protocol(name) for name in matched if not name.endswith("/")]
    return names, "/".join(parts[:fixed]), False


def url_exists(url: str) -> bool:
    """Whether a file lies there. Raises DataError."""
    system, path = _system(url)
    return bool(retried(url, lambda: system.isfile(path)))


def retried(url: str, ask: Callable[[], T], deed: str = "read") -> T:
    """What `ask` returns, tried again where that may help. Raises DataError naming the URL, and that it
    cannot be `deed`."""
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except FlameError:
            raise
        except Exception as error:  # of any file system's client
            if attempt == TRIES or not may_pass(error):
                tried = f" after {attempt} tries" if attempt > 1 else ""
                shown = str(error) or type(error).__name__
                raise DataError(
                    f"{url}: cannot be {deed}{tried}: {shown}; check address, credentials and network"
                ) from error
            delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (attempt - 1))
            time.sleep(delay * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def may_pass(error: BaseException) -> bool:
    """Whether a request may succeed when it is made again."""
    status = getattr(error, "status", None)
    answer = getattr(error, "response", None)
    if status is None and isinstance(answer, dict):  # botocore's
        status = cast("dict[str, Any]", answer).get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(status, int) and status >= 400:
        return status in (408, 429) or status >= 500
    if error.__cause__ is not None and may_pass(error.__cause__):  # fsspec calls much "not found"
        return True
    if isinstance(error, LASTING):
        return False
    clients = type(error).__module__.startswith(("aiohttp", "botocore", "urllib3"))
    return clients or isinstance(error, (OSError, TimeoutError, ShortAnswer, EOFError))


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises DataError."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        options = {"client_kwargs": {"timeout": _http_timeout()}}
    try:
        return core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be read: {error}") from None


def _http_timeout() -> Any:
    try:
        import aiohttp  # an extra: only http needs it
    except ImportError:
        raise DataError('reading http needs aiohttp: pip install "flame[http]"') from None
    return aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)


class RemoteFile(RawFile):
    """A remote file. With a key its chunks go through the block cache; without, each read is a request."""

    def __init__(
        self, url: str, access: Access | None = None, key: str | None = None, size: int = -1
    ) -> None:
        self._url, self._access, self._key = url, access, key
        self._system, self._path = _system(url)
        self._size = size
        self._ahead: dict[int, Future[int]] = {}
        self._chunks: dict[int, int] = {}  # open descriptors

    @property
    def size(self) -> int:
        if self._size < 0:
            found = retried(self._url, lambda: self._system.info(self._path)).get("size")
            if found is None:
                raise DataError(f"{self._url}: the server does not say how large the file is")
            self._size = int(found)
        return self._size

    def read(self, start: int, length: int) -> bytes:
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        if self._access is None or self._key is None:
            return self._fetch(start, stop)
        pieces: list[bytes] = []
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = max(start, chunk * CHUNK)
            last = min(stop, (chunk + 1) * CHUNK)
            pieces.append(os.pread(self._chunk(chunk), last - first, first - chunk * CHUNK))
        return b"".join(pieces)

    def expect(self, start: int, length: int) -> None:
        if self._access is None or self._key is None:
            return
        pool = _pools.setdefault(os.getpid(), ThreadPoolExecutor(FETCHED_AHEAD, "flame-fetch"))
        for chunk in range(start // CHUNK, -(-min(start + length, self.size) // CHUNK)):
            if chunk not in self._chunks and chunk not in self._ahead and len(self._ahead) < FETCHED_AHEAD:
                self._ahead[chunk] = pool.submit(self._cached, chunk)

    def close(self) -> None:
        for future in self._ahead.values():
            if not future.cancel() and future.exception() is None:
                os.close(future.result())
        for descriptor in self._chunks.values():
            os.close(descriptor)
        self._ahead.clear()
        self._chunks.clear()

    def _chunk(self, chunk: int) -> int:
        """A descriptor of a chunk in the cache."""
        if chunk not in self._chunks:
            ahead = self._ahead.pop(chunk, None)
            opened = self._cached(chunk) if ahead is None else ahead.result()
            while len(self._chunks) >= OPEN_CHUNKS:
                os.close(self._chunks.pop(next(iter(self._chunks))))
            self._chunks[chunk] = opened
        return self._chunks[chunk]

    def _cached(self, chunk: int) -> int:
        assert self._access is not None

        def make(out: BinaryIO) -> None:
            out.write(self._fetch(chunk * CHUNK, min(self.size, (chunk + 1) * CHUNK)))

        return self._access.cache.open(f"chunk/{chunk}/{self._key}", make)

    def _fetch(self, start: int, stop: int) -> bytes:
        def ask() -> bytes:
            content = bytes(self._system.cat_file(self._path, start=start, end=stop))
            if len(content) > stop - start:  # the server sends the whole file whatever is asked for
                content = content[start:stop]
            if len(content) < stop - start:
                raise ShortAnswer(f"{len(content)} bytes came instead of {stop - start}")
            return content

        try:
            return retried(self._url, ask)
        except DataError as failed:
            try:
                found = self._system.info(self._path).get("size")
            except Exception:  # then only the failed read is known
                raise failed from None
            if found is not None and int(found) < self.size:
                raise shrunk(self._url, int(found), self.size) from None
            raise
