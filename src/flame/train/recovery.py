"""The supervisor of a run's processes on one machine, and a worker's side of the bargain.

`supervise` starts the ranks from a warm parent, restarts them after a crash or a hang, passes a stop request
on, and leaves no process behind. It is torch's elastic agent with five differences: signals are requests to
stop, not deaths; survivors of a crash are killed at once, before they can begin anything with a dead
peer; ranks that hang are killed, too; wrong input is never retried; and a crash that repeats without
progress, or more crashes than the budget allows, end the run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import orjson
import torch.multiprocessing.spawn  # noqa: F401  # pyright: ignore[reportUnusedImport]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from flame.errors import Exit, FlameError, TrainingError
from flame.train.config import RecoveryConfig
from flame.train.journal import event, read_lines
from flame.train.lifeline import STOP_SIGNALS, StopFlag, die_with_parent
from flame.train.restarts import Budget, Recovery, trains_again
from flame.train.watchdog import Hang, Watchdog, be_watched, make_files

MONITOR_SECONDS = 0.1
WITHOUT_END = 10**6  # restarts as torch's agent counts them; ours end by `Budget`

HOPELESS = 4  # a rank's exit code: training has failed in a way that a restart would repeat
WARM_PARENT_LOST = 255  # what multiprocessing says of a process when its fork server was killed

Work = Callable[..., int]


# ------------------------------------------------------------------------------- supervisor


def supervise(
    work: Work,
    args: tuple[Any, ...],
    *,
    run: Path,
    ranks: int,
    max_restarts: int,
    config: RecoveryConfig,
) -> Exit:
    """Runs `work(*args)` on `ranks` processes of this machine until it is done, stopped or hopeless.

    `work` is a module-level function that returns an exit code; see `worker`. `max_restarts`: within
    `config.restart_window`.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours, below
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # `Supervisor` says the same shorter
    with tempfile.TemporaryDirectory(prefix="flame-") as scratch:
        rendezvous = get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                min_nodes=1,
                max_nodes=1,
                local_addr="localhost",
                is_host=True,
            )
        )
        spec = WorkerSpec(
            role="flame",
            local_world_size=ranks,
            rdzv_handler=rendezvous,
            entrypoint=worker,
            args=(run / "logs", Path(scratch), work, *args),
            max_restarts=WITHOUT_END,
            monitor_interval=MONITOR_SECONDS,
            master_addr="localhost",
        )
        budget = Budget(max_restarts, 60.0 * config.restart_window.amount)
        agent = Supervisor(spec, DefaultLogsSpecs(log_dir=scratch), run, Path(scratch), config, budget)
        agent.take_signals()
        try:
            result = agent.run()
        finally:
            rendezvous.shutdown()
    for number in STOP_SIGNALS:  # too late to stop anything: the exit code stays what the run came to
        signal.signal(number, signal.SIG_IGN)
    return agent.verdict(result)


_Agent: Any = LocalElasticAgent  # its methods are wrapped by an untyped decorator


