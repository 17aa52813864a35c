"""The settings that the train package reads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from flame.errors import RecipeError
from flame.schema import Duration, parse_count, parse_duration, parse_strings, setting

TRACKERS = {"wandb": "wandb", "mlflow": "mlflow"}  # to the module that each needs
PARTS = ("model", "optimizer", "data")  # of a checkpoint that a run may start from


def parse_micro_batch_rows(raw: Any) -> int | None:
    """`auto` (None) or a whole number of rows."""
    return None if raw == "auto" else parse_count(raw)


def parse_parts(raw: Any) -> list[str]:
    """Some of `PARTS`, the model among them."""
    parts = parse_strings(raw)
    if "model" not in parts or not set(parts) <= set(PARTS):
        raise ValueError(f'a list of {", ".join(PARTS)}, with "model" in it')
    return [part for part in PARTS if part in parts]


def parse_trackers(raw: Any) -> list[str]:
    """Some of `TRACKERS`, each once."""
    names = parse_strings(raw)
    if not set(names) <= set(TRACKERS):
        raise ValueError(f"a list of {', '.join(TRACKERS)}")
    return [name for name in TRACKERS if name in names]


def check_trackers(names: list[str]) -> None:
    """Raises RecipeError where a tracker's package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name]) is None:
            raise RecipeError(
                f'logging.trackers: {name} is not installed: pip install "flame[{name}]", or leave it out'
            )


@dataclass
class RunConfig:
    directory: str = setting(help="everything the run writes lies here", identity=False)
    seed: int = setting(42, help="of the initialisation, the order of the data and dropout", identity=True)
    deterministic: bool = setting(
        False,
        help="only kernels that give the same bits each time, which are slower; a kernel of torch's that has "
        "no such form ends the run with an error that names it",
        identity=False,
    )
    steps: int | None = setting(
        None,
        help="length of the run in optimizer steps; the run ends earlier where its data do; 0: only a "
        "checkpoint of what it begins with",
        identity=False,
        parse=parse_count,
    )
    tokens: int | None = setting(
        None,
        help='length of the run in tokens ("10B"); give this or steps, or neither where max_epochs ends '
        "every source",
        identity=False,
        parse=parse_count,
    )
    start_from: str | None = setting(
        None,
        help='branch off another run\'s checkpoint: "RUN@step", or "RUN" for its newest whole one',
        identity=True,
    )
    start_from_parts: list[str] = setting(
        ["model"],
        help="what is taken from there: model; optimizer, its state too; data, the place in the data and all "
        "counters, so that steps and tokens go on from there",
        identity=True,
        parse=parse_parts,
    )
    exclude: list[str] = setting(
        [],
        help='names of parameters ("lm_head.*") that begin anew, with start_from or model.init_from',
        identity=True,
        parse=parse_strings,
    )
    max_restarts: int = setting(
        10,
        help="automatic restarts after a crash or a hang within recovery.restart_window; at one more the run "
        "gives up with exit code 3",
        identity=False,
    )


@dataclass
class BatchConfig:
    tokens_per_step: int = setting(
        help="tokens in one optimizer step over all ranks, a whole number of rows",
        identity=True,
        parse=parse_count,
    )
    micro_batch_rows: int | None = setting(
        None,
        help="rows a forward pass takes on one rank; auto: as many as hold 65,536 tokens on a GPU, "
        "one on a CPU",
        identity=False,
        parse=parse_micro_batch_rows,
    )


OPTIMIZERS = ("adamw", "muon", "sgd")


