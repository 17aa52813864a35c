"""Compiles Triton kernels in parallel processes, into Triton's cache on disk. No process here touches a GPU.

Triton compiles in Python, C++ and ptxas; the Python part holds the interpreter's lock, so threads use only
a few cores. The workers are forked when the first kernel is compiled: they have every kernel's module as
this process has it, and need no imports.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import io
import multiprocessing
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from triton.compiler import compile as compile_kernel
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

IDLE_SECONDS = 90.0  # after which an idle pool ends


@dataclass(frozen=True, slots=True)
class Job:
    """One specialised kernel: the arguments of `triton.compile`."""

    kind: Any  # ASTSource, or a kind of it
    function: Any  # a JITFunction
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    target: Any
    options: dict[str, Any]

    @staticmethod
    def of(source: Any, target: Any, options: dict[str, Any]) -> Job:
        return Job(type(source), source.fn, source.signature, source.constants, source.attrs, target, options)


class TargetOnly:
    """What compiling asks of Triton's driver, where no device may be touched."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pickler(pickle.Pickler):
    """JIT functions travel by name: the workers have them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, JITFunction):
            function: Any = obj
            return find_function, (function.fn.__module__, function.fn.__qualname__)
        return NotImplemented


def base_function(kernel: Any) -> Any:
    """The JIT function under autotuners and heuristics."""
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return cast("Any", kernel)


def find_function(module: str, name: str) -> Any:
    """The JIT function of that name."""
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return base_function(found)


def pack(job: Job) -> bytes:
    """A job as bytes. Raises what pickle raises for a kernel that has no name in its module."""
    if find_function(job.function.fn.__module__, job.function.fn.__qualname__) is not job.function:
        raise pickle.PicklingError(f"{job.function}: its name in its module is another kernel's")
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(job)
    return buffer.getvalue()


def compile_packed(packed: bytes) -> str | None:
    """Compiles a job into the cache; None, or why it could not be. For worker processes alone: from then
    on Triton knows no device there but the job's target."""
    job: Job = pickle.loads(packed)
    driver.set_active(cast("Any", TargetOnly(job.target)))
    try:
        source = job.kind(job.function, job.signature, job.constants, job.attributes)
        compile_kernel(source, target=job.target, options=job.options)
    except Exception as error:  # a candidate that cannot be compiled is no candidate: timing meets it again
        return f"{type(error).__name__}: {error}"
    return None


class Compiler:
    """A pool of compiling processes, made when it is first needed and ended when it was idle for a while.
    All its methods may be called from any thread; results are in the cache on disk, so a pool that breaks
    costs time alone."""

    def __init__(self, processes: int, begin: Callable[[], None]) -> None:
        """`begin` is the first thing that a new process calls."""
        self.processes = processes
        self.compiled = 0
        self._begin = begin
        self._pool: ProcessPoolExecutor | None = None
        self._open: list[Future[str | None]] = []
        self._lock = threading.Lock()

    def submit(self, job: Job) -> Future[str | None]:
        """Begins to compile; the result is None, or why it could not be."""
        try:
            packed = pack(job)
            with self._lock:
                future = self._started().submit(compile_packed, packed)
                self._open.append(future)
        except (pickle.PicklingError, AttributeError, ImportError, TypeError, RuntimeError, OSError) as error:
            future = Future[str | None]()
            future.set_result(f"{type(error).__name__}: {error}")
            return future
        self.compiled += 1
        return future

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is not None:
            return self._pool
        triton_key()  # takes half a second, once: the workers inherit it
        context = multiprocessing.get_context("fork")
        self._pool = pool = ProcessPoolExecutor(self.processes, context, initializer=self._begin)
        with warnings.catch_warnings():
            # Python warns of forking beside threads: the workers use nothing that those may hold
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            pool.submit(int)
        self._watch()
        return pool

    def _watch(self) -> None:
        timer = threading.Timer(IDLE_SECONDS, self._close_if_idle)
        timer.daemon = True
        timer.start()

    def _close_if_idle(self) -> None:
        with self._lock:
            if self._pool is None:
                return
            self._open = [future for future in self._open if not future.done()]
            if self._open:
                self._watch()
            else:
                self._end()

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # a process that ends meanwhile closes the pool's queue before its workers are told to leave, and
            # then waits for them without end
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Ends the processes, which finish what they are at; a later job makes new ones."""
        with self._lock:
            self._end()


def wait(futures: list[Future[str | None]]) -> list[str]:
    """Waits for all; why some could not be compiled."""
    concurrent.futures.wait(futures)
    problems: list[str] = []
    for future in futures:
        error = None if future.cancelled() else future.exception()
        reason = str(error) if error else None if future.cancelled() else future.result()
        if reason:
            problems.append(reason)
    return problems