class Supervisor(_Agent):  # pyright: ignore[reportUntypedBaseClass]
    """torch's elastic agent for one run directory."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: LogsSpecs,
        run: Path,
        scratch: Path,
        config: RecoveryConfig,
        budget: Budget,
    ) -> None:
        """`scratch`: a folder for what ranks and supervisor tell each other."""
        super().__init__(spec, logs, start_method="forkserver", exit_barrier_timeout=5)
        self._run_directory = run
        self._scratch = scratch
        self._config = config
        self._budget = budget
        self._watchdog: Watchdog | None = None
        self._hang: Hang | None = None
        self._recovery: Recovery | None = None  # under way
        self._looked = time.monotonic()
        self._stop_signal: int | None = None
        self._passed_on = False
        self._final: tuple[Exit, str] | None = None  # what no restart can mend: exit code and reason
        self._dead: dict[int, int] = {}  # ranks that ended by themselves, and their exit codes

    # signals

    def take_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop_signal == signal.SIGINT and number == signal.SIGINT:
            os._exit(130)  # asked twice: the warm parent and the workers die with this process
        self._stop_signal = self._stop_signal or number

    def _pass_on(self) -> None:
        """Passes a stop request to the workers, once."""
        if self._stop_signal is None or self._passed_on:
            return
        self._passed_on = True
        self._remaining_restarts = 0
        step, name = last_step(self._run_directory), signal.Signals(self._stop_signal).name
        took = last_save_seconds(self._run_directory)
        event(self._run_directory, "signal", step=step, signal=name, last_save_seconds=took)
        before = "" if took is None else f"; the last save took {took:.1f} s"
        print(f"flame: {name}: saving and stopping{before}", file=sys.stderr, flush=True)
        self._kill(signal.SIGTERM)

    def _kill(self, number: int) -> None:
        for process in self._processes():
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def _processes(self) -> list[Any]:
        context: Any = self._pcontext
        return [] if context is None or context._pc is None else list(context._pc.processes)

    # what the agent's loop calls

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._pause()
        make_files(self._scratch, worker_group.spec.local_world_size)
        pids: dict[int, int] = super()._start_workers(worker_group)
        self.take_signals()
        self._watchdog = Watchdog(self._config, self._scratch, pids)
        if self._recovery is not None:
            self._recovery.pids = list(pids.values())
        return pids

    def _pause(self) -> None:
        """Waits before a start where the last ones led nowhere; a stop request ends it."""
        until = time.monotonic() + self._budget.pause_seconds
        while time.monotonic() < until and self._stop_signal is None:
            time.sleep(MONITOR_SECONDS)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._pass_on()
        self._dead = self._deaths()
        if self._dead:
            self._kill(signal.SIGKILL)  # the survivors
        elif self._watchdog is not None:
            self._look(self._watchdog)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self._on_failure()
        elif result.state == WorkerState.SUCCEEDED:
            self._recovered()
        self._looked = time.monotonic()
        return result

    def _look(self, watchdog: Watchdog) -> None:
        """Ends ranks that hang, and notes when restarted ones have made a step."""
        if self._recovery is not None and trains_again(list(watchdog.beats().values())):
            self._recovered()
        self._hang = hang = watchdog.look(self._stacks_file)
        if hang is None:
            return
        waited, step = round(hang.waited_seconds, 1), last_step(self._run_directory)
        event(
            self._run_directory, "hang", step=step, rank=hang.rank, phase=hang.phase, seconds=waited,
            limit_seconds=round(hang.limit_seconds, 1), stacks=str(hang.stacks),
        )  # fmt: skip
        print(
            f"flame: no step for {waited} s: rank {hang.rank} is behind ({hang.phase}, step {hang.step}); "
            f"what every rank was doing is in {hang.stacks}",
            file=sys.stderr,
        )
        self._kill(signal.SIGKILL)
        for process in self._processes():
            process.join(5)
        self._dead = self._deaths()

    def _stacks_file(self) -> Path:
        return self._run_directory / "logs" / time.strftime("stacks-%Y%m%d-%H%M%S.txt")

    def _recovered(self) -> None:
        """Writes down the restart that has come to its first step, or to the end of its attempt."""
        recovery, self._recovery = self._recovery, None
        if recovery is None or self._watchdog is None or not recovery.pids:
            return
        parts = recovery.parts(list(self._watchdog.beats().values()))
        seconds = round(sum(parts.values()), 3)
        event(
            self._run_directory, "restart", step=recovery.step, attempt=recovery.attempt, pids=recovery.pids,
            seconds=seconds, parts=parts,
        )  # fmt: skip
        if "first_step" in parts:
            listed = ", ".join(f"{part.replace('_', ' ')} {value:.1f}" for part, value in parts.items())
            print(f"flame: training again after {seconds:.1f} s ({listed})", file=sys.stderr)

    def _deaths(self) -> dict[int, int]:
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes())}
        return {rank: code for rank, code in codes.items() if code not in (None, 0)}

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGKILL)
        if self._recovery is not None and not self._recovery.pids:
            self._recovery.stopped = time.monotonic()

    def _on_failure(self) -> None:
        """Notes which rank was lost, and whether a restart can help."""
        self._dead = self._dead or self._deaths()
        self._recovered()
        for final, reported in ((Exit.WRONG_INPUT, Exit.WRONG_INPUT), (HOPELESS, Exit.FAILED)):
            ranks = [rank for rank, code in self._dead.items() if code == final]
            if ranks:
                self._final = reported, self._said(ranks[0])
                self._remaining_restarts = 0
                return
        if self._stop_signal is not None:
            return
        rank, how = self._culprit()
        step, pid = last_step(self._run_directory), self._processes()[rank].pid
        event(self._run_directory, "rank_lost", step=step, rank=rank, pid=pid, how=how)
        again = "starting again"
        if not self._budget.crash(step):
            self._remaining_restarts = 0
            within = f"{self._budget.recent} crashes within {self._config.restart_window}"
            again = f"giving up ({'no new step' if self._budget.fruitless else within})"
        print(f"flame: rank {rank} was lost ({how}) after step {step}; {again}", file=sys.stderr)
        now = time.monotonic()
        detect = self._hang.waited_seconds if self._hang else now - self._looked
        self._recovery = Recovery(step, self._budget.crashes, now, detect)

    def _culprit(self) -> tuple[int, str]:
        """The rank that failed, and how."""
        if self._hang is not None:
            return self._hang.rank, f"hung for {self._hang.waited_seconds:.0f} s, {self._hang.phase}"
        # a rank that a signal ended comes before one that only lost its peer
        rank = min(self._dead, key=lambda rank: (self._dead[rank] > 0, rank))
        return rank, described(self._dead[rank], self._said(rank))

    def _said(self, rank: int) -> str:
        """The error that a rank wrote down before it left; empty where it could not."""
        context: Any = self._pcontext
        path = Path(context.error_files[rank])
        return str(orjson.loads(path.read_bytes())["message"]["message"]) if path.exists() else ""

    # the end

    def verdict(self, result: RunResult) -> Exit:
        """The run's exit code."""
        if result.state == WorkerState.SUCCEEDED:
            return Exit(max(result.return_values.values()))
        if self._final is not None:
            code, why = self._final
            if code == Exit.FAILED:
                event(self._run_directory, "failed", step=last_step(self._run_directory), why=why)
            print(f"flame: {why}", file=sys.stderr)
            return code
        if self._stop_signal is not None and {-signal.SIGTERM, int(Exit.STOPPED)} & {*self._dead.values()}:
            return Exit.STOPPED  # a worker that has begun to train ends otherwise
        event(self._run_directory, "failed", step=last_step(self._run_directory))
        logs = self._run_directory / "logs"
        print(f"flame: training failed; what the ranks said is in {logs}", file=sys.stderr)
        return Exit.FAILED