@dataclass
class GroupConfig:
    pattern: str = setting(
        help="of full parameter names, listed in RUN/parameter_groups.json; * is anything, ? one character; "
        "a parameter is in the first group that it matches",
        identity=True,
    )
    name: str | None = setting(
        None,
        help="the optimizer of these parameters; left out: what they would have without the group",
        identity=True,
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = setting(
        None, help="the peak of their schedule; left out: as without the group", identity=True
    )
    learning_rate_factor: float = setting(
        1.0, help="their peak is so many times what it would be without the group", identity=True
    )
    weight_decay: float | None = setting(
        None,
        help="of all these parameters, norms and biases too; left out: as without the group",
        identity=True,
    )


@dataclass
class OptimizerConfig:
    name: str = setting(
        "adamw",
        help="the optimizer; muon is for the matrices of the model's blocks, with AdamW for all else",
        identity=True,
        choices=OPTIMIZERS,
    )
    learning_rate: float = setting(1e-3, help="the peak of the schedule", identity=True)
    beta1: float = setting(0.9, help="adamw: decay of the gradient's running mean", identity=True)
    beta2: float = setting(0.95, help="adamw: decay of the squared gradient's running mean", identity=True)
    epsilon: float = setting(1e-8, help="adamw: added to the denominator", identity=True)
    weight_decay: float = setting(
        0.1,
        help="matrices only, never norms, biases and what the model exempts; decoupled, but for sgd, which "
        "adds it to the gradient",
        identity=True,
    )
    decay_embeddings: bool = setting(
        True,
        help="whether weight_decay is for embeddings too (and for a head that is tied to one)",
        identity=True,
    )
    clip_norm: float = setting(
        1.0, help="gradients longer than this are scaled down to it; 0: never", identity=True
    )
    momentum: float = setting(0.95, help="muon, with Nesterov's step, and sgd, without", identity=True)
    adjust_lr_fn: str = setting(
        "match_rms_adamw",
        help="muon: how the rate depends on a matrix's shape, as torch.optim.Muon has it: original, "
        "sqrt(max(1, rows / columns)), or match_rms_adamw, 0.2 sqrt(max(rows, columns)), with which AdamW's "
        "rate and weight decay serve",
        identity=True,
        choices=("original", "match_rms_adamw"),
    )
    adamw_learning_rate: float | None = setting(
        None, help="muon: the peak for the parameters left to AdamW; left out: learning_rate", identity=True
    )
    ema: float | None = setting(
        None,
        help="also keep an average of the weights, decayed by this after each update (0.9999), in float32; "
        "checkpoints hold it, flame export --ema writes it",
        identity=True,
    )
    groups: list[GroupConfig] = setting([], help="parameters treated otherwise", identity=True)


@dataclass
class LossConfig:
    z_loss: float = setting(
        0.0,
        help="adds this times the square of the logits' logsumexp to each predicted token's loss (1e-4); "
        "metrics.jsonl has it apart, as z_loss",
        identity=True,
    )


@dataclass
class ScheduleConfig:
    warmup: Duration = setting(
        Duration(0, "steps"),
        help="linear rise from 0 to the peak",
        identity=True,
        parse=parse_duration("steps", "tokens"),
    )
    decay: str = setting(
        "cosine",
        help="shape after the warm-up; wsd stays at the peak until decay_fraction of the run is left",
        identity=True,
        choices=("cosine", "linear", "sqrt", "constant", "wsd"),
    )
    final_fraction: float = setting(0.1, help="of the peak, at the run's end", identity=True)
    decay_fraction: float = setting(0.2, help="wsd: the share of the run that decays", identity=True)
    decay_shape: str = setting(
        "linear",
        help="wsd: the shape of that decay",
        identity=True,
        choices=("cosine", "linear", "sqrt"),
    )


@dataclass
class CheckpointConfig:
    every: Duration = setting(
        Duration(1000, "steps"),
        help="between checkpoints; there is always one at the end and one at a stop",
        identity=False,
        parse=parse_duration("steps", "tokens", "minutes"),
    )
    keep: int = setting(
        2, help="newest checkpoints kept, and the newest that is 15 steps older than they are", identity=False
    )
    keep_every: Duration | None = setting(
        None,
        help='checkpoints kept for good, the first at or past each multiple: "10000 steps"',
        identity=False,
        parse=parse_duration("steps", "tokens"),
    )
    upload: str | None = setting(
        None,
        help="a URL that fsspec knows, such as s3://bucket/run: checkpoints are copied there beside "
        "training, and a start without any in its run directory fetches the newest",
        identity=False,
    )


@dataclass
class RecoveryConfig:
    skipped_updates: int = setting(
        10,
        help="updates of the last 1000 steps that may be left out because a gradient was not finite; at one "
        "more the run goes back, and passes over the rows of the last 16 steps",
        identity=False,
    )
    spike_threshold: float = setting(
        20.0,
        help="a loss so many robust standard deviations above the median of the 128 steps before it makes "
        "the run go back, and pass over the rows of the last 16 steps; 0: never",
        identity=False,
    )
    max_rollbacks: int = setting(
        5, help="times that a run goes back so; once more and it ends with exit code 3", identity=False
    )
    restart_window: Duration = setting(
        Duration(60, "minutes"),
        help="over which run.max_restarts counts",
        identity=False,
        parse=parse_duration("minutes"),
    )
    hang_seconds: float = setting(
        60.0,
        help="ranks that make no step for ten times the median of the last ones, and at least for so long, "
        "are killed and started again; 0: never, whatever they do",
        identity=False,
    )
    start_seconds: float = setting(
        900.0, help="the same from a start to its first step, compilation included", identity=False
    )
    save_seconds: float = setting(1800.0, help="the same while ranks wait for a checkpoint", identity=False)
    validation_seconds: float = setting(3600.0, help="the same during a validation", identity=False)
    check_replicas: Duration | None = setting(
        None,
        help='"100 steps": so often and before each save compare the copies of the parameters that there are '
        "with parallel.replicate; where they differ, name the rank and go back; left out: never",
        identity=False,
        parse=parse_duration("steps", "tokens"),
    )
    straggler_factor: float = setting(
        1.5,
        help="a rank that needs so many times the others' median for its own forward passes and data is "
        "named in an event; 0: none",
        identity=False,
    )
    straggler_window: Duration = setting(
        Duration(50, "steps"),
        help="over which ranks are compared so",
        identity=False,
        parse=parse_duration("steps"),
    )


@dataclass
class ExportConfig:
    at_end: bool = setting(
        False, help="write the last step's model to RUN/export, as flame export does", identity=False
    )
    every: Duration | None = setting(
        None,
        help="also while training, to RUN/exports/step-N, with a checkpoint at the same step",
        identity=False,
        parse=parse_duration("steps", "tokens"),
    )
    dtype: str = setting(
        "float32",
        help="of the exported weights",
        identity=False,
        choices=("float32", "bfloat16", "float16"),
    )
    keep: int | None = setting(
        None, help="newest folders kept in RUN/exports; left out: all", identity=False, parse=parse_count
    )


@dataclass
class LoggingConfig:
    every: Duration = setting(
        Duration(1, "steps"),
        help="between lines of metrics.jsonl",
        identity=False,
        parse=parse_duration("steps", "tokens"),
    )
    tensorboard: bool = setting(True, help="also write RUN/tensorboard", identity=False)
    trackers: list[str] = setting(
        [],
        help='services that get the figures too: "wandb", "mlflow", each an extra; see docs/trackers.md',
        identity=False,
        parse=parse_trackers,
    )
    project: str | None = setting(
        None,
        help="the project of wandb, the experiment of MLflow; left out: what WANDB_PROJECT and "
        'MLFLOW_EXPERIMENT_NAME say, else "flame"',
        identity=False,
    )
