"""Runs of fla-org/flame as recipes: its README's command lines and its default TOML, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from flame import cli, schema
from flame.adopt.arguments import OldRun, read_old_run
from flame.adopt.flags import FLAGS, SETTINGS, table
from flame.adopt.translate import translate
from flame.errors import RecipeError
from flame.recipe import Recipe, check, read_recipe

ROOT = Path(__file__).parents[1]

# the values of its flame/models/fla.toml
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "config": "fla-hub/transformer-1.3B-100B",
        "tokenizer_path": "fla-hub/transformer-1.3B-100B",
    },
    "job": {"dump_folder": "exp", "print_args": True},
    "training": {
        "batch_size": 32,
        "seq_len": 2048,
        "context_len": 2048,
        "gradient_accumulation_steps": 1,
        "steps": 20480,
        "max_norm": 1.0,
        "skip_nan_inf": True,
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": -1,
        "tensor_parallel_degree": 1,
        "compile": False,
        "dataset": "HuggingFaceFW/fineweb-edu",
        "dataset_name": "default",
        "num_workers": 32,
        "pin_memory": False,
        "persistent_workers": False,
        "prefetch_factor": 2,
        "seed": 42,
        "varlen": False,
    },
    "optimizer": {"name": "AdamW", "eps": 1e-15, "lr": 3e-4},
    "lr_scheduler": {"warmup_steps": 1024, "decay_type": "cosine", "lr_min": 0.1},
    "checkpoint": {
        "enable_checkpoint": True,
        "folder": "checkpoint",
        "interval_type": "steps",
        "interval": 2048,
        "model_weights_only": False,
        "export_dtype": "float32",
        "async_mode": "disabled",
    },
    "profiling": {"enable_profiling": True, "save_traces_folder": "profile_trace", "profile_freq": 512},
    "metrics": {"log_freq": 32, "enable_wandb": True},
    "experimental": {"context_parallel_degree": 1, "pipeline_parallel_degree": 1},
    "float8": {
        "enable_fsdp_float8_all_gather": False,
        "precompute_float8_dynamic_scale_for_fsdp": False,
    },
    "activation_checkpoint": {"mode": "none"},
}

# its README's run of 340M parameters with variable length; {toml} is the file above
VARLEN = (
    "bash train.sh --job.config_file {toml} --job.dump_folder exp/transformer-340M-4K-10B/first "
    "--model.config configs/transformer_340M.json --model.tokenizer_path fla-hub/transformer-1.3B-100B "
    "--optimizer.name AdamW --optimizer.eps 1e-15 --optimizer.lr 1e-3 --lr_scheduler.warmup_steps 1024 "
    "--lr_scheduler.lr_min 0.1 --lr_scheduler.decay_type cosine --training.batch_size 1 "
    "--training.seq_len 65536 --training.context_len 4096 --training.varlen "
    "--training.gradient_accumulation_steps 1 --training.steps 20480 --training.max_norm 1.0 "
    "--training.skip_nan_inf --training.dataset HuggingFaceFW/fineweb-edu "
    "--training.dataset_name sample-100BT --training.dataset_split train --training.num_workers 32 "
    "--training.prefetch_factor 2 --training.seed 42 --training.compile --checkpoint.interval 2048 "
    "--checkpoint.load_step -1 --checkpoint.keep_latest_k 2 --metrics.log_freq 1"
)
MIXTURE = (
    "--training.dataset HuggingFaceFW/fineweb-edu,opencsg/Fineweb-Edu-Chinese-V2.1,"
    "OpenCoder-LLM/opc-fineweb-code-corpus,math-ai/AutoMathText,EleutherAI/proof-pile-2,"
    "OpenCoder-LLM/opc-fineweb-math-corpus --training.data_probs 0.6,0.15,0.15,0.014,0.058,0.028"
)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "fla.toml"
    path.write_text(tomli_w.dumps(DEFAULTS))
    return path


def recipe_of(words: list[str], gpus: int | None = None) -> tuple[Recipe, list[str]]:
    text, notes = translate(read_old_run(words), gpus)
    recipe = schema.build(Recipe, tomllib.loads(text), "made")
    check(recipe, "made")
    return recipe, notes


def noted(notes: list[str], *words: str) -> bool:
    return any(all(word in note for word in words) for note in notes)


def test_the_default_toml_becomes_a_recipe(toml: Path) -> None:
    recipe, notes = recipe_of([str(toml)])
    assert recipe.batch.tokens_per_step == 32 * 2048 * 8
    assert (recipe.run.steps, recipe.run.directory, recipe.run.seed) == (20480, "exp", 42)
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.optimizer.epsilon == 1e-15
    assert str(recipe.schedule.warmup) == "1024 steps"
    assert (recipe.schedule.decay, recipe.schedule.final_fraction) == ("cosine", 0.1)
    assert str(recipe.checkpoint.every) == "2048 steps"
    assert recipe.checkpoint.keep >= 20480 // 2048
    assert recipe.data.max_document_length is None
    assert recipe.logging.trackers == ["wandb"]
    assert noted(notes, "GPUs", "8", "--gpus")
    assert noted(notes, "training.varlen", "off")
    assert noted(notes, "profiling.enable_profiling")
    assert noted(notes, "checkpoint.interval_type", "no such key")


def test_the_readmes_command_with_variable_length_becomes_a_recipe(toml: Path) -> None:
    recipe, notes = recipe_of(VARLEN.format(toml=toml).split(), gpus=8)
    assert recipe.data.sequence_length == 65536
    assert recipe.data.max_document_length == 4096
    assert recipe.batch.tokens_per_step == 524_288
    assert recipe.batch.micro_batch_rows == 1
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.checkpoint.keep == 2
    assert str(recipe.logging.every) == "1 steps"
    (source,) = recipe.data.sources
    assert (source.dataset, source.config, source.split) == (
        "HuggingFaceFW/fineweb-edu",
        "sample-100BT",
        "train",
    )
    assert noted(notes, "tokens_per_step", "10,737,418,240 tokens")
    assert noted(notes, "training.varlen", "fewer tokens")
    assert noted(notes, "training.compile")
    assert not noted(notes, "GPUs of the old run")


def test_the_readmes_mixture_has_a_weight_for_each_source_and_a_warning(toml: Path) -> None:
    command = VARLEN.format(toml=toml)
    for old, new in (("sample-100BT", "default,,,,,"), ("split train", "split train,,,,,")):
        command = command.replace(old, new)
    recipe, notes = recipe_of([*command.split(), *MIXTURE.split()])
    assert [source.weight for source in recipe.data.sources] == [0.6, 0.15, 0.15, 0.014, 0.058, 0.028]
    assert [source.config for source in recipe.data.sources] == ["default", *[None] * 5]
    assert recipe.data.sources[1].name == "Fineweb-Edu-Chinese-V2.1"
    assert noted(notes, "training.data_probs", "next document", "share of the tokens")


def test_the_batch_grows_with_gpus_accumulation_and_not_with_tensor_ranks(toml: Path) -> None:
    words = [f"--job.config_file={toml}", "--training.gradient_accumulation_steps=4"]
    assert recipe_of(words, gpus=2)[0].batch.tokens_per_step == 32 * 2048 * 4 * 2
    words.append("--training.tensor_parallel_degree=2")
    assert recipe_of(words, gpus=2)[0].batch.tokens_per_step == 32 * 2048 * 4
    with pytest.raises(RecipeError, match="3 GPUs"):
        recipe_of(words, gpus=3)


@pytest.mark.parametrize(
    ("before", "gpus"),
    [
        ("NNODE=2 NGPU=4 LOG_RANK=0 bash train.sh", 8),
        ("NGPU=1 bash train.sh", 1),
        ("torchrun --nnodes 2 --nproc_per_node 3 -m flame.train", 6),
        ("torchrun --nproc-per-node=5 -m flame.train", 5),
        ("bash train.sh", None),
    ],
)
def test_gpus_are_read_off_the_command(before: str, gpus: int | None) -> None:
    assert read_old_run([*before.split(), "--training.varlen"]).gpus == gpus


def test_a_script_is_read_as_its_command_line(toml: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    command = VARLEN.format(toml=toml).replace(" --", " \\\n  --")
    script.write_text(f"#!/bin/bash\n# bash train.sh --training.steps 1\nset -e\nNGPU=4 {command}\n")
    run = read_old_run([str(script)])
    assert run.gpus == 4
    assert run.values["training.steps"] == 20480
    assert run.values["checkpoint.keep_latest_k"] == 2
    script.write_text("bash train.sh --optimizer.lr $LR\n")
    with pytest.raises(RecipeError, match=r"\$LR: a variable"):
        read_old_run([str(script)])


@pytest.mark.parametrize(
    ("flags", "schedule"),
    [
        ("--lr_scheduler.decay_ratio 0.1 --lr_scheduler.decay_type sqrt", ("wsd", 0.1, "sqrt")),
        ("--lr_scheduler.decay_ratio 0", ("constant", 0.2, "linear")),
        ("--lr_scheduler.decay_type linear", ("linear", 0.2, "linear")),
        ("--optimizer.scheduler cosine", ("cosine", 0.2, "linear")),
    ],
)
def test_schedules_keep_their_shape(flags: str, schedule: tuple[str, float, str]) -> None:
    made = recipe_of(flags.split())[0].schedule
    assert (made.decay, made.decay_fraction, made.decay_shape) == schedule


def test_local_data_become_files(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    flags = f"--training.dataset {tmp_path}/web,json --training.data_files *.parquet,code/*.jsonl"
    recipe, _ = recipe_of([*flags.split(), "--training.data_probs", "1,2"])
    assert [s.files for s in recipe.data.sources] == [[f"{tmp_path}/web/*.parquet"], ["code/*.jsonl"]]
    assert [s.dataset for s in recipe.data.sources] == [None, None]


def test_what_has_no_counterpart_is_named_when_it_was_set() -> None:
    _, quiet = recipe_of([])
    _, notes = recipe_of(["--float8.recipe_name", "rowwise", "--training.enable_cpu_offload"])
    assert noted(notes, "float8.recipe_name rowwise", "no fp8")
    assert noted(notes, "training.enable_cpu_offload true")
    assert not noted(quiet, "float8")


@pytest.mark.parametrize(
    ("mode", "option", "wanted"),
    [
        ("full", "2", ("full", 1)),
        ("selective", "op", ("selective", 1)),
        ("selective", "3", ("full", 3)),
        ("none", "2", None),
    ],
)
def test_activation_checkpointing_is_kept_or_named(
    mode: str, option: str, wanted: tuple[str, int] | None
) -> None:
    words = f"--activation_checkpoint.mode {mode} --activation_checkpoint.selective_ac_option {option}"
    text, notes = translate(read_old_run(words.split()))
    made = tomllib.loads(text).get("memory")
    if wanted is None:
        assert made is None
        assert not noted(notes, "memory.")
    elif "memory.recompute" in SETTINGS:
        assert (made["recompute"], made.get("recompute_every", 1)) == wanted
    else:
        assert made is None
        assert noted(notes, "activation_checkpoint.mode", "no memory.recompute here yet")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.batchsize", "3"], "did you mean --training.batch_size?"),
        (["--training.batch_size", "many"], "expected a whole number"),
        (["--training.batch_size"], "a value is missing"),
        (["--lr_scheduler.decay_type", "cosin"], "did you mean cosine?"),
        (["--training.dataset", "a/b,c/d"], "training.data_probs"),
        (["--training.dataset", "a/b,c/d", "--training.data_probs", "1"], "1 values for 2 data sets"),
        (["--training.dataset", "json"], "data_files"),
        (["there-is-none.toml"], "no such file"),
        (["bash", "train.sh", "stray"], "no such flag"),
        (["--job.config_file", "there-is-none.toml"], "no such recipe"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(words)
    assert said in str(error.value)


VALUES = {bool: st.booleans(), int: st.integers(1, 64), float: st.floats(0.01, 1), list: st.just(["float8"])}


@given(st.data())
def test_any_values_become_a_recipe_or_one_error(data: st.DataObject) -> None:
    old = OldRun()
    for flag in FLAGS.values():
        if data.draw(st.booleans()) and (flag.choices or flag.kind in VALUES):
            old.values[flag.name] = data.draw(
                st.sampled_from(flag.choices) if flag.choices else VALUES[flag.kind]
            )
    try:
        text, _ = translate(old, gpus=data.draw(st.integers(1, 64)))
    except RecipeError:
        return
    assert schema.build(Recipe, tomllib.loads(text), "made").batch.tokens_per_step > 0


def test_the_command_writes_a_recipe_with_its_notes_and_never_over_a_file(toml: Path, tmp_path: Path) -> None:
    to = tmp_path / "made.toml"
    command = [sys.executable, "-m", "flame", "import-args", "--gpus", "8", "--to", str(to)]
    words = VARLEN.format(toml=toml).split()
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "training.batch_size" in done.stderr
    assert "# - training.batch_size" in to.read_text()
    assert read_recipe(to).batch.tokens_per_step == 524_288
    assert cli.run(["import-args", "--to", str(to), *words]) == 1


def test_flags_alone_reach_the_command_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--training.varlen", "--training.seq_len", "4096", "--training.context_len=1024"]
    assert cli.run(["import-args", "--gpus", "1", *words]) == 0
    assert tomllib.loads(capsys.readouterr().out)["data"]["max_document_length"] == 1024
    assert cli.run(["import-args", "--", *words]) == 0
    assert cli.run(["import-args"]) == 1


def test_deterministic_kernels_are_kept() -> None:
    assert recipe_of(["--training.deterministic"])[0].run.deterministic
    assert not recipe_of([])[0].run.deterministic


@pytest.mark.parametrize(
    ("there", "here"), [("always", "forward"), ("never", "micro_batch"), ("default", "auto")]
)
def test_when_gathered_parameters_are_freed_is_kept(there: str, here: str) -> None:
    recipe, _ = recipe_of(["--training.fsdp_reshard_after_forward", there])
    assert recipe.parallel.reshard == here


def test_every_flag_says_what_it_is_here_and_the_page_has_them_all() -> None:
    assert len(FLAGS) == 103
    assert all(flag.note for flag in FLAGS.values())
    page = (ROOT / "docs" / "from-flame.md").read_text()
    assert table() in page, "run: flame import-args --markdown"
