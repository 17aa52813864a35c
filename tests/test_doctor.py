"""`flame doctor`: what it says of this machine, of a recipe, and of machines that are not well."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement

from flame import cli
from flame.commands import doctor as command
from flame.doctor import gpus, links, machine, storage
from flame.doctor.finding import Finding
from flame.doctor.recipe_parts import Parts, recipe_parts, vocabulary
from flame.recipe import read_recipe

HEALTHY = {
    "index": "0",
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "580.65.06",
    "temperature.gpu": "31",
    "memory.used": "4",
    "memory.total": "81559",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_throttle_reasons.hw_slowdown": "Not Active",
}


def said(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the processes that time links; they have a test of their own."""
    answer = {"gb_per_second": 1.0, "latency_seconds": 1e-4}
    monkeypatch.setattr(links, "measure", lambda backend, ranks: answer)


def test_a_recipe_that_can_train_here_has_no_failing_line(
    write_recipe, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor", str(write_recipe()), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in record["findings"]}
    assert record["ok"] is True
    for name in ("python", "torch", "kernels", "gloo", "layout", "model", "data", "vocabulary"):
        assert found[name]["verdict"] == "ok", found[name]
    assert "gla" in found["model"]["found"]
    assert "python: 1 file" in found["data"]["found"]
    assert {"disk space", "disk speed", "clock", "file limit", "shared memory", "compiler"} <= set(found)
    assert all(finding["fix"] for finding in record["findings"] if finding["verdict"] != "ok")


def test_what_is_wrong_with_a_recipe_is_named_with_its_fix_and_exit_code_1(
    write_recipe, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(replaced={'text.jsonl"': 'gone.jsonl"'})
    small = tmp_path / "small.json"
    small.write_text((tmp_path / "gla.json").read_text().replace("384", "300"))
    assert cli.run(["doctor", str(path), "--model.config", str(small), "--nproc", "99"]) == 1
    out = capsys.readouterr().out
    assert "fail layout" in out
    assert "fail data" in out
    assert "gone.jsonl" in out
    assert out.count("  -> ") >= 2
    assert "2 fail" in out


def test_a_recipe_that_cannot_be_read_is_a_failing_line_among_the_others(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["doctor", str(tmp_path / "none.toml"), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in record["findings"]}
    assert "no such recipe" in found["recipe"]["found"]
    assert found["torch"]["verdict"] == "ok"


def test_two_ranks_are_really_connected_and_timed() -> None:
    measured = links.measure("gloo", 2)
    assert measured["gb_per_second"] > 0, measured
    assert 0 < measured["latency_seconds"] < 60


def test_ranks_that_cannot_connect_are_a_failing_line_and_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "there-is-no-such-interface")
    measured = links.measure("gloo", 2)
    finding = links.judged("gloo", 2, measured)
    assert finding.verdict == "fail"
    assert "rank" in finding.found
    assert "GLOO_SOCKET_IFNAME" in finding.fix


def test_ranks_that_do_not_finish_are_stopped() -> None:
    measured = links.measure("gloo", 2, seconds=0.2)
    assert "did not finish in time" in measured["error"]


def test_links_that_are_slow_are_a_warning() -> None:
    assert links.judged("nccl", 8, {"gb_per_second": 2.0, "latency_seconds": 1e-5}).verdict == "warn"
    assert links.judged("nccl", 8, {"gb_per_second": 300.0, "latency_seconds": 1e-5}).verdict == "ok"


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "models", "verdict"),
    [
        ((9, 0), "3.6.0", False, ["gated_deltanet"], "fail"),
        ((9, 0), "3.6.0", True, ["gated_deltanet"], "ok"),
        ((9, 0), "3.6.0", False, ["gla"], "ok"),
        ((9, 0), "3.6.0", False, ["mamba2"], "warn"),
        ((9, 0), "3.6.0", False, None, "warn"),
        ((9, 0), "3.7.1", False, ["gated_deltanet"], "ok"),
        ((9, 0), "3.3.1", False, ["gated_deltanet"], "ok"),
        ((8, 0), "3.6.0", False, ["gated_deltanet"], "ok"),
    ],
)
def test_kernels_known_to_be_wrong_are_named(
    capability: tuple[int, int], triton: str, tilelang: bool, models: list[str] | None, verdict: str
) -> None:
    finding = gpus.kernels(capability, triton, tilelang=tilelang, model_types=models)
    assert finding.verdict == verdict
    assert (finding.fix == "") == (verdict == "ok")


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (gpus.Seen(8, "13.0", "13.0", 8), "ok"),
        (gpus.Seen(0, "13.0", None, 0), "ok"),
        (gpus.Seen(0, None, "13.0", 8), "fail"),
        (gpus.Seen(0, "13.0", "12.2", 8), "fail"),
    ],
)
def test_a_torch_that_cannot_use_the_gpus_fails(seen: gpus.Seen, verdict: str) -> None:
    assert gpus.torch_and_driver(seen).verdict == verdict


