"""Every flag of fla-org/flame, and what it is here. The table of docs/from-flame.md is made from this one.

Of its config manager at commit e11e7be, with what its training code and the torchtitan that it pins
(0b44d4c) do with each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flame.recipe import Recipe
from flame.schema import leaves


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: its name, its type there, its default there, and what becomes of it.

    `here`: the settings that take its value over, separated by spaces; empty where there is none. `note`
    says how the meaning differs, or why there is none.
    """

    name: str
    kind: type
    default: Any
    here: str
    note: str
    choices: tuple[str, ...] = ()

    @property
    def taken(self) -> tuple[str, ...]:
        """Those of its settings that this flame has."""
        return tuple(path for path in self.here.split() if path in SETTINGS)


SETTINGS = {leaf.path for leaf in leaves(Recipe)}

NEVER_READ = "nothing reads it there"
TOML_ONLY = "there only in its TOML, not a flag; the loader is threads here"
LOADER = "the loader is threads that read ahead by themselves"
OWN_CODE = "none here: a part of torchtitan's own code"
PIPELINE = "there a pipeline ends with an error before the first step"
FLOAT8 = "there is no fp8 here yet"
RESTARTS = "not needed: after a crash the ranks are started again by themselves (run.max_restarts)"
PROFILE = "there is no profiler here yet"

JOB = (
    Flag("job.config_file", str, None, "", "read, and flags go over it, as there"),
    Flag("job.dump_folder", str, "./torchtitan/outputs", "run.directory", "same"),
    Flag("job.description", str, "default job", "", "none: a comment in the recipe says it"),
    Flag("job.use_for_integration_test", bool, False, "", NEVER_READ),
    Flag("job.print_args", bool, False, "", "RUN/recipe.toml holds all that was resolved"),
)

MODEL = (
    Flag("model.name", str, "fla", "", 'only "fla" is there; model.config names the family here'),
    Flag(
        "model.config",
        str,
        "fla-hub/transformer-1.3B-100B",
        "model.config",
        "same; there vocab_size is raised to the tokenizer's, here a smaller one is refused",
    ),
    Flag(
        "model.tokenizer_path",
        str,
        "fla-hub/transformer-1.3B-100B",
        "tokenizer.path",
        "a local file or folder here. There a document has what the tokenizer adds (Llama's: BOS before, "
        "nothing behind), here EOS always ends one and tokenizer.bos puts BOS before",
    ),
    Flag("model.converters", list, [], "", FLOAT8),
    Flag("model.print_after_conversion", bool, False, "", "none: nothing is converted"),
)

OPTIMIZER = (
    Flag("optimizer.name", str, "AdamW", "optimizer.name", "AdamW; Adam, with its decay in the gradient, no"),
    Flag("optimizer.eps", float, 1e-8, "optimizer.epsilon", "same"),
    Flag("optimizer.lr", float, 8e-4, "optimizer.learning_rate", "same"),
    Flag("optimizer.beta1", float, 0.9, "optimizer.beta1", "same"),
    Flag("optimizer.beta2", float, 0.95, "optimizer.beta2", "same"),
    Flag(
        "optimizer.weight_decay",
        float,
        0.1,
        "optimizer.weight_decay",
        "there of all parameters, here of matrices only, never norms, biases and what the model exempts; "
        'as there: [[optimizer.groups]] with pattern = "*" and this weight_decay',
    ),
    Flag(
        "optimizer.implementation",
        str,
        "fused",
        "",
        "always the fastest of the device",
        ("for-loop", "foreach", "fused"),
    ),
    Flag("optimizer.early_step_in_backward", bool, False, "", "none: gradients are clipped before the step"),
    Flag("lr_scheduler.warmup_steps", int, 200, "schedule.warmup", "same"),
    Flag(
        "lr_scheduler.decay_ratio",
        float,
        None,
        "schedule.decay schedule.decay_fraction",
        "given: decay = wsd with this fraction; the rate reaches its end at the last step, there one step "
        "later",
    ),
    Flag(
        "lr_scheduler.decay_type",
        str,
        "linear",
        "schedule.decay schedule.decay_shape",
        "same shapes",
        ("linear", "sqrt", "cosine"),
    ),
    Flag("lr_scheduler.lr_min", float, 0.0, "schedule.final_fraction", "same: a share of the peak"),
)

BATCH = (
    Flag(
        "training.batch_size",
        int,
        8,
        "batch.tokens_per_step batch.micro_batch_rows",
        "there rows on each GPU, so that the batch grows with the GPUs; here the tokens of a step over all "
        "GPUs, batch_size x seq_len x gradient_accumulation_steps x data-parallel ranks",
    ),
    Flag("training.seq_len", int, 2048, "data.sequence_length", "same"),
    Flag(
        "training.context_len",
        int,
        2048,
        "data.max_document_length",
        "with varlen: longer documents are trained in pieces of this length; without it nothing reads it "
        "there",
    ),
    Flag(
        "training.varlen",
        bool,
        False,
        "",
        "always so here. Without it documents see what is before them in their row, there. With it their "
        "bounds are guessed from BOS or EOS, and the last token of each learns the first of the next",
    ),
    Flag("training.gradient_accumulation_steps", int, 1, "batch.tokens_per_step", "see batch_size"),
    Flag("training.steps", int, 10000, "run.steps", "same"),
    Flag("training.max_norm", float, 1.0, "optimizer.clip_norm", "same"),
    Flag(
        "training.skip_nan_inf",
        bool,
        False,
        "",
        "always: an update with a gradient that is not finite is skipped and counted (updates_skipped)",
    ),
)

