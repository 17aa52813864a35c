"""How processes end: at a request, and never later than the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from flame.errors import Exit

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # requests to save and stop
INTERRUPTED = 130  # the exit code of a process that SIGINT ended
PR_SET_PDEATHSIG = 1
WARM_PARENT = "FLAME_WARM_PARENT"  # set where the process to come is a warm parent


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT; read once a step.

    Until it is read for the first time nothing has been trained here that could be saved, and a request ends
    the process at once, with the exit code of a stop. So does a second SIGINT, with that of an interrupt.
    """

    def __init__(self) -> None:
        self._set = self._read = self._interrupted = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self._read:
            os._exit(Exit.STOPPED)
        if self._interrupted and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        self._set, self._interrupted = True, self._interrupted or number == signal.SIGINT

    def __call__(self) -> bool:
        self._read = True
        return self._set


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, and leaves if that has happened."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent == 1 or os.getppid() != parent:
        sys.exit(3)


# Python's fork server can be told what to import, but not what to call: a crash of the supervisor closes
# no pipe that it would notice, since its children hold the same one.
if os.environ.pop(WARM_PARENT, None):
    die_with_parent()
