"""Kernels on a GPU: tuned in parallel, chosen once, packed, and found again by a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_recipes import WriteRecipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def flame(cache: Path, *arguments: object) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    command = [sys.executable, "-m", "flame", *map(str, arguments)]
    done = subprocess.run(
        command, env={**kept, "FLAME_KERNEL_CACHE": str(cache)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_warmed_kernels_are_packed_unpacked_and_train_without_tuning(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = write_recipe("first", steps=6)
    told = flame(tmp_path / "here", "kernels", "warm", recipe, "--json")
    report = json.loads(told[told.index("{\n") :])
    assert report["tuning"]["tuned"]
    assert report["chosen"]["tuned"] == []
    flame(tmp_path / "here", "kernels", "pack", tmp_path / "k.tar.zst")
    flame(tmp_path / "there", "kernels", "unpack", tmp_path / "k.tar.zst")
    before = cubins(tmp_path / "there")
    flame(tmp_path / "there", "train", recipe)
    assert cubins(tmp_path / "there") == before, "training compiled something that warm had not"
    flame(tmp_path / "here", "train", write_recipe("second", steps=6))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def cubins(folder: Path) -> set[str]:
    return {path.name + path.parent.name for path in folder.rglob("*.cubin")}


def test_a_run_keeps_its_choices(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    flame(tmp_path / "cache", "train", write_recipe("run", steps=2))
    kept = {path.name: path.read_text() for path in (tmp_path / "run" / "kernels").rglob("*.json")}
    users = {path.name: path.read_text() for path in (tmp_path / "cache").rglob("choices/*.json")}
    assert kept == users
    assert kept