DATA = (
    Flag(
        "training.dataset",
        str,
        "HuggingFaceFW/fineweb-edu",
        "data.sources[].dataset data.sources[].files",
        "a source for each: dataset for a name on the hub, files for what is local",
    ),
    Flag("training.dataset_name", str, None, "data.sources[].config", "same"),
    Flag("training.dataset_split", str, None, "data.sources[].split", "same; of local files: all of them"),
    Flag("training.data_dir", str, None, "data.sources[].files", "below a local folder"),
    Flag("training.data_files", str, None, "data.sources[].files", "as a glob"),
    Flag(
        "training.data_probs",
        str,
        None,
        "data.sources[].weight",
        "there the chance that the next document is of a data set, here the share of a source's tokens: "
        "where documents differ in length the mixture is another. As there: multiply each weight by the "
        "mean tokens of a document, which `flame data check` prints",
    ),
    Flag("training.streaming", bool, False, "", "files are always read in place, and resumed exactly"),
    Flag("training.num_workers", int, 32, "", LOADER),
    Flag("training.prefetch_factor", int, 2, "", NEVER_READ),
    Flag("training.pin_memory", bool, False, "", TOML_ONLY),
    Flag("training.persistent_workers", bool, False, "", TOML_ONLY),
    Flag(
        "training.seed",
        int,
        42,
        "run.seed",
        "of the data's order and the initialisation; the same number is another order and other weights",
    ),
)

PARALLEL = (
    Flag("training.data_parallel_replicate_degree", int, 1, "parallel.replicate", "same"),
    Flag("training.data_parallel_shard_degree", int, -1, "parallel.shard", "same"),
    Flag("training.tensor_parallel_degree", int, 1, "parallel.tensor", "tensor and sequence parallel"),
    Flag("training.disable_loss_parallel", bool, False, "", "none: how the loss is split is no choice"),
    Flag("training.enable_cpu_offload", bool, False, "", "none: parameters stay on the GPU"),
    Flag(
        "training.fsdp_reshard_after_forward",
        str,
        "default",
        "parallel.reshard",
        "always is forward, never is micro_batch",
        ("default", "always", "never"),
    ),
    Flag(
        "training.mixed_precision_param",
        str,
        "bfloat16",
        "precision.compute",
        "same under FSDP; on one GPU and under DDP there it is autocast",
        ("bfloat16", "float32"),
    ),
    Flag("training.mixed_precision_reduce", str, "float32", "", "always float32", ("float32",)),
    Flag(
        "training.compile",
        bool,
        False,
        "model.compile",
        "not written: left out, blocks are compiled on GPUs where that is known to help the family",
    ),
    Flag("training.gc_freq", int, 50, "", OWN_CODE),
    Flag("training.deterministic", bool, False, "run.deterministic", "same"),
    Flag("experimental.enable_async_tensor_parallel", bool, False, "", OWN_CODE),
    Flag("experimental.pipeline_parallel_degree", int, 1, "parallel.pipeline", PIPELINE),
    Flag("experimental.pipeline_parallel_split_points", list, [], "", PIPELINE),
    Flag("experimental.pipeline_parallel_schedule", str, "1F1B", "", PIPELINE),
    Flag("experimental.pipeline_parallel_schedule_csv", str, "", "", PIPELINE),
    Flag("experimental.pipeline_parallel_microbatches", int, None, "", PIPELINE),
    Flag("experimental.enable_compiled_autograd", bool, False, "", OWN_CODE),
    Flag(
        "experimental.context_parallel_degree",
        int,
        1,
        "parallel.context",
        "there it cuts the rows of linear attention without passing its state on",
    ),
    Flag("experimental.context_parallel_rotate_method", str, "allgather", "", OWN_CODE),
    Flag(
        "experimental.custom_model_path",
        str,
        "",
        "model.module",
        "there a module that registers classes, here a file with `class Model`: docs/models.md",
    ),
    Flag(
        "activation_checkpoint.mode",
        str,
        "selective",
        "memory.recompute",
        "full and selective with op are the same; selective with a number is full in every n-th block",
        ("none", "full", "selective"),
    ),
    Flag("activation_checkpoint.selective_ac_option", str, "2", "memory.recompute_every", "see mode"),
    Flag("activation_offload.mode", str, "none", "", NEVER_READ),
)

