"""Faults at random moments of supervised runs: is anything lost, and how long until the next step?

    python benchmarks/faults.py [--faults 200] [--seconds S] [--kinds kill,stop] [--folder DIR] [--json FILE]

Each run suffers some faults; its rows, losses, gradient norms and final parameters are then compared with
those of an undisturbed run. Results are appended to DIR/faults.jsonl, one line a fault, so that a campaign
that is interrupted goes on. Ranks are gloo processes, forked from a warm parent as those of `flame train`;
for `launcher` it is `flame train` itself that is killed and started again: its seconds hold a cold start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from machine import machine
from text import prepare
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flame import schema
from flame.commands.train import WARM, WARM_WITHOUT_GPU, warm_parent
from flame.recipe import Recipe, read_recipe
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps, step_directory

RANKS, STEPS, EVERY, FAULTS_A_RUN = 2, 60, 8, 2
FULL_BYTES = 100_000  # what a file may hold while a disk is full: a line of metrics, no shard of a checkpoint
PATIENCE_SECONDS = 240
EXACT = ("step", "tokens", "rows_digest", "learning_rate", "loss", "grad_norm")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segfault": signal.SIGSEGV}
DAMAGED = ("corrupt", "truncated")  # the newest checkpoint is damaged, then a rank is killed
ASKED = ("exception", "crash_in_save", "disk_full")  # the rank does it, when a file asks for it
KINDS = (*SIGNALS, *DAMAGED, *ASKED, "launcher")

MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 512,
}  # fmt: skip
RECIPE = """
run = {{directory = "{run}", seed = 7, steps = {steps}, max_restarts = 100}}
model = {{config = "{model}"}}
tokenizer = {{path = "{tokenizer}"}}
data = {{sequence_length = 64, sources = [{{name = "python", files = "{text}"}}]}}
batch = {{tokens_per_step = 256}}
optimizer = {{learning_rate = 3e-3}}
checkpoint = {{every = "{every} steps"}}
logging = {{tensorboard = false}}
recovery = {{hang_seconds = 3, save_seconds = 6}}
"""

CONTEXT = multiprocessing.get_context("forkserver")


# ------------------------------------------------------------------------------------- processes


def suffering(stop: Callable[[], bool], text: str, asked: str) -> int:
    """A rank that does what the files in the folder `asked` ask of it."""
    from flame.run import work
    from flame.train import checkpoint, loop

    folder, rank = Path(asked), os.environ["RANK"]
    train_step, seal = loop.train_step, checkpoint.file_seal
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(*args: Any, **kwargs: Any) -> Any:
        full = (folder / f"disk_full-{rank}").exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, unlimited[1]) if full else unlimited)
        if taken(folder / f"exception-{rank}"):
            raise RuntimeError("asked for by the campaign")
        return train_step(*args, **kwargs)

    def sealed(path: Path) -> Any:
        if taken(folder / f"crash_in_save-{rank}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return seal(path)

    loop.train_step, checkpoint.file_seal = step, sealed
    return work(stop, text)


def taken(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def launcher(recipe: Recipe, asked: str) -> None:
    """A supervisor, as `flame train` is one after its imports."""
    from flame.train import recovery

    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    output = os.open(recipe.directory / "said", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warm_parent((*WARM, *WARM_WITHOUT_GPU))
    code = recovery.supervise(
        suffering,
        (schema.to_toml(recipe), asked),
        run=recipe.directory,
        ranks=RANKS,
        max_restarts=recipe.run.max_restarts,
        config=recipe.recovery,
    )
    sys.exit(code)


class Run:
    """A run in a folder of its own."""

    def __init__(self, folder: Path, name: str, *, cold: bool = False) -> None:
        """`cold`: by the command line, in a process without anything imported."""
        self.path, self._cold = folder / name, cold
        self._asked = folder / f"{name}-asked"
        for path in (self.path, self._asked):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        text, tokenizer = prepare(folder, 3_000_000, 512)
        (folder / "model.json").write_text(json.dumps(MODEL))
        self._recipe = folder / f"{name}.toml"
        self._recipe.write_text(
            RECIPE.format(
                run=self.path, steps=STEPS, every=EVERY, text=text, tokenizer=tokenizer,
                model=folder / "model.json",
            )
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        if self._cold:
            command = [sys.executable, "-m", "flame", "train", str(self._recipe), "--nproc", str(RANKS)]
            with (self.path / "said").open("a") as said:
                self._process: Any = subprocess.Popen(
                    command, stdout=said, stderr=said, start_new_session=True
                )
        else:
            arguments = (read_recipe(self._recipe), str(self._asked))
            self._process = CONTEXT.Process(target=launcher, args=arguments)
            self._process.start()

    @property
    def code(self) -> int | None:
        return self._process.poll() if self._cold else self._process.exitcode

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path / "metrics.jsonl"))

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.path / "events.jsonl") if e["event"] in names]

    def last(self) -> int:
        return max((record["step"] for record in self.metrics()), default=0)

    def until(self, there: Callable[[], bool]) -> bool:
        """Waits; whether it came, before the run ended and before patience did."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            if self.code is not None or time.monotonic() > deadline:
                return there()
            time.sleep(0.02)
        return True

    def suffer(self, kind: str, numbers: random.Random) -> None:
        """One fault, now."""
        rank = numbers.randrange(RANKS)
        if kind == "launcher":
            self._process.kill()
            self._process.wait()
            self.start()
        elif kind in ASKED:
            (self._asked / f"{kind}-{rank}").touch()
        else:
            if kind in DAMAGED and (steps := saved_steps(self.path)):
                damage(step_directory(self.path, steps[-1]), kind)
            pids = self.events("start", "resume")[-1]["pids"]
            os.kill(pids[rank], SIGNALS.get(kind, signal.SIGKILL))

    def heal(self) -> None:
        """Disks are not full any more."""
        for path in self._asked.glob("disk_full-*"):
            path.unlink()

    def end(self) -> int | None:
        """Waits for the end; the exit code."""
        self.until(lambda: False)
        if self.code is None:
            self._process.kill()
        return self.code


