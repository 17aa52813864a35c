"""Triton's autotuners, started fast and alike on all ranks.

Left alone, an autotuner compiles its candidates one after another and times each for an eighth of a second,
on every rank for itself. With a `Tuner` installed:

- a choice that is known is used, without tuning;
- where none is known, the candidates are compiled in parallel processes, all are timed shortly and the
  fastest few again at length;
- one rank alone decides, the others take its choice: all ranks run the same kernels;
- a rehearsal (`Tuner.rehearsing`) runs a model without launching any kernel, so that all that it needs is
  compiled at once.

The launch of a kernel whose choice is made goes through none of this.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flame.models.kernel_choices import Candidate, Choices, Key
from flame.models.kernel_compiler import Compiler, Job, base_function, wait

FINALISTS = 4  # candidates that are timed at length
SCREENING_MS, FINAL_MS = (2, 8), (10, 50)  # warm-up and measurement of a candidate
PATIENCE_SECONDS = 240.0  # for another rank's choice; then this rank tunes too, and the first one's counts
_REHEARSED = "kernels/rehearsed"  # rank 0 has said which keys it will decide
_log = logging.getLogger(__name__)


class Tuner:
    """Decides which candidate of each autotuned kernel runs in this process."""

    def __init__(
        self,
        choices: Choices,
        compiler: Compiler,
        triton: str,
        *,
        rank: int = 0,
        store: dist.Store | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """`store` connects the ranks; None where there is one."""
        self.choices = choices
        self.compiler = compiler
        self.tuned: list[Tuned] = []
        self._triton = triton
        self._rank = rank
        self._store = store
        self._patience = patience
        self._claimed: set[str] = set()
        self._compiling: dict[str, list[Future[str | None]]] = {}  # by the key's name
        self._plain: dict[Any, list[Future[str | None]]] = {}  # kernels without a choice, by JIT function
        self._capturing = False

    # ------------------------------------------------------------------------------- choosing

    def candidates(self, autotuner: Any, pruned: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The known choice alone, or all of `pruned`."""
        key = key_of(autotuner, kwargs)
        known = self._known(key, pruned)
        autotuner.__dict__[_DECISION] = Decision(self, key, pruned, known)
        return pruned if known is None else [known]

    def _known(self, key: Key, pruned: list[Any]) -> Any | None:
        choice = self.choices.find(key)
        return None if choice is None else next((c for c in pruned if candidate(c) == choice), None)

    def decide(self, autotuner: Any, key: Key, pruned: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Tunes, or takes another rank's choice."""
        if self._store is None:
            chosen = self._tune(autotuner, key, pruned, args, kwargs)
        else:
            chosen = self._agree(
                self._store,
                question(key, pruned),
                pruned,
                lambda: self._tune(autotuner, key, pruned, args, kwargs),
            )
        self.choices.add(key, candidate(chosen), self._triton)
        return chosen

    def _agree(self, store: dist.Store, name: str, pruned: list[Any], tune: Callable[[], Any]) -> Any:
        """The first rank to claim the question answers it; the others wait, within limits."""
        if self._rank != 0 and not self._waited(store, _REHEARSED):
            _log.warning("rank 0 has not prepared its kernels in %.0f s; tuning here", self._patience)
        mine = name in self._claimed or store.add(f"{name}/claim", 1) == 1
        if mine or not self._waited(store, name):
            own = json.dumps(candidate(tune()), sort_keys=True)
            answer = store.compare_set(name, "", own)  # the first answer stays
        else:
            answer = store.get(name)
        choice: Candidate = json.loads(answer)
        return next(c for c in pruned if candidate(c) == choice)

    def _waited(self, store: dist.Store, name: str) -> bool:
        """Whether `name` is in the store within the patience. Asks again and again: a waiting call would
        hold the connection that NCCL's watchdog uses too."""
        deadline = time.monotonic() + self._patience
        while not store.check([name]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    # --------------------------------------------------------------------------------- tuning

    def _tune(self, autotuner: Any, key: Key, pruned: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        begun = time.monotonic()
        futures = self._compiling.pop(key.name, None) or self._compile(autotuner, pruned, args, kwargs)
        problems = wait(futures)
        if problems:
            _log.debug("%s: %d candidates cannot be compiled: %s", key.name, len(problems), problems[0])
        compiled = time.monotonic()
        chosen = fastest(autotuner, pruned, args, kwargs)
        self.tuned.append(Tuned(key, len(pruned), compiled - begun, time.monotonic() - compiled))
        return chosen

    def _compile(
        self, autotuner: Any, configs: list[Any], args: Any, kwargs: dict[str, Any]
    ) -> list[Future[str | None]]:
        """Begins to compile the candidates of one call."""
        function = base_function(autotuner)
        quiet = {**kwargs, "warmup": True}
        self._capturing = True
        try:
            jobs = [
                capture(function, lambda c=config: autotuner.fn.run(*args, **quiet, **c.all_kwargs()))
                for config in configs
            ]
        finally:
            self._capturing = False
        return [self.compiler.submit(job) for job in jobs if job is not None]

    # ------------------------------------------------------------------------------ rehearsing

    @contextmanager
    def rehearsing(self) -> Generator[None]:
        """Within, kernels are not launched: what they write stays as it was. All that they need is sent to
        be compiled. At the end the other ranks learn which keys this one will decide."""
        autotuned, launched = Autotuner.run, JITFunction.run
        Autotuner.run = lambda autotuner, *args, **kwargs: self._rehearse_autotuned(autotuner, args, kwargs)  # type: ignore
        JITFunction.run = lambda function, *args, **kwargs: self._rehearse(launched, function, args, kwargs)  # type: ignore
        try:
            yield
        finally:
            Autotuner.run, JITFunction.run = autotuned, launched
            self.announce()

    def announce(self) -> None:
        """Rank 0 tells the others that it has said which keys it will decide."""
        if self._store is not None and self._rank == 0:
            self._store.set(_REHEARSED, "1")

    def _rehearse_autotuned(self, autotuner: Any, args: Any, kwargs: dict[str, Any]) -> None:
        autotuner.nargs = dict(zip(autotuner.arg_names, args, strict=False))
        single = len(autotuner.configs) < 2
        configs = autotuner.configs if single else autotuner.prune_configs(kwargs)
        if not single and len(configs) > 1:
            key = key_of(autotuner, kwargs)
            if key.name not in self._compiling:
                self._compiling[key.name] = self._compile(autotuner, configs, args, kwargs)
                name = question(key, configs)
                if self._store is not None and self._rank == 0 and self._store.add(f"{name}/claim", 1) == 1:
                    self._claimed.add(name)
        else:
            autotuner.fn.run(*args, **kwargs, **configs[0].all_kwargs())
        autotuner.nargs = None

    def _rehearse(self, launched: Any, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._capturing:
            launched(function, *args, **kwargs)
            return
        job = capture(function, lambda: launched(function, *args, **{**kwargs, "warmup": True}))
        if job is None:
            return
        self._plain.setdefault(function, []).append(self.compiler.submit(job))
        if len(self._plain[function]) == 1:
            compile_now = function.compile

            def compile_after(*args: Any, **kwargs: Any) -> Any:
                wait(self._plain[function])  # then it is in the cache on disk
                return compile_now(*args, **kwargs)

            function.compile = compile_after


@dataclass(frozen=True, slots=True)
class Tuned:
    """One key that was tuned in this process."""

    key: Key
    candidates: int
    compile_seconds: float  # that were waited for
    timing_seconds: float


@dataclass(slots=True)
class Decision:
    """An autotuner's open or made decision, between pruning its candidates and timing them."""

    tuner: Tuner
    key: Key
    pruned: list[Any]
    chosen: Any | None

    def timing(self, autotuner: Any, config: Any, args: Any, kwargs: dict[str, Any]) -> list[float]:
        """What the autotuner takes for the time of `config`: nothing for the chosen one."""
        if self.chosen is None:
            self.chosen = self.tuner.decide(autotuner, self.key, self.pruned, args, kwargs)
        return [0.0 if config is self.chosen else float("inf")] * 3


_DECISION = "_flame_decision"
_triton: Any = Autotuner
_prune, _bench, _check_disk = _triton.prune_configs, _triton._bench, _triton.check_disk_cache


@contextmanager
def installed(tuner: Tuner) -> Generator[Tuner]:
    """Within, every autotuner of this process asks `tuner`."""

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        return tuner.candidates(self, _prune(self, kwargs), kwargs)

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        return self.__dict__[_DECISION].timing(self, config, args, meta)

    def check_disk_cache(self: Any, tuning_key: Any, configs: Any, bench_fn: Callable[[], None]) -> bool:
        bench_fn()  # Triton's own record of timings is a node's alone
        return False

    _triton.prune_configs, _triton._bench, _triton.check_disk_cache = prune_configs, bench, check_disk_cache
    try:
        yield tuner
    finally:
        _triton.prune_configs, _triton._bench, _triton.check_disk_cache = _prune, _bench, _check_disk
        tuner.compiler.close()


# ------------------------------------------------------------------------------ Triton's objects


def key_of(autotuner: Any, kwargs: dict[str, Any]) -> Key:
    """What an autotuner in a call keys its choice on, as Triton and fla form it."""
    given: dict[str, Any] = {**autotuner.nargs, **kwargs}
    named = {name: value for name, value in given.items() if name in autotuner.arg_names}
    values = [_plain(named[name]) for name in autotuner.keys if name in named]
    values += [str(value.dtype) for value in named.values() if hasattr(value, "dtype")]
    function = base_function(autotuner)
    return Key(function.fn.__module__, function.fn.__name__, tuple(values))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in cast("list[Any]", value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def candidate(config: Any) -> Candidate:
    """A `triton.Config` as fla's files hold it."""
    return {
        "kwargs": {name: _plain(value) for name, value in config.kwargs.items()},
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "num_ctas": config.num_ctas,
        "maxnreg": config.maxnreg,
        "ir_override": getattr(config, "ir_override", None),
    }


def question(key: Key, pruned: list[Any]) -> str:
    """The name under which ranks agree on one of `pruned`."""
    offered = json.dumps([candidate(config) for config in pruned], sort_keys=True)
    return f"kernels/{key.name}/{hashlib.md5(offered.encode()).hexdigest()}"


class _CapturedError(Exception):
    def __init__(self, job: Job) -> None:
        self.job = job


def capture(function: Any, call: Callable[[], Any]) -> Job | None:
    """What `call` would have Triton compile for `function`; None where it is compiled already. `call` must
    launch nothing."""
    active: Any = driver.active
    _ = function.device_caches[active.get_current_device()]  # sets function.compile at first

    def compile_later(source: Any, target: Any, options: dict[str, Any], **_: Any) -> Any:
        raise _CapturedError(Job.of(source, target, options))

    real, function.compile = function.compile, compile_later
    try:
        call()
    except _CapturedError as found:
        return found.job
    finally:
        function.compile = real
    return None


def fastest(autotuner: Any, configs: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The fastest candidate: all are timed shortly, the best few at length."""

    def timed(config: Any) -> Any:
        return _bench(autotuner, *args, config=config, **kwargs)

    if autotuner._do_bench is not None:  # a benchmark of the kernel's own
        return min(configs, key=timed)
    if len(configs) > FINALISTS:
        with benchmark_for(autotuner, *SCREENING_MS):
            configs = sorted(configs, key=timed)[:FINALISTS]
    with benchmark_for(autotuner, *FINAL_MS):
        return min(configs, key=timed)


@contextmanager
def benchmark_for(autotuner: Any, warmup_ms: int, measured_ms: int) -> Generator[None]:
    """Lets an autotuner time each candidate for so long."""
    measure = driver.active.get_benchmarker()

    def bench(call: Callable[[], Any], quantiles: Any) -> Any:
        return measure(call, warmup=warmup_ms, rep=measured_ms, quantiles=quantiles)

    autotuner.__dict__["do_bench"] = bench
    try:
        yield
    finally:
        del autotuner.__dict__["do_bench"]