RECORDS = (
    Flag("metrics.log_freq", int, 10, "logging.every", "same; the loss is of all ranks' predicted tokens"),
    Flag("metrics.enable_tensorboard", bool, False, "logging.tensorboard", "on where it is left out"),
    Flag("metrics.disable_color_printing", bool, False, "", "none: no colours in a log"),
    Flag("metrics.save_tb_folder", str, "tb", "", "RUN/tensorboard"),
    Flag("metrics.save_for_all_ranks", bool, False, "", "none: the figures are of all ranks already"),
    Flag(
        "metrics.enable_wandb", bool, False, "logging.trackers", "WANDB_PROJECT and WANDB_NAME hold, as there"
    ),
    Flag("checkpoint.enable_checkpoint", bool, False, "", "always"),
    Flag("checkpoint.folder", str, "checkpoint", "", "RUN/checkpoints"),
    Flag(
        "checkpoint.initial_load_path",
        str,
        None,
        "",
        "none: convert it there with convert_dcp_to_hf and name the folder in model.init_from",
    ),
    Flag("checkpoint.initial_load_model_weights_only", bool, True, "", "see initial_load_path"),
    Flag("checkpoint.no_initial_load_model_weights_only", bool, False, "", "see initial_load_path"),
    Flag("checkpoint.interval", int, 500, "checkpoint.every", "same"),
    Flag("checkpoint.last_save_model_weights_only", bool, False, "export.at_end", "see export_dtype"),
    Flag(
        "checkpoint.export_dtype",
        str,
        "float32",
        "export.dtype",
        "train.sh makes a folder for transformers at the end: export.at_end, in RUN/export",
        ("float16", "bfloat16", "float32"),
    ),
    Flag("checkpoint.create_seed_checkpoint", bool, False, "", "run.steps = 0 writes one"),
    Flag("checkpoint.async_mode", str, "disabled", "", "always in the background, from host memory"),
    Flag("checkpoint.keep_latest_k", int, 0, "checkpoint.keep", "0 keeps all there; here a number"),
    Flag(
        "checkpoint.load_step", int, -1, "", "the newest whole one; run.start_from branches off another step"
    ),
    Flag("checkpoint.exclude_from_loading", list, [], "", "run.exclude names parameters that begin anew"),
)

OTHER = (
    Flag("profiling.enable_profiling", bool, False, "", PROFILE),
    Flag("profiling.save_traces_folder", str, "profile_traces", "", PROFILE),
    Flag("profiling.profile_freq", int, 10, "", PROFILE),
    Flag("profiling.enable_memory_snapshot", bool, False, "", PROFILE),
    Flag("profiling.save_memory_snapshot_folder", str, "memory_snapshot", "", PROFILE),
    Flag("float8.enable_fsdp_float8_all_gather", bool, False, "", FLOAT8),
    Flag("float8.precompute_float8_dynamic_scale_for_fsdp", bool, False, "", FLOAT8),
    Flag("float8.force_recompute_fp8_weight_in_bwd", bool, False, "", FLOAT8),
    Flag("float8.recipe_name", str, None, "", FLOAT8, ("tensorwise", "rowwise", "rowwise_with_gw_hp")),
    Flag("comm.init_timeout_seconds", int, 300, "", OWN_CODE),
    Flag("comm.train_timeout_seconds", int, 100, "", OWN_CODE),
    Flag("comm.trace_buf_size", int, 20000, "", OWN_CODE),
    Flag("memory_estimation.enabled", bool, False, "", OWN_CODE),
    Flag("memory_estimation.disable_fake_mode", bool, False, "", OWN_CODE),
    Flag("fault_tolerance.enable", bool, False, "", RESTARTS),
    Flag("fault_tolerance.replica_id", int, 0, "", RESTARTS),
    Flag("fault_tolerance.group_size", int, 0, "", RESTARTS),
    Flag("fault_tolerance.min_replica_size", int, 1, "", RESTARTS),
)

FLAGS = {
    flag.name: flag
    for group in (JOB, MODEL, OPTIMIZER, BATCH, DATA, PARALLEL, RECORDS, OTHER)
    for flag in group
}

# of versions before, which the README there still lists
OLDER = {
    "optimizer.min_lr_ratio": "lr_scheduler.lr_min",
    "optimizer.scheduler": "lr_scheduler.decay_type",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
}


def table() -> str:
    """The table of docs/from-flame.md, in Markdown."""
    lines = ["| there | default there | here | what differs, or why there is none |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows()]
    return "\n".join(lines)


def rows() -> Iterator[tuple[str, str, str, str]]:
    for flag in FLAGS.values():
        default = {None: "", False: "off", True: "on"}.get(flag.default) if _plain(flag.default) else None
        shown = default if default is not None else f"`{flag.default}`"
        here = ", ".join(f"`{path}`" for path in flag.taken) or ("not yet" if flag.here else "none")
        yield f"`{flag.name}`", "" if flag.default in ([], "") else shown, here, flag.note


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
