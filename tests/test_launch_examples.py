"""The examples of launching: their syntax, and what the scripts do with each exit code."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flame.cli import make_parser
from flame.train.journal import read_lines

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("slurm.sbatch", "torchrun.sh")

# what Kubeflow's v1 CRD and SkyPilot's schema allow at each place, as far as the examples go
PYTORCH_JOB = {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
RUN_POLICY = {"backoffLimit", "cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "suspend"}
SKY_TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
SKY_RESOURCES = {
    "accelerators",
    "cpus",
    "memory",
    "use_spot",
    "disk_size",
    "infra",
    "job_recovery",
    "image_id",
}
SKY_RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


def stub(folder: Path, name: str, body: str) -> None:
    """A program of this name on the scripts' PATH that writes down how it was called."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{body}\n')
    path.chmod(0o755)


def run_script(name: str, folder: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The script's exit code, and the calls that it made."""
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), *arguments],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "PAUSE": "0", **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (folder / "calls").read_text().splitlines()


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_sbatch_options_are_ones_that_slurm_reads() -> None:
    text = (EXAMPLES / "slurm.sbatch").read_text()
    lines = text.splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(option) < first_command for option in options)  # Slurm stops at the first command
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", option) for option in options)
    told = dict(option.removeprefix("#SBATCH --").partition("=")[::2] for option in options)
    assert told["ntasks-per-node"] == told["gpus-per-node"]
    assert told["signal"].startswith("USR1@")  # to the steps, not to the script alone
    assert "requeue" in told
    assert told["open-mode"] == "append"


def test_a_job_that_was_stopped_queues_itself_again(tmp_path: Path) -> None:
    stub(tmp_path, "srun", "exit 75")
    stub(tmp_path, "scontrol", "exit 0")
    code, calls = run_script("slurm.sbatch", tmp_path, "recipe.toml", "--run.seed", "3")
    assert code == 75
    assert calls[0].endswith("flame train recipe.toml --run.seed 3")
    assert calls[1:] == ["scontrol requeue 17"]


@pytest.mark.parametrize(("ends", "times"), [(0, 1), (2, 1), (1, 4), (137, 4)])
def test_a_job_is_tried_again_after_a_crash_and_not_after_wrong_usage(
    ends: int, times: int, tmp_path: Path
) -> None:
    stub(tmp_path, "srun", f"exit {ends}")
    stub(tmp_path, "scontrol", "exit 0")
    code, calls = run_script("slurm.sbatch", tmp_path, "recipe.toml", ATTEMPTS="4")
    assert code == ends
    assert len(calls) == times
    assert not [call for call in calls if call.startswith("scontrol")]


def test_torchrun_is_given_the_machines_and_the_recipe(tmp_path: Path) -> None:
    stub(tmp_path, "torchrun", "exit 7")
    places = {"NODES": "2", "NODE_RANK": "1", "HEAD": "10.0.0.1", "RANKS": "4"}
    code, (call,) = run_script("torchrun.sh", tmp_path, "a b.toml", "--run.seed=3", **places)
    assert code == 7
    words = call.split()
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--node-rank") + 1] == "1"
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert call.endswith("--module flame train a b.toml --run.seed=3")


@pytest.mark.slow
def test_two_agents_of_one_machine_train_one_run(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe(steps=6)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    places = {"NODES": "2", "HEAD": "localhost", "PORT": port, "RANKS": "1", "RESTARTS": "0"}
    agents = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / "torchrun.sh"), str(recipe)],
            env=os.environ | places | {"NODE_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [agent.wait(timeout=400) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    (start,) = [e for e in read_lines(tmp_path / "run" / "events.jsonl") if e["event"] == "start"]
    assert start["ranks"] == 2
    assert [r["step"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_the_pytorch_job_is_one() -> None:
    job = load("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z0-9-]+", job["metadata"]["name"])
    spec = job["spec"]
    assert set(spec) <= PYTORCH_JOB
    assert set(spec["runPolicy"]) <= RUN_POLICY
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replica in spec["pytorchReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert isinstance(spec["nprocPerNode"], str)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        shared = next(v for v in pod["volumes"] if mounts[v["name"]] == "/dev/shm")
        assert shared["emptyDir"]["medium"] == "Memory"
        assert all(isinstance(item["value"], str) for item in container["env"])
        assert_flame(container["command"][container["command"].index("flame") :])


def test_the_skypilot_task_is_one() -> None:
    task = load("skypilot.yaml")
    assert set(task) <= SKY_TASK
    assert set(task["resources"]) <= SKY_RESOURCES
    assert set(task["resources"]["job_recovery"]) <= SKY_RECOVERY
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert all(isinstance(value, str) for value in task["envs"].values())
    for mount in task["file_mounts"].values():
        assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
    for part in ("setup", "run"):
        done = subprocess.run(["bash", "-n", "-c", task[part]], capture_output=True, check=False)
        assert done.returncode == 0
    for line in task["run"].splitlines():
        words = shlex.split(line.partition("||")[0])
        assert_flame(words[words.index("flame") :])


def assert_flame(words: list[str]) -> None:
    """These words are a command of flame's."""
    _, unknown = make_parser().parse_known_args(words[1:])
    assert unknown == []
