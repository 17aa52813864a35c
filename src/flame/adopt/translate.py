"""From the values of fla-org/flame's flags to a recipe, and what one should know of the difference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from flame import schema
from flame.adopt.arguments import OldRun
from flame.adopt.flags import FLAGS, SETTINGS
from flame.errors import RecipeError
from flame.recipe import Recipe, check

GPUS = 8  # what its train.sh takes
RESHARD = {"always": "forward", "never": "micro_batch"}  # parallel.reshard
READERS = ("json", "parquet", "text", "arrow", "csv")  # names of formats in place of a data set


class Draft:
    """A recipe in the making, as TOML tables, with its notes."""

    def __init__(self, old: OldRun, gpus: int | None) -> None:
        """`gpus`: all that the old run had; None: what its command says, else GPUS."""
        self.old = old
        self.raw: dict[str, Any] = {}
        self.notes: list[str] = []
        self.handled: set[str] = set()  # flags of which everything has been said
        known = gpus if gpus is not None else old.gpus
        self.gpus = GPUS if known is None else known
        if known is None:
            self.note(
                f"GPUs of the old run: not said, taken as {GPUS}, as train.sh does; its batch depends on "
                "them: if it had others, give --gpus N"
            )

    def value(self, name: str) -> Any:
        """What the old run had for a flag."""
        self.handled.add(name)
        return self.old.values[name]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def put(self, path: str, value: Any, flag: str) -> None:
        """Writes a setting, or notes that this flame has none such."""
        if path not in SETTINGS:
            self.note(f"{flag}: there is no {path} here yet: left out")
            return
        section, _, key = path.partition(".")
        self.raw.setdefault(section, {})[key] = value


def translate(old: OldRun, gpus: int | None = None) -> tuple[str, list[str]]:
    """The recipe as TOML, and notes on what differs. Raises RecipeError for what no recipe can say."""
    draft = Draft(old, gpus)
    for part in (run_and_model, optimizer, batch, sources, layout, recompute, records):
        part(draft)
    draft.notes += left_out(draft)
    config = schema.build(Recipe, draft.raw, "the recipe made of it")
    check(config, "the recipe made of it")
    return tomli_w.dumps(draft.raw), draft.notes


def run_and_model(draft: Draft) -> None:
    value = draft.value
    draft.put("run.directory", value("job.dump_folder"), "job.dump_folder")
    draft.put("run.steps", value("training.steps"), "training.steps")
    draft.put("run.seed", value("training.seed"), "training.seed")
    if value("training.deterministic"):
        draft.put("run.deterministic", True, "training.deterministic")
    draft.put("model.config", value("model.config"), "model.config")
    draft.value("job.config_file")
    draft.note(
        "training.seed: the same number gives another order of the data and other initial weights here"
    )
    if value("model.name") != "fla":
        draft.note(
            f'model.name {old_text(draft, "model.name")}: only "fla" is known; model.config decides here'
        )
    name = value("model.tokenizer_path")
    local = f"tokenizers/{name.rpartition('/')[2]}"
    if Path(name).exists() or not hub_name(name):
        local = name
    else:
        draft.note(
            f"model.tokenizer_path: tokenizers are local files here: "
            f"hf download {name} tokenizer.json tokenizer_config.json --local-dir {local}"
        )
    draft.put("tokenizer.path", local, "model.tokenizer_path")
    draft.note(
        "model.tokenizer_path: EOS ends every document here; there a document has what the tokenizer adds: "
        "if that is BOS before it, set tokenizer.bos = true"
    )
    module = value("experimental.custom_model_path")
    if module:
        draft.note(
            f"experimental.custom_model_path {module}: left out: a model of your own is a file with `class "
            "Model` here, named in model.module: see docs/models.md"
        )


def optimizer(draft: Draft) -> None:
    value = draft.value
    if value("optimizer.name").lower() != "adamw":
        draft.note(
            f"optimizer.name {old_text(draft, 'optimizer.name')}: AdamW is taken: its weight decay is apart "
            "from the gradient, Adam's is not"
        )
    for there, here in (
        ("lr", "learning_rate"),
        ("eps", "epsilon"),
        ("beta1", "beta1"),
        ("beta2", "beta2"),
        ("weight_decay", "weight_decay"),
    ):
        draft.put(f"optimizer.{here}", value(f"optimizer.{there}"), f"optimizer.{there}")
    if value("optimizer.weight_decay"):
        draft.note(
            "optimizer.weight_decay: of matrices only here, there of norms and biases too; as there: "
            f'[[optimizer.groups]] with pattern = "*", weight_decay = {value("optimizer.weight_decay")}'
        )
    draft.put("optimizer.clip_norm", value("training.max_norm"), "training.max_norm")
    if not value("training.skip_nan_inf"):
        draft.note("training.skip_nan_inf is off there; an update that is not finite is always skipped here")
    draft.put("schedule.warmup", f"{value('lr_scheduler.warmup_steps')} steps", "lr_scheduler.warmup_steps")
    draft.put("schedule.final_fraction", value("lr_scheduler.lr_min"), "lr_scheduler.lr_min")
    ratio, shape = value("lr_scheduler.decay_ratio"), value("lr_scheduler.decay_type")
    if ratio is None:
        draft.put("schedule.decay", shape, "lr_scheduler.decay_type")
    elif ratio == 0:
        draft.put("schedule.decay", "constant", "lr_scheduler.decay_ratio")
    else:
        draft.put("schedule.decay", "wsd", "lr_scheduler.decay_ratio")
        draft.put("schedule.decay_fraction", ratio, "lr_scheduler.decay_ratio")
        draft.put("schedule.decay_shape", shape, "lr_scheduler.decay_type")


def batch(draft: Draft) -> None:
    """The tokens of a step, which are the same on any number of GPUs here."""
    value = draft.value
    split = 1
    for name in (
        "training.tensor_parallel_degree",
        "experimental.context_parallel_degree",
        "experimental.pipeline_parallel_degree",
    ):
        split *= max(1, draft.old.values[name])
    if draft.gpus < split or draft.gpus % split:
        raise RecipeError(f"{draft.gpus} GPUs are not divisible by tensor x context x pipeline = {split}")
    rows, length = value("training.batch_size"), value("training.seq_len")
    times, ranks = value("training.gradient_accumulation_steps"), draft.gpus // split
    tokens = rows * length * times * ranks
    steps = draft.old.values["training.steps"]
    draft.put("batch.tokens_per_step", tokens, "training.batch_size")
    draft.put("batch.micro_batch_rows", rows, "training.batch_size")
    draft.put("data.sequence_length", length, "training.seq_len")
    draft.note(
        f"training.batch_size: tokens_per_step = {tokens:,} = {rows} rows x {length:,} tokens x {times} "
        f"accumulated x {ranks} data-parallel ranks, so {steps:,} steps are {steps * tokens:,} tokens; it is "
        "the same on any number of GPUs here, there it grows with them"
    )
    context = value("training.context_len")
    if value("training.varlen"):
        if context < length:
            draft.put("data.max_document_length", context, "training.context_len")
        draft.note(
            "training.varlen: bounds of documents are known here, not guessed from BOS or EOS, and the last "
            "token of a document does not learn the first of the next: the loss is of fewer tokens"
        )
    else:
        draft.note(
            "training.varlen is off there: a document sees what is before it in its row; here it never does"
        )


def sources(draft: Draft) -> None:
    """A source for each data set."""
    value = draft.value
    names = split_list(value("training.dataset"))
    columns = {
        key: aligned(draft, f"training.{key}", len(names))
        for key in ("dataset_name", "dataset_split", "data_dir", "data_files", "data_probs")
    }
    tables: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        told = {key: column[number] for key, column in columns.items()}
        table = {"name": unique(name, tables), **place(draft, name, told)}
        if len(names) > 1:
            if told["data_probs"] is None:
                raise RecipeError("training.data_probs: needed with several data sets, as there")
            table["weight"] = number_of("training.data_probs", told["data_probs"])
        tables.append(table)
    draft.raw.setdefault("data", {})["sources"] = tables
    if len(names) > 1:
        draft.note(
            "training.data_probs: there the chance that the next document is of a data set, here a source's "
            "share of the tokens: to keep the old mixture multiply each weight by its mean tokens of a "
            "document, which flame data check prints"
        )


def place(draft: Draft, name: str, told: dict[str, str | None]) -> dict[str, Any]:
    """Where a data set lies: `files` for what is local, else `dataset` on the hub."""
    files, folder = told["data_files"], told["data_dir"]
    if name in READERS:
        if files is None and folder is None:
            raise RecipeError(f"training.dataset {name}: a format without training.data_files")
        if name == "csv":
            draft.note("training.dataset csv: .csv is not read here: make .parquet of it")
        return {"files": "/".join(part for part in (folder, files) if part)}
    if Path(name).exists() or not hub_name(name):
        if told["dataset_split"] not in (None, "train") or told["dataset_name"] is not None:
            draft.note(
                f"training.dataset {name}: all files below it are read: name those of your split in files"
            )
        return {"files": "/".join(part for part in (name, folder, files) if part)}
    if files is not None or folder is not None:
        draft.note(
            f"training.dataset {name}: data_files and data_dir of a data set on the hub have no counterpart: "
            "download them and name them in files"
        )
    found = {"dataset": name, "config": told["dataset_name"], "split": told["dataset_split"]}
    return {key: text for key, text in found.items() if text is not None}


def layout(draft: Draft) -> None:
    value = draft.value
    for there, here in (
        ("training.data_parallel_replicate_degree", "parallel.replicate"),
        ("training.data_parallel_shard_degree", "parallel.shard"),
        ("training.tensor_parallel_degree", "parallel.tensor"),
        ("experimental.context_parallel_degree", "parallel.context"),
        ("experimental.pipeline_parallel_degree", "parallel.pipeline"),
    ):
        degree = value(there)
        if degree != FLAGS[there].default:
            draft.put(here, degree, there)
    reshard = RESHARD.get(value("training.fsdp_reshard_after_forward"))
    if reshard is not None and value("experimental.pipeline_parallel_degree") == 1:
        draft.put("parallel.reshard", reshard, "training.fsdp_reshard_after_forward")
    draft.put("precision.compute", value("training.mixed_precision_param"), "training.mixed_precision_param")
    if value("training.compile"):
        draft.note(f"training.compile: {FLAGS['training.compile'].note}")


def recompute(draft: Draft) -> None:
    """Activation checkpointing."""
    mode = draft.value("activation_checkpoint.mode")
    option = draft.value("activation_checkpoint.selective_ac_option")
    flag = "activation_checkpoint.mode"
    if mode == "none":
        return
    if mode == "full" or option == "op":
        draft.put("memory.recompute", mode, flag)
        return
    if not option.isdigit() or int(option) < 1:
        raise RecipeError(
            f'activation_checkpoint.selective_ac_option: found "{option}", expected "op" or 1, 2, ..'
        )
    draft.put("memory.recompute", "full", flag)
    if "memory.recompute" in SETTINGS:
        draft.put("memory.recompute_every", int(option), flag)


def records(draft: Draft) -> None:
    value = draft.value
    draft.put("logging.every", f"{value('metrics.log_freq')} steps", "metrics.log_freq")
    draft.value("metrics.enable_tensorboard")
    if value("metrics.enable_wandb"):
        draft.put("logging.trackers", ["wandb"], "metrics.enable_wandb")
    draft.put("checkpoint.every", f"{value('checkpoint.interval')} steps", "checkpoint.interval")
    if not value("checkpoint.enable_checkpoint"):
        draft.note("checkpoint.enable_checkpoint is off there; there are always checkpoints here")
    keep = value("checkpoint.keep_latest_k")
    if keep < 1:
        keep = draft.old.values["training.steps"] // max(1, draft.old.values["checkpoint.interval"]) + 2
        draft.note(f"checkpoint.keep_latest_k 0 keeps all: checkpoint.keep = {keep}; fewer take less disk")
    draft.put("checkpoint.keep", keep, "checkpoint.keep_latest_k")
    draft.put("export.at_end", True, "checkpoint.export_dtype")
    only_weights = value("checkpoint.last_save_model_weights_only")
    dtype = value("checkpoint.export_dtype")
    if only_weights and dtype != "float32":
        draft.put("export.dtype", dtype, "checkpoint.export_dtype")


def left_out(draft: Draft) -> Iterator[str]:
    """A note for each flag of which nothing was taken and nothing said yet."""
    for name in draft.old.values:
        flag = FLAGS[name]
        if name not in draft.handled and draft.old.values[name] != flag.default:
            yield f"{name} {old_text(draft, name)}: left out: {flag.note}"
    for name in draft.old.unknown:
        yield f"{name}: left out: fla-org/flame knows no such key, either"


def old_text(draft: Draft, name: str) -> str:
    return schema.shown(draft.old.values[name])


def hub_name(name: str) -> bool:
    """Whether this can be a name on the hub: ORG/NAME or NAME, and no path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def split_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def aligned(draft: Draft, name: str, count: int) -> list[str | None]:
    """A flag's values, one for each data set; None where it says nothing."""
    text = draft.value(name)
    if text is None:
        return [None] * count
    parts = split_list(text) if count > 1 else [str(text)]
    if len(parts) != count:
        raise RecipeError(f"{name}: found {len(parts)} values for {count} data sets")
    return [part or None for part in parts]


def number_of(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{name}: found {text!r}, expected numbers with commas between them") from None


def unique(name: str, tables: list[dict[str, Any]]) -> str:
    """A name for a source: the last part of its data set's."""
    base = re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-") or "data"
    taken = {table["name"] for table in tables}
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, 1000))) if n not in taken)
