"""No process outlives the one that started it: not a rank its warm parent, nor that its supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # requests to save and stop
PR_SET_PDEATHSIG = 1
WARM_PARENT = "FLAME_WARM_PARENT"  # set where the process to come is a warm parent


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
