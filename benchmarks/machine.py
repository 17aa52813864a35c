"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flame.environment import processor_name

PACKAGES = ("torch", "tokenizers", "gigatoken", "fastokens", "numpy")


def machine() -> dict[str, Any]:
    """Hardware, versions and the load of the last minute."""
    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": packages,
    }