@pytest.mark.parametrize(
    ("changed", "verdict", "word"),
    [
        ({}, "ok", "31 C"),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, "fail", "3 uncorrected"),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]"}, "ok", "H100"),
        ({"memory.used": "70000"}, "warn", "70,000 of 81,559"),
        ({"temperature.gpu": "91"}, "warn", "91 C"),
        ({"clocks_throttle_reasons.hw_slowdown": "Active"}, "warn", "slowed down"),
    ],
)
def test_a_gpus_health_is_read_off_nvidia_smi(
    changed: dict[str, str], verdict: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{', '.join((HEALTHY | changed).values())}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = gpus.health()
    assert (finding.name, finding.verdict) == ("GPU 0", verdict)
    assert word in finding.found
    assert gpus.look().listed == 1


def test_a_driver_that_does_not_answer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = gpus.health()
    assert finding.verdict == "fail"


def test_a_missing_compiler_fails_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert machine.compiler(on_gpu=True).verdict == "fail"
    assert machine.compiler(on_gpu=False).verdict == "warn"


def test_packages_that_do_not_fit_are_named() -> None:
    assert machine.unmet(Requirement("torch>=2.11,<2.14")) is None
    assert "needed is <1" in (machine.unmet(Requirement("torch<1")) or "")
    assert machine.unmet(Requirement("no-such-package>=1")) == "no-such-package is missing"
    assert machine.unmet(Requirement("no-such-package; sys_platform == 'win32'")) is None
    assert machine.unmet(Requirement("no-such-package; extra == 'hub'")) is None


def test_fla_of_two_releases_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"fla-core": "0.5.0", "flash-linear-attention": "0.6.0"}
    monkeypatch.setattr(machine, "version", versions.__getitem__)
    (finding,) = machine.fla_packages()
    assert finding.verdict == "fail"
    assert "fla-core==0.6.0" in finding.fix


def test_a_package_made_for_another_torch_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(name="torchvision", requires=["torch==2.5.0", "torch-else<1"])
    monkeypatch.setattr(metadata, "distributions", lambda: [other])
    assert [name for name, _ in machine.wanting_other_torch()] == ["torchvision"]


def test_little_shared_memory_fails_with_several_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docker = SimpleNamespace(total=64 * 2**20, free=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: docker)
    assert machine.shared_memory(8, tmp_path).verdict == "fail"
    assert machine.shared_memory(1, tmp_path).verdict == "warn"
    assert machine.shared_memory(1, tmp_path / "none").verdict == "warn"


def test_few_open_files_and_cores_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 4096))
    finding = machine.open_files()
    assert finding.verdict == "warn"
    assert "4,096" in finding.fix
    assert machine.cores(100).verdict == "warn"
    assert machine.cores(0).verdict == "ok"


def test_a_clock_behind_the_files_fails(tmp_path: Path) -> None:
    file = tmp_path / "new"
    file.touch()
    assert machine.clock([file]).verdict != "fail"
    os.utime(file, (4e9, 4e9))
    assert machine.clock([file]).verdict == "fail"


def test_a_disk_too_small_for_the_checkpoints_fails(write_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(write_recipe(), {"checkpoint.keep": "3"})
    one = storage.checkpoint_bytes(1_000_000, recipe)
    assert one == 12_000_000 + storage.RECORDS
    assert storage.needed_bytes(1_000_000, recipe) == 4 * one
    folder = Path()
    assert storage.room(folder, 4 * one - 1, recipe, 1_000_000).verdict == "fail"
    assert storage.room(folder, 4 * one + 1, recipe, 1_000_000).verdict == "warn"
    assert storage.room(folder, 2**40, recipe, 1_000_000).verdict == "ok"
    assert storage.pace(folder, 1e6, recipe, 7_000_000_000).verdict == "warn"
    assert storage.pace(folder, 1e9, recipe, 1_000_000).verdict == "ok"


def test_a_disk_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(folder: Path) -> tuple[float, float]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "written", refuse)
    (finding,) = storage.storage(tmp_path, None, None)
    assert finding.verdict == "fail"
    assert "Permission denied" in finding.found


def test_a_disk_with_another_clock_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "written", lambda folder: (1e9, -120.0))
    assert said(storage.storage(tmp_path, None, None))["clock of the disk"].verdict == "warn"


def test_the_disk_is_written_where_the_run_will_be_and_left_clean(tmp_path: Path) -> None:
    found = said(storage.storage(tmp_path / "not" / "yet", None, None))
    assert str(tmp_path) in found["disk speed"].found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "verdict"), [(300, "fail"), (384, "ok"), (390, "warn"), (768, "ok"), (6400, "warn")]
)
def test_a_tokenizer_that_is_not_the_models_is_named(size: int, verdict: str, write_recipe) -> None:
    recipe, parts = read_recipe(write_recipe()), Parts()
    found = said(recipe_parts(recipe, 1, parts))
    assert found["data"].verdict == "ok"
    assert parts.catalog is not None
    findings = list(vocabulary(recipe, parts.catalog, SimpleNamespace(vocab_size=size)))
    assert findings[0].verdict == verdict


def test_weights_trained_with_another_end_of_text_are_a_warning(write_recipe) -> None:
    recipe, parts = read_recipe(write_recipe()), Parts()
    list(recipe_parts(recipe, 1, parts))
    assert parts.catalog is not None
    recipe.model.init_from = "weights"
    config = SimpleNamespace(vocab_size=384, eos_token_id=[7, 8])
    assert said(vocabulary(recipe, parts.catalog, config))["end of text"].verdict == "warn"
    config.eos_token_id = parts.catalog.load_tokenizer().eos_id
    assert "end of text" not in said(vocabulary(recipe, parts.catalog, config))


def test_a_broken_installation_is_a_line_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flame.doctor.order", None)
    found = said(command.examine(None, {}, None))
    assert found["imports"].verdict == "fail"
    assert found["python"].verdict == "ok"

    def burst() -> Finding:
        raise RuntimeError("libcudart.so: cannot open\nshared object")

    (finding,) = command.examined(burst)
    assert (finding.verdict, finding.found) == ("fail", "RuntimeError: libcudart.so: cannot open")
