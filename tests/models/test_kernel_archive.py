"""Kernels packed on one machine and unpacked on another, with files that Triton really compiled."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from flame.models import zoo  # noqa: F401 - fla first: it asks Triton's driver what it is
from flame.models.kernel_archive import KernelError, keep_needed, pack, unpack
from flame.models.kernel_choices import Choices, Key, Platform
from flame.models.kernel_platform import check_kernels, gate_per_head_is_wrong, refusal

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION", "ignore::DeprecationWarning")
H100 = Platform("NVIDIA H100 80GB HBM3", "9.0", "2.11.0+cu130", "3.6.0", "0.6.0")
CHOICE = {
    "kwargs": {"BV": 64},
    "num_warps": 4,
    "num_stages": 2,
    "num_ctas": 1,
    "maxnreg": None,
    "ir_override": None,
}
KEY = Key("fla.ops.gla.chunk", "kernel", (64, None, True, "torch.bfloat16"))


def compile_shift(cache: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it was in the cache."""
    from models.kernels_to_tune import shift
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    hits: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: hits.append(told["cache_hit"]))
    source = ASTSource(shift, {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 16})
    compile_kernel(source, target=GPUTarget("cuda", 90, 32))
    return hits[0]


def parts(folder: Path) -> dict[str, Path]:
    return {"triton": folder / "triton", "inductor": folder / "inductor"}


@pytest.fixture
def warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder as `warm` leaves it, and a candidate in it that no recipe needs."""
    folder, fresh = tmp_path / "here", parts(tmp_path / "fresh")
    Choices({KEY.name: (KEY, CHOICE)}).write(folder / "choices", "3.6.0")
    assert not compile_shift(fresh["triton"], monkeypatch)
    (fresh["inductor"] / "fxgraph").mkdir(parents=True)
    (fresh["inductor"] / "fxgraph" / "graph").write_bytes(b"graph")
    (folder / "triton" / "CANDIDATE").mkdir(parents=True)
    (folder / "triton" / "CANDIDATE" / "kernel.cubin").write_bytes(b"not needed")
    keep_needed(folder, "recipe", fresh, parts(folder))
    shutil.rmtree(tmp_path / "fresh")
    return folder


def test_kept_kernels_are_found_at_their_new_place(warmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_shift(warmed / "triton", monkeypatch)


@pytest.mark.parametrize("suffix", ["zst", "xz"])
def test_unpacked_kernels_are_found_and_nothing_else_travels(
    warmed: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, there = tmp_path / f"k.tar.{suffix}", tmp_path / "there"
    pack(archive, H100, warmed, parts(warmed))
    shutil.rmtree(warmed)
    counts = unpack(archive, H100, there, parts(there))
    assert counts["choices"] == counts["inductor"] == 1
    assert compile_shift(there / "triton", monkeypatch)
    assert Choices.read([there / "choices"]).find(KEY) == CHOICE
    assert not (there / "triton" / "CANDIDATE").exists()
    again = tmp_path / f"again.tar.{suffix}"
    pack(again, H100, there, parts(there))
    assert unpack(again, H100, tmp_path / "third", parts(tmp_path / "third")) == counts


def test_unpacking_keeps_the_choices_that_are_there(warmed: Path, tmp_path: Path) -> None:
    there, other = tmp_path / "there", Key("m", "kernel", (1, "torch.float32"))
    Choices({other.name: (other, CHOICE)}).write(there / "choices", "3.6.0")
    pack(tmp_path / "k.tar.zst", H100, warmed, parts(warmed))
    unpack(tmp_path / "k.tar.zst", H100, there, parts(there))
    assert Choices.read([there / "choices"]).known.keys() == {KEY.name, other.name}


@pytest.mark.parametrize(
    "field, value", [("gpu", "NVIDIA A100"), ("triton", "3.9.0"), ("torch", "2.13.0"), ("fla", "0.6.1")]
)
def test_an_archive_of_another_machine_is_refused(
    warmed: Path, tmp_path: Path, field: str, value: str
) -> None:
    pack(tmp_path / "k.tar.zst", H100, warmed, parts(warmed))
    there = tmp_path / "there"
    with pytest.raises(KernelError, match=rf"packed for {field} .*here {value}"):
        unpack(tmp_path / "k.tar.zst", dataclasses.replace(H100, **{field: value}), there, parts(there))
    assert not there.exists()


def test_a_damaged_archive_is_refused_and_nothing_is_written(warmed: Path, tmp_path: Path) -> None:
    archive, there = tmp_path / "k.tar.zst", tmp_path / "there"
    pack(archive, H100, warmed, parts(warmed))
    whole = archive.read_bytes()
    for broken in (whole[: len(whole) // 2], b"no archive", b""):
        archive.write_bytes(broken)
        with pytest.raises(KernelError, match=r"k\.tar\.zst"):
            unpack(archive, H100, there, parts(there))
    assert not there.exists()
    with pytest.raises(KernelError, match="no such archive"):
        unpack(tmp_path / "none.tar.zst", H100, there, parts(there))
    with pytest.raises(KernelError, match="name the archive"):
        pack(tmp_path / "k.zip", H100, warmed, parts(warmed))


def test_packing_what_was_never_warmed_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="flame kernels warm"):
        pack(tmp_path / "k.tar.zst", H100, tmp_path / "empty", parts(tmp_path / "empty"))


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0"])
def test_gated_deltanet_on_hopper_is_refused_where_triton_is_wrong(version: str) -> None:
    reason = refusal("gated_deltanet", (9, 0), version, tilelang=False)
    assert reason is not None
    assert "pip install tilelang" in reason
    assert "3.7.1" in reason
    assert refusal("gated_deltanet", (9, 0), version, tilelang=True) is None
    assert refusal("gated_deltanet", (8, 0), version, tilelang=False) is None
    assert refusal("gla", (9, 0), version, tilelang=False) is None
    # for Mamba2 tilelang has nothing, and GLA's kernels serve
    assert refusal("mamba2", (9, 0), version, tilelang=False) is None
    assert gate_per_head_is_wrong((9, 0), version)
    assert not gate_per_head_is_wrong((8, 0), version)


@pytest.mark.parametrize("version", ["3.3.1", "3.7.1", "3.9.0"])
def test_gated_deltanet_on_hopper_trains_with_other_versions(version: str) -> None:
    assert refusal("gated_deltanet", (9, 0), version, tilelang=False) is None


def test_a_cpu_needs_no_check() -> None:
    assert check_kernels(["gated_deltanet"], torch.device("cpu")) == []
