"""Tuning without a GPU: real compiling for compute capability 9.0 in real processes, faked launches."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models.fake_gpu import FakeGpu
from triton.runtime.driver import driver

from flame.models import zoo  # fla first: it asks Triton's driver what it is
from flame.models.kernel_choices import Choices, Key
from flame.models.kernel_compiler import Compiler, wait
from flame.models.kernels import FINAL_MS, FINALISTS, SCREENING_MS, Tuner, candidate, capture, installed

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION", "ignore::DeprecationWarning")
FLA_CACHE = zoo.fla_module("ops.utils.cache")
TRITON = "3.9.0"
REPLACED = ("run", "_bench", "prune_configs", "check_disk_cache")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Two warps are fastest; the caches are empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    fake = FakeGpu(lambda _name, warps: {1: 3.0, 2: 1.0, 4: 2.0}[warps])
    driver.set_active(fake)
    from models import kernels_to_tune

    for kernel in (kernels_to_tune.scale.fn.fn, kernels_to_tune.shift):
        kernel.device_caches.clear()
        kernel.__dict__.pop("compile", None)
    kernels_to_tune.scale.cache.clear()
    yield fake
    driver._active = None


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    made = Compiler(2, lambda: None)
    yield made
    made.close()


def _open_and_close() -> None:
    made = Compiler(4, lambda: None)
    with made._lock:
        made._started()
    made.close()


def test_a_process_ends_when_its_compiler_is_closed() -> None:
    for _ in range(2):  # what can hang is a race at the process's end
        process = multiprocessing.get_context("spawn").Process(target=_open_and_close)
        process.start()
        process.join(120)  # a busy machine needs some; one that hangs, forever
        code = process.exitcode
        process.kill()
        assert code == 0


def run_scale(n: int = 8) -> None:
    from models.kernels_to_tune import scale

    scale[(1,)](torch.zeros(n), n)


def run_shift() -> None:
    from models.kernels_to_tune import shift

    shift[(1,)](torch.zeros(8), 8, BLOCK=16)


def compiled(folder: Path) -> int:
    return len(list((folder / "triton").rglob("*.cubin")))


def test_candidates_are_compiled_in_other_processes_and_the_fastest_runs(
    gpu: FakeGpu, compiler: Compiler, tmp_path: Path
) -> None:
    with installed(Tuner(Choices(), compiler, TRITON)) as tuner:
        run_scale()
        run_scale()
    assert compiler.compiled == 6 == compiled(tmp_path)
    assert gpu.launches == [("scale", 2)] * 2
    assert [tuned.candidates for tuned in tuner.tuned] == [6], "tuned once"


def test_all_are_timed_shortly_and_the_best_few_at_length(gpu: FakeGpu, compiler: Compiler) -> None:
    with installed(Tuner(Choices(), compiler, TRITON)):
        run_scale()
    short = [warps for warps, length in gpu.timings if length == SCREENING_MS[1]]
    long = [warps for warps, length in gpu.timings if length == FINAL_MS[1]]
    assert sorted(short) == [1, 1, 2, 2, 4, 4]
    assert sorted(long) == [2, 2, 4, 4]
    assert len(long) == FINALISTS


def test_a_rehearsal_launches_nothing_and_compiles_everything(
    gpu: FakeGpu, compiler: Compiler, tmp_path: Path
) -> None:
    with installed(Tuner(Choices(), compiler, TRITON)) as tuner:
        with tuner.rehearsing():
            run_scale()
            run_shift()
            run_scale()
        assert gpu.launches == gpu.timings == []
        assert compiler.compiled == 7
        run_scale()
        run_shift()
    assert gpu.launches == [("scale", 2), ("shift", 4)]
    assert compiler.compiled == 7 == compiled(tmp_path), "the step compiled nothing more"


def test_a_known_choice_is_used_without_tuning(gpu: FakeGpu, compiler: Compiler, tmp_path: Path) -> None:
    folder = tmp_path / "choices"
    with installed(Tuner(Choices(save_to=[folder]), compiler, TRITON)):
        run_scale()
    from models.kernels_to_tune import scale

    scale.cache.clear()
    gpu.timings.clear()
    with installed(Tuner(Choices.read([folder]), compiler, TRITON)) as tuner:
        run_scale()
        assert tuner.tuned == []
        run_scale(9)
    assert [tuned.key.values[0] for tuned in tuner.tuned] == [9], "another key is tuned"
    assert gpu.launches == [("scale", 2)] * 3


def test_a_choice_that_is_no_candidate_is_passed_over(gpu: FakeGpu, compiler: Compiler) -> None:
    choices = Choices()
    with installed(Tuner(choices, compiler, TRITON)):
        run_scale()
    ((key, choice),) = choices.known.values()
    choices.known[key.name] = (key, {**choice, "num_warps": 16})
    from models.kernels_to_tune import scale

    scale.cache.clear()
    with installed(Tuner(choices, compiler, TRITON)) as tuner:
        run_scale()
    assert len(tuner.tuned) == 1


def test_fla_reads_the_files_with_its_own_loader(gpu: FakeGpu, compiler: Compiler, tmp_path: Path) -> None:
    with installed(Tuner(Choices(save_to=[tmp_path / "choices"]), compiler, TRITON)):
        run_scale()
    file = FLA_CACHE.KernelConfigFile.from_file(tmp_path / "choices" / "scale.json")
    from models.kernels_to_tune import scale

    key = FLA_CACHE.AutotuneKey.build(scale.arg_names, scale.keys, (torch.zeros(8), 8), {})
    found = file.lookup_exact(key)["config"]
    assert found["num_warps"] == 2
    assert found == candidate(scale.cache[key.autotune_key])


def test_tritons_autotuners_are_left_as_they_were(gpu: FakeGpu, compiler: Compiler) -> None:
    from triton.runtime.autotuner import Autotuner

    before = {
        name: getattr(Autotuner, name) for name in ("run", "_bench", "prune_configs", "check_disk_cache")
    }
    with (
        installed(Tuner(Choices(), compiler, TRITON)) as tuner,
        pytest.raises(ValueError),
        tuner.rehearsing(),
    ):
        raise ValueError
    assert {name: getattr(Autotuner, name) for name in before} == before


def test_a_broken_pool_costs_time_alone(gpu: FakeGpu, tmp_path: Path) -> None:
    def die() -> None:
        raise SystemExit(1)

    with installed(Tuner(Choices(), Compiler(1, die), TRITON)):
        run_scale()
    assert gpu.launches == [("scale", 2)]


def test_what_cannot_be_compiled_is_told(gpu: FakeGpu, compiler: Compiler) -> None:
    from models.kernels_to_tune import shift

    job = capture(shift, lambda: shift.run(torch.zeros(8), 8, BLOCK=17, grid=(1,), warmup=True))
    assert job is not None
    (problem,) = wait([compiler.submit(job)])
    assert "power of 2" in problem


class Config:
    """A candidate, as an autotuner has it."""

    num_warps = num_stages = num_ctas = 1
    maxnreg = None

    def __init__(self, name: str) -> None:
        self.kwargs = {"name": name}


def ask(tuner: Tuner, offered: str, tune: Callable[[], str]) -> str:
    """The choice among the letters of `offered`; `tune` gives the one that this rank finds fastest."""
    configs = {name: Config(name) for name in offered}
    chosen = tuner._agree(tuner._store, "kernels/q", list(configs.values()), lambda: configs[tune()])
    return chosen.kwargs["name"]


def ranks(store: dist.Store, count: int, patience: float = 20.0) -> list[Tuner]:
    return [
        Tuner(Choices(), Compiler(1, lambda: None), TRITON, rank=rank, store=store, patience=patience)
        for rank in range(count)
    ]


def test_all_ranks_take_the_choice_of_the_one_that_decides() -> None:
    store = dist.HashStore()
    tuners = ranks(store, 4)
    tuners[0].announce()
    found: dict[int, str] = {}
    tuned: list[int] = []

    def work(rank: int) -> None:
        def tune() -> str:
            tuned.append(rank)
            return "abcd"[rank]

        found[rank] = ask(tuners[rank], "abcd", tune)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tuned) == 1
    assert found == dict.fromkeys(range(4), "abcd"[tuned[0]])


def test_a_rank_that_waits_in_vain_tunes_and_the_first_answer_stays() -> None:
    store = dist.HashStore()
    zero, one, two = ranks(store, 3, patience=0.2)
    zero.announce()
    store.add("kernels/q/claim", 1)  # by a rank that never answers

    def slow() -> str:  # while this rank tunes, rank 2 loses its patience too, and is faster
        assert ask(two, "ab", lambda: "a") == "a"
        return "b"

    assert ask(one, "ab", slow) == "a"
    assert ask(zero, "ab", lambda: "b") == "a"


def test_files_of_choices_survive_writers_at_once_and_damage(tmp_path: Path) -> None:
    keys = [Key("m", "kernel", (n, "torch.float32")) for n in range(40)] + [
        Key("other", "kernel", (0, "torch.float32"))
    ]
    choice = {
        "kwargs": {},
        "num_warps": 1,
        "num_stages": 1,
        "num_ctas": 1,
        "maxnreg": None,
        "ir_override": None,
    }

    def write(part: list[Key]) -> None:
        choices = Choices(save_to=[tmp_path])
        for key in part:
            choices.add(key, choice, TRITON)

    threads = [threading.Thread(target=write, args=(keys[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / "torn.json").write_text('{"autotune_entries": {')
    assert Choices.read([tmp_path]).known == {key.name: (key, choice) for key in keys}
    assert json.loads((tmp_path / "kernel.json").read_text())["triton_version"] == TRITON