def described(code: int, said: str) -> str:
    """How a process ended."""
    if code == WARM_PARENT_LOST:
        return "the process it was forked from is gone"
    if code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}: {said}" if said else f"exit code {code}"


def last_step(run: Path) -> int:
    """The last step in a run's metrics, 0 where there is none."""
    return max((record["step"] for record in read_lines(run / "metrics.jsonl")), default=0)


def last_save_seconds(run: Path) -> float | None:
    """How long the newest save took, from its pause to its manifest; None where there is none yet."""
    saves = [e for e in read_lines(run / "events.jsonl") if e["event"] == "checkpoint_saved"]
    return round(saves[-1]["seconds"] + saves[-1]["pause_seconds"], 3) if saves else None


# ----------------------------------------------------------------------------------- worker


def worker(logs: Path, scratch: Path, work: Work, *args: Any) -> int:
    """A supervised process: dies with its supervisor, and turns errors into exit codes.

    `work(stop, *args)` gets the flag that a stop request sets. What a crash says goes to `logs`; in
    `scratch` the rank's heart beats.
    """
    stop = StopFlag()
    die_with_parent()
    be_watched(scratch, int(os.environ["LOCAL_RANK"]))
    os.setsid()  # Ctrl-C goes to the supervisor alone
    try:
        return work(stop, *args)
    except TrainingError as error:
        leave(HOPELESS, str(error))
    except FlameError as error:
        leave(Exit.WRONG_INPUT, str(error))
    except BaseException as error:
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"rank-{os.environ['RANK']}.log").open("a") as log:
            traceback.print_exc(file=log)
        leave(Exit.FAILED, in_a_line(error))


def in_a_line(error: BaseException) -> str:
    """The first line of what an error says, and of what it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = ": ".join([type(error).__name__, *lines[:1]])
    return f"{told} (from {in_a_line(error.__cause__)})" if error.__cause__ is not None else told


def leave(code: int, message: str) -> NoReturn:
    """Ends the process now: a peer may be gone, and destructors of process groups would wait for it."""
    report = {"message": {"message": message, "extraInfo": {"timestamp": "0"}}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_bytes(orjson.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
