"""What a stop request does to a process, from its first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import time
from flame.train.lifeline import StopFlag
stop = StopFlag()
if {trains}:
    stop()
print("ready", flush=True)
while not stop._set:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(30)
"""


def begun(*, trains: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(trains=trains)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_before_anything_was_trained_ends_the_process_with_75(number: int) -> None:
    with begun(trains=False) as process:
        process.send_signal(number)
        assert process.wait(20) == 75


def test_a_request_while_training_waits_for_the_step_and_a_second_interrupt_does_not() -> None:
    with begun(trains=True) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)  # Slurm may ask more than once
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_rank_of_torchrun_takes_a_request_while_it_imports(write_recipe, tmp_path: Path) -> None:
    around = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "flame", "train", str(write_recipe())], env=os.environ | around
    )
    caught = f"{(1 << (signal.SIGTERM - 1)):016x}"
    while not int(status_of(process.pid, "SigCgt"), 16) & int(caught, 16):
        assert process.poll() is None
        time.sleep(0.005)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "before torch is loaded"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def status_of(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(name))
