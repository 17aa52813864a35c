"""A recipe: everything that defines a run, read from TOML and flags, checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flame import schema
from flame.data.config import BYTES, DataConfig, TokenizerConfig, ValidationConfig
from flame.data.plan import DataPlan
from flame.data.raw import is_url
from flame.errors import RecipeError
from flame.models.config import ModelConfig
from flame.parallel.config import MemoryConfig, ParallelConfig, PrecisionConfig
from flame.parallel.mesh import resolve_layout
from flame.schema import Duration, section
from flame.train.config import (
    BatchConfig,
    CheckpointConfig,
    ExportConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    RecoveryConfig,
    RunConfig,
    ScheduleConfig,
)
from flame.train.groups import check_optimizer
from flame.train.schedule import Schedule

PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/@]*:[^/]*@")
FILE = "recipe.toml"  # the resolved recipe in a run directory


@dataclass(kw_only=True)
class Recipe:
    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    tokenizer: TokenizerConfig = section(TokenizerConfig)
    data: DataConfig = section(DataConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    loss: LossConfig = section(LossConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    memory: MemoryConfig = section(MemoryConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    validation: ValidationConfig = section(ValidationConfig)
    recovery: RecoveryConfig = section(RecoveryConfig)
    export: ExportConfig = section(ExportConfig)
    logging: LoggingConfig = section(LoggingConfig)

    @property
    def directory(self) -> Path:
        return Path(self.run.directory)

    @property
    def plan(self) -> DataPlan:
        """The order of the data. Raises RecipeError where settings exclude each other."""
        return DataPlan.of(self.data, self.batch.tokens_per_step, self.run.seed, self.validation.fraction)

    @property
    def total_steps(self) -> int | None:
        """The run's length in optimizer steps; None: it ends with its data."""
        if self.run.tokens is not None:
            return self.plan.steps_of(Duration(self.run.tokens, "tokens"))
        return self.run.steps


def read_recipe(path: str | Path, flags: dict[str, str] | None = None) -> Recipe:
    """The recipe at `path` with `flags` ({"section.field": text}) over it. Raises RecipeError.

    Local paths are made absolute, so that the run can be resumed from any directory.
    """
    raw = schema.apply_flags(schema.read_toml(Path(path)), flags or {})
    recipe = schema.build(Recipe, raw, str(path))
    check(recipe, str(path))
    make_absolute(recipe)
    return recipe


def check(recipe: Recipe, origin: str) -> None:
    """What no single field can know."""
    run, batch = recipe.run, recipe.batch
    if run.steps is not None and run.tokens is not None:
        raise RecipeError(f"{origin}: run: give either steps or tokens, the length of the run, not both")
    if run.steps is not None and run.steps < 0:
        raise RecipeError(f"{origin}: run.steps: found {run.steps}, expected at least 0")
    for name, value in [
        ("run.tokens", run.tokens),
        ("batch.tokens_per_step", batch.tokens_per_step),
        ("batch.micro_batch_rows", batch.micro_batch_rows),
        ("data.sequence_length", recipe.data.sequence_length),
        ("validation.tokens", recipe.validation.tokens),
        ("validation.every", recipe.validation.every and recipe.validation.every.amount),
        ("validation.prompt_tokens", recipe.validation.prompt_tokens),
        ("checkpoint.every", recipe.checkpoint.every.amount),
        ("checkpoint.keep", recipe.checkpoint.keep),
        ("export.every", recipe.export.every and recipe.export.every.amount),
        ("export.keep", recipe.export.keep),
        ("logging.every", recipe.logging.every.amount),
        ("memory.recompute_every", recipe.memory.recompute_every),
    ]:
        if value is not None and value < 1:
            raise RecipeError(f"{origin}: {name}: found {value}, expected at least 1")
    check_secrets(schema.plain(recipe), origin)
    check_beginning(recipe, origin)
    if not recipe.data.sources:
        raise RecipeError(f"{origin}: data.sources: a run needs at least one [[data.sources]] table")
    if recipe.loss.z_loss < 0:
        raise RecipeError(f"{origin}: loss.z_loss: found {recipe.loss.z_loss}, expected 0 or more")
    check_optimizer(recipe.optimizer, origin)
    plan = recipe.plan
    if run.steps is None and run.tokens is None and not plan.ends:
        raise RecipeError(
            f"{origin}: run: give steps or tokens, the length of the run, or max_epochs for every source: "
            "the run then ends with its data"
        )
    Schedule.of(recipe.schedule, recipe.optimizer, recipe.total_steps, plan.steps_of)
    check_validation(recipe, origin)


