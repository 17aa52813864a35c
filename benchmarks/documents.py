"""Padding with whole documents: flame's rule for what a window takes, and two others.

    python benchmarks/documents.py --json benchmarks/results/documents.json

Prints a line for each kind of lengths (log-normal, cut at a row of 4,096 tokens) and rows of a lane's window.
The share of padding where each document goes into the fullest row at once (online), where the longest first
of as many as fit are laid out (flame), and where these rows then take what fits of the next 63 (ahead).
The milliseconds that flame's packing takes for a million tokens. Unfilled last windows do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np

from flame.data.packing import LENGTH, pack_whole
from flame.data.packing import ROW as ROW_OF

ROW = 4096
KINDS = {"chats": (600, 1.0), "long tail": (1000, 1.3), "short": (300, 0.5)}  # mean, sigma
AHEAD = 63


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=30000)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    options = parser.parse_args()
    results: list[dict[str, float | str]] = []
    print("lengths    rows  online  flame   ahead   ms a million tokens")
    for kind, (mean, sigma) in KINDS.items():
        draws = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, options.documents)
        lengths: list[int] = np.clip(draws.astype(int), 8, ROW).tolist()
        for rows in (2, 8, 32, 128):
            flame, cost = padding_of_windows(lengths, rows, 0)
            found = online_padding(lengths, rows), flame, padding_of_windows(lengths, rows, AHEAD)[0]
            shown = "  ".join(f"{100 * share:5.2f}%" for share in found)
            print(f"{kind:<10} {rows:4}  {shown}  {cost:5.1f}", flush=True)
            shares = dict(
                zip(("online", "flame", "ahead"), (round(share, 5) for share in found), strict=True)
            )
            results.append({"lengths": kind, "rows": rows, **shares, "milliseconds": round(cost, 1)})
    if options.json:
        options.json.write_text(json.dumps({"row": ROW, "results": results}, indent=1) + "\n")


def online_padding(lengths: list[int], rows: int) -> float:
    """Each document into the fullest row that has room, until one has none."""
    rooms = [ROW] * rows
    windows = used = whole = 0
    for length in lengths:
        place = bisect_left(rooms, length)
        if place == rows:
            rooms, windows, whole = [ROW] * rows, windows + 1, used
            place = rows - 1
        insort(rooms, rooms.pop(place) - length)
        used += length
    return 1 - whole / (windows * rows * ROW)


def padding_of_windows(lengths: list[int], rows: int, ahead: int) -> tuple[float, float]:
    """flame's rule; then what fits of the next `ahead` documents, which need not be the first of them; and
    the packing's milliseconds for a million tokens."""
    waiting, at = list[int](), 0
    windows = used = 0
    seconds = 0.0
    while at < len(lengths):
        while at < len(lengths) and sum(waiting) <= rows * ROW + ahead * ROW:
            waiting.append(lengths[at])
            at += 1
        if at == len(lengths):  # the last window is not filled
            break
        total = np.cumsum(waiting)
        most = int(np.searchsorted(total, rows * ROW, side="right"))
        lengths = np.array(waiting[:most], dtype=np.int64)
        begun = time.perf_counter()
        placed, count = pack_whole(lengths, ROW, rows)
        seconds += time.perf_counter() - begun
        rooms = sorted((ROW - np.bincount(placed[:, ROW_OF], placed[:, LENGTH], rows).astype(int)).tolist())
        used += sum(waiting[:count])
        left: list[int] = []
        for i, length in enumerate(waiting[count:]):
            place = bisect_left(rooms, length)
            if i < ahead and place < rows:
                insort(rooms, rooms.pop(place) - length)
                used += length
            else:
                left.append(length)
        waiting, windows = left, windows + 1
    return 1 - used / (windows * rows * ROW), 1e9 * seconds / used


if __name__ == "__main__":
    main()