def damage(checkpoint: Path, kind: str) -> None:
    file = next(checkpoint.glob("__1_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if kind == "corrupt" else content[: len(content) // 2])


# -------------------------------------------------------------------------------------- campaign


def figures(run: Run) -> list[Any]:
    """Everything that must be equal: of each step, and the final parameters and optimizer state, in bits."""
    steps = [[record[key] for key in EXACT] for record in run.metrics()]
    return [steps, tensor_hashes(step_directory(run.path, STEPS))]


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """Of each tensor; which rank's file holds it, and where, is not always the same."""
    reader = dcp.FileSystemReader(checkpoint)
    saved = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in saved.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # that it reads alone is what was asked for
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {key: hashlib.blake2b(tensor.numpy().tobytes()).hexdigest() for key, tensor in state.items()}


def one_run(folder: Path, seed: int, kinds: tuple[str, ...], undisturbed: list[Any]) -> list[dict[str, Any]]:
    """Faults of chosen kinds at random moments of one run; a result for each."""
    numbers = random.Random(seed)
    cold = "launcher" in kinds
    run, results = Run(folder, "run", cold=cold), []
    for number, kind in enumerate(kinds):
        first = 2 + number * STEPS // len(kinds)
        at = numbers.randrange(first, first + STEPS // len(kinds) - 2 * EVERY)
        least = 2 if kind in DAMAGED else 0  # checkpoints: where none is whole, a run is never begun again
        if not run.until(lambda at=at, n=least: run.last() >= at and len(saved_steps(run.path)) >= n):
            break
        began, before, restarts = time.time(), run.last(), len(run.events("start", "resume"))
        saves = len(run.events("checkpoint_failed"))
        run.suffer(kind, numbers)
        if kind == "disk_full":
            came = run.until(lambda n=saves: len(run.events("checkpoint_failed")) > n)
            run.heal()
            results.append({"kind": kind, "came": came, "recovery_seconds": None, "recomputed": 0})
            continue
        came = run.until(lambda n=restarts: len(run.events("start", "resume")) > n)
        after = run.events("start", "resume")[-1]["step"]
        reached = max((e["step"] for e in run.events("rank_lost")[-1:]), default=before)
        came = came and run.until(lambda after=after: run.last() > after)
        fault = began if kind not in ASKED else run.events("rank_lost")[-1]["time"]
        seconds = round(time.time() - fault, 2)
        recomputed = max(before, reached) - after
        results.append({"kind": kind, "came": came, "recovery_seconds": seconds, "recomputed": recomputed})
    code = run.end()
    equal = code == 0 and figures(run) == undisturbed
    return [
        {"seed": seed, **result, "code": code, "survived": equal and result["came"]} for result in results
    ]


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a kind."""
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        found = [line for line in lines if line["kind"] == kind]
        seconds = [line["recovery_seconds"] for line in found if line["recovery_seconds"] is not None]
        if found:
            rows.append(
                {
                    "kind": kind,
                    "count": len(found),
                    "survived": sum(line["survived"] for line in found),
                    "median_seconds": median(seconds) if seconds else None,
                    "worst_seconds": max(seconds) if seconds else None,
                    "recomputed_steps": sum(line["recomputed"] for line in found) / len(found),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="in all, earlier ones included")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    kinds: list[str] = options.kinds.split(",")
    CONTEXT.set_forkserver_preload(["flame.train.recovery"])
    log, deadline = folder / "faults.jsonl", time.monotonic() + options.seconds
    undisturbed = Run(folder, "undisturbed")
    assert undisturbed.end() == 0, "the undisturbed run failed"
    expected = figures(undisturbed)
    while len(lines := list(read_lines(log))) < options.faults and time.monotonic() < deadline:
        counts = {kind: sum(line["kind"] == kind for line in lines) for kind in kinds}
        wanted = sorted(kinds, key=lambda kind: counts[kind])[
            : min(FAULTS_A_RUN, options.faults - len(lines))
        ]
        if "launcher" in wanted:
            wanted = ["launcher"] * len(wanted)
        results = one_run(folder, len(lines), tuple(wanted), expected)
        if not results:
            raise SystemExit(f"no fault could be injected; see {folder / 'run' / 'said'}")
        with log.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)
        for result in results:
            print(json.dumps(result), file=sys.stderr, flush=True)
    result = {**machine(), "ranks": RANKS, "faults": table(list(read_lines(log)))}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