def check_secrets(value: Any, origin: str, place: str = "") -> None:
    """Refuses passwords in URLs: a recipe is written to its run, shown and copied."""
    if isinstance(value, dict):
        for name, inner in cast("dict[str, Any]", value).items():
            check_secrets(inner, origin, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            check_secrets(inner, origin, place)
    elif isinstance(value, str) and PASSWORD.match(value):
        raise RecipeError(
            f"{origin}: {place}: a URL with a password in it, which would be written to the run's files; "
            "leave it out: s3, gs, hf and others take credentials from the environment or their own files"
        )


def check_validation(recipe: Recipe, origin: str) -> None:
    """Which documents are held out is said in one way, and nothing is asked of a validation that is never."""
    wanted = recipe.validation
    by_files = any(source.validation for source in recipe.data.sources)
    if wanted.sources and (wanted.fraction or by_files):
        other = "validation.fraction is set" if wanted.fraction else "a source names validation files"
        raise RecipeError(f"{origin}: validation.sources: {other}, too; give one of the two")
    if wanted.every is not None and not (wanted.fraction or wanted.sources or by_files):
        raise RecipeError(
            f"{origin}: validation.every: nothing is held out: set validation.fraction, such as 0.001, or "
            'give [[validation.sources]], or name validation files in a source (validation = "...")'
        )
    for name in ("sources", "at_start", "hook", "prompts"):
        if wanted.every is None and getattr(wanted, name):
            raise RecipeError(
                f"{origin}: validation.{name}: there is no validation: say how often, such as "
                'validation.every = "1000 steps"'
            )
    if wanted.hook is not None and not all(wanted.hook.rpartition(":")[::2]):
        raise RecipeError(
            f'{origin}: validation.hook: found "{wanted.hook}", expected "file.py:function", such as '
            '"my_checks.py:evaluate"'
        )


def check_beginning(recipe: Recipe, origin: str) -> None:
    """Refuses settings that leave open what a run begins with."""
    run, model = recipe.run, recipe.model
    if not model.config and model.module is None and model.init_from is None:
        raise RecipeError(
            f"{origin}: model: give config, or module for a model of your own, or init_from for weights "
            "that bring their config"
        )
    if run.start_from is not None and model.init_from is not None:
        raise RecipeError(f"{origin}: run.start_from and model.init_from: a run begins with one of the two")
    if run.start_from is None and run.start_from_parts != ["model"]:
        raise RecipeError(f"{origin}: run.start_from_parts: there is no run.start_from to take them from")
    if run.exclude and run.start_from is None and model.init_from is None:
        raise RecipeError(
            f"{origin}: run.exclude: all parameters begin anew without run.start_from or model.init_from"
        )


def split_start(spec: str) -> tuple[Path, int | None]:
    """The directory and the step of a `run.start_from`."""
    run, _, step = spec.rpartition("@")
    if run and step.isdigit() and not Path(spec).exists():
        return Path(run), int(step)
    return Path(spec), None


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuses a layout that cannot be on `ranks` processes. Raises RecipeError."""
    if ranks < 1:
        raise RecipeError(f"--nproc: found {ranks}, expected at least 1")
    layout = resolve_layout(recipe.parallel, ranks)
    stage = min(recipe.plan.stages, key=lambda stage: stage.rows_per_step)
    rows = stage.rows_per_step
    if layout.data_ranks > rows:
        raise RecipeError(
            f"{layout.data_ranks} data-parallel ranks, but a step has only {rows} rows "
            f"(batch.tokens_per_step {stage.tokens_per_step} / data.sequence_length "
            f"{stage.sequence_length}); use at most {rows} ranks, or larger steps"
        )


def make_absolute(recipe: Recipe) -> None:
    """Local paths, seen from the working directory."""
    recipe.run.directory = str(Path(recipe.run.directory).absolute())
    if recipe.tokenizer.path != BYTES:
        recipe.tokenizer.path = _absolute(recipe.tokenizer.path)
    if recipe.model.config and (Path(recipe.model.config).exists() or recipe.model.config.endswith(".json")):
        recipe.model.config = _absolute(recipe.model.config)
    if recipe.model.init_from is not None and Path(recipe.model.init_from).exists():
        recipe.model.init_from = _absolute(recipe.model.init_from)
    if recipe.run.start_from is not None:
        recipe.run.start_from = _absolute(recipe.run.start_from)
    if recipe.model.module is not None:
        recipe.model.module = _absolute(recipe.model.module)
    if recipe.validation.hook is not None:
        file, _, function = recipe.validation.hook.rpartition(":")
        recipe.validation.hook = f"{_absolute(file)}:{function}"
    for source in [*recipe.data.sources, *recipe.validation.sources]:
        source.files = [name if is_url(name) else _absolute(name) for name in source.files]
        source.validation = [name if is_url(name) else _absolute(name) for name in source.validation]
        if source.chat_template is not None:
            source.chat_template = _absolute(source.chat_template)
        if source.dataset is not None and Path(source.dataset).is_dir():
            source.dataset = _absolute(source.dataset)
    if recipe.data.cache_directory is not None:
        recipe.data.cache_directory = _absolute(recipe.data.cache_directory)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def run_recipe(run: Path) -> Recipe:
    """The recipe that a run directory was started with."""
    path = run / FILE
    if not path.exists():
        raise RecipeError(f"{run}: no run here (it holds no {FILE})")
    return schema.build(Recipe, schema.read_toml(path), str(path))


def refuse_other_run(recipe: Recipe) -> None:
    """Refuses to continue another recipe's run. Raises RecipeError naming the field that differs."""
    if not (recipe.directory / FILE).exists():
        return
    started = run_recipe(recipe.directory)
    for path, old, new in schema.identity_differences(Recipe, started, recipe):
        raise RecipeError(
            f"{recipe.directory} holds another recipe's run: {path} is {_shown(old)} there and "
            f"{_shown(new)} here; choose another run.directory, or give the same {path}"
        )


def _shown(value: Any) -> str:
    return schema.shown(value)
