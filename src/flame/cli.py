"""The command line. Torch-free until a command is called, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import flame
from flame import schema
from flame.errors import Exit, FlameError, nearest
from flame.recipe import Recipe


class Parser(argparse.ArgumentParser):
    """argparse with a hint for misspelled options."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        hint = nearest(unknown, self._option_string_actions) if unknown else ""
        self.exit(Exit.USAGE, f"flame: {message}{'; ' + hint if hint else ''}\nsee `{self.prog} --help`\n")


def main() -> None:
    """The `flame` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs a command; its exit code. Prints the message of a FlameError, never its traceback."""
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown and "words" in options:  # another program's flags, which begin what the command takes over
        options.words, unknown = [*unknown, *options.words], []
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(call(options))
    except FlameError as error:
        print(f"flame: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE


def call(options: argparse.Namespace) -> int:
    """Loads the command's module and calls it with its arguments."""
    options.flags = recipe_flags(options)
    module, function = options.calls
    return getattr(import_module(module), function)(*[getattr(options, name) for name in options.takes])


def recipe_flags(options: argparse.Namespace) -> dict[str, str]:
    """The `--section.field` flags that were given."""
    return {name: value for name, value in vars(options).items() if "." in name}


def make_parser() -> Parser:
    parser = Parser(prog="flame", description="Train language models: raw text in, a model out.")
    parser.add_argument("--version", action="version", version=f"flame {flame.__version__}")
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_train,
        add_data,
        add_tokenizer,
        add_export,
        add_generate,
        add_eval,
        add_status,
        add_report,
        add_checkpoint,
        add_models,
        add_kernels,
        add_doctor,
        add_import_args,
        add_demo,
    ):
        add(commands)
    return parser


def add_command(
    commands: Any, name: str, summary: str, calls: tuple[str, str], takes: tuple[str, ...]
) -> argparse.ArgumentParser:
    """A command that calls a function, (module in flame.commands, its name), with the options it `takes`."""
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(calls=(f"flame.commands.{calls[0]}", calls[1]), takes=takes, parser=parser)
    return parser


def add_train(commands: Any) -> None:
    summary = "train a recipe; a run that was interrupted goes on where it stopped"
    train = add_command(
        commands,
        "train",
        summary,
        ("train", "train"),
        ("recipe", "flags", "nproc", "dry_run", "gpu_memory", "json"),
    )
    train.add_argument("recipe", metavar="RECIPE.toml")
    train.add_argument(
        "--dry-run", action="store_true", help="print what each of N ranks needs, without a GPU, and end"
    )
    train.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GIB",
        help="of each GPU, for --dry-run (default: 80)",
    )
    train.add_argument("--json", action="store_true", help="--dry-run as one JSON object")
    summary = "go on with a run directory's own recipe"
    resume = add_command(commands, "resume", summary, ("train", "resume"), ("run", "flags", "nproc"))
    resume.add_argument("run", metavar="RUN")
    for command in (train, resume):
        command.add_argument(
            "--nproc", type=int, metavar="N", help="processes on this machine (default: one a GPU, else 1)"
        )
        schema.add_flags(command, Recipe)


def add_data(commands: Any) -> None:
    summary = "look at a recipe's data"
    data = commands.add_parser("data", help=summary, description=summary, allow_abbrev=False)
    data_commands: Any = data.add_subparsers(required=True, metavar="COMMAND")
    summary = "the rows of some steps, as training reads them"
    takes = ("recipe", "flags", "steps", "ranks", "split", "run", "json")
    preview = add_command(data_commands, "preview", summary, ("preview", "preview"), takes)
    preview.add_argument("recipe", metavar="RECIPE.toml")
    preview.add_argument("--steps", default="0:1", metavar="A:B", help="from A up to B; steps count from 0")
    preview.add_argument("--ranks", type=int, default=1, metavar="W", help="read through W readers")
    preview.add_argument(
        "--split",
        choices=("train", "validation"),
        default="train",
        help="validation: what is held out (default: %(default)s)",
    )
    preview.add_argument("--run", metavar="RUN", help="pass over the rows that this run skips")
    preview.add_argument("--json", action="store_true", help="one JSON object a step")
    schema.add_flags(preview, Recipe)
    summary = "read every record once: counts, lengths, bad records, duplicates"
    takes = ("recipe", "flags", "processes", "json")
    check = add_command(data_commands, "check", summary, ("check", "check"), takes)
    check.add_argument("recipe", metavar="RECIPE.toml")
    check.add_argument("--processes", type=int, metavar="N", help="(default: one a core)")
    check.add_argument("--json", action="store_true", help="one JSON object")
    schema.add_flags(check, Recipe)
    summary = "how fast this machine makes the rows: whole loader, tokenizer alone, resume, state"
    takes = ("recipe", "flags", "ranks", "seconds", "json")
    bench = add_command(data_commands, "bench", summary, ("bench", "bench"), takes)
    bench.add_argument("recipe", metavar="RECIPE.toml")
    bench.add_argument("--ranks", type=int, default=1, metavar="W", help="measure rank 0 of W")
    bench.add_argument("--seconds", type=float, default=20.0, metavar="S", help="(default: %(default)s)")
    bench.add_argument("--json", action="store_true", help="one JSON object")
    schema.add_flags(bench, Recipe)


def add_tokenizer(commands: Any) -> None:
    summary = "make a tokenizer"
    tokenizer = commands.add_parser("tokenizer", help=summary, description=summary, allow_abbrev=False)
    tokenizer_commands: Any = tokenizer.add_subparsers(required=True, metavar="COMMAND")
    summary = "train a byte-level BPE on a recipe's own data and write it to the recipe's tokenizer.path"
    takes = ("recipe", "flags", "vocabulary", "characters")
    train = add_command(tokenizer_commands, "train", summary, ("tokenizer", "train"), takes)
    train.add_argument("recipe", metavar="RECIPE.toml")
    train.add_argument(
        "--vocabulary", default="32768", metavar="N", help="tokens, <|eos|> among them (default: %(default)s)"
    )
    train.add_argument(
        "--characters", default="100M", metavar="N", help="most text to learn from (default: %(default)s)"
    )
    schema.add_flags(train, Recipe)


def add_export(commands: Any) -> None:
    summary = "write a run's model as a folder that transformers loads"
    takes = ("run", "step", "to", "dtype", "shard_size", "ema")
    export = add_command(commands, "export", summary, ("export", "export"), takes)
    export.add_argument("run", metavar="RUN")
    export.add_argument("--to", required=True, metavar="DIR", help="the new folder")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    export.add_argument(
        "--ema", action="store_true", help="the average of the weights, which optimizer.ema keeps"
    )
    summary = 'most of one file of weights, in bytes: "2B", "4Gi" (default: %(default)s)'
    export.add_argument("--shard-size", default="5B", metavar="N", help=summary)


def add_generate(commands: Any) -> None:
    summary = "continue a text with an exported model or a run"
    takes = ("model", "prompt", "tokens", "temperature", "seed")
    generate = add_command(commands, "generate", summary, ("generate", "generate"), takes)
    generate.add_argument("model", metavar="DIR_OR_RUN")
    generate.add_argument("-p", "--prompt", required=True, help="the text to continue")
    generate.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="new tokens (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest (default: %(default)s)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")


def add_eval(commands: Any) -> None:
    summary = "a model's loss and bits per byte on held out text, or tasks of lm-evaluation-harness"
    takes = ("model", "step", "files", "text", "tokens", "length")
    takes += ("tasks", "include", "shots", "limit", "batch_size", "json")
    command = add_command(commands, "eval", summary, ("evaluate", "evaluate"), takes)
    command.add_argument("model", metavar="DIR_OR_RUN")
    command.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of a run (default: the newest)"
    )
    command.add_argument(
        "--files", nargs="+", metavar="FILE", help="text to read (default: what the run's recipe holds out)"
    )
    command.add_argument("--text", metavar="FIELD", help="of these files (default: text, else content)")
    command.add_argument(
        "--tokens", metavar="N", help="the first so many, such as 1M (default: all, or the run's)"
    )
    command.add_argument(
        "--length", type=int, metavar="L", help="tokens in a row (default: the run's, else up to 2048)"
    )
    command.add_argument(
        "--tasks", metavar="A,B", help='run these instead (extra: pip install "flame[eval]")'
    )
    command.add_argument("--include", metavar="DIR", help="a folder with tasks of your own")
    command.add_argument("--shots", type=int, metavar="N", help="examples before each question of a task")
    command.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task")
    command.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="of the tasks (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="one JSON object")


def add_status(commands: Any) -> None:
    status = add_command(commands, "status", "how far a run is", ("status", "status"), ("run",))
    status.add_argument("run", metavar="RUN")


def add_report(commands: Any) -> None:
    summary = "a run's curves and events as one HTML page"
    report = add_command(commands, "report", summary, ("report", "report"), ("run", "to"))
    report.add_argument("run", metavar="RUN")
    report.add_argument("--to", metavar="FILE", help="the page (default: RUN/report.html)")


def add_checkpoint(commands: Any) -> None:
    summary = "a run's checkpoints: list, verify, prune"
    checkpoint = commands.add_parser("checkpoint", help=summary, description=summary, allow_abbrev=False)
    checkpoint_commands: Any = checkpoint.add_subparsers(required=True, metavar="COMMAND")
    summary = "steps, tokens, sizes and dates"
    listing = add_command(checkpoint_commands, "list", summary, ("checkpoint", "show"), ("run",))
    summary = "read every file and compare it with its manifest; exit code 1 where one is damaged"
    verify = add_command(checkpoint_commands, "verify", summary, ("checkpoint", "verify"), ("run", "step"))
    verify.add_argument("--step", type=int, metavar="N", help="this one alone (default: all)")
    summary = "delete those that the recipe does not keep, never the newest whole one"
    takes = ("run", "keep", "rolled_back")
    prune = add_command(checkpoint_commands, "prune", summary, ("checkpoint", "prune_run"), takes)
    prune.add_argument("--keep", type=int, metavar="N", help="newest ones (default: checkpoint.keep)")
    prune.add_argument("--rolled-back", action="store_true", help="also those that a rollback set aside")
    for command in (listing, verify, prune):
        command.add_argument("run", metavar="RUN")


def add_models(commands: Any) -> None:
    summary = "the families of models that train, and what is proven of each"
    models = add_command(commands, "models", summary, ("models", "models"), ("json", "markdown"))
    form = models.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--markdown", action="store_true", help="the table as docs/models.md has it")


def add_kernels(commands: Any) -> None:
    summary = "make a GPU's kernels ready before training, and carry them to other machines"
    kernels = commands.add_parser("kernels", help=summary, description=summary, allow_abbrev=False)
    kernel_commands: Any = kernels.add_subparsers(required=True, metavar="COMMAND")
    summary = "tune and compile all kernels that a recipe needs on this GPU"
    takes = ("recipe", "flags", "nproc", "json")
    warm = add_command(kernel_commands, "warm", summary, ("kernels", "warm"), takes)
    warm.add_argument("recipe", metavar="RECIPE.toml")
    warm.add_argument("--nproc", type=int, metavar="N", help="ranks that will train it (default: one a GPU)")
    warm.add_argument("--json", action="store_true", help="one JSON object")
    schema.add_flags(warm, Recipe)
    summary = "write the kernels of warmed recipes to one file, ARCHIVE.tar.zst or .tar.xz"
    pack = add_command(kernel_commands, "pack", summary, ("kernels", "pack"), ("archive",))
    pack.add_argument("archive", metavar="ARCHIVE")
    summary = "put a file's kernels where training finds them; the GPU and versions must be the same"
    unpack = add_command(kernel_commands, "unpack", summary, ("kernels", "unpack"), ("archive",))
    unpack.add_argument("archive", metavar="ARCHIVE")


def add_doctor(commands: Any) -> None:
    summary = "whether this machine, and a recipe on it, can train: a line for each thing, with its fix"
    takes = ("recipe", "flags", "nproc", "json")
    command = add_command(commands, "doctor", summary, ("doctor", "doctor"), takes)
    command.add_argument("recipe", nargs="?", metavar="RECIPE.toml")
    command.add_argument("--nproc", type=int, metavar="N", help="ranks that will train (default: one a GPU)")
    command.add_argument("--json", action="store_true", help="one JSON object")
    schema.add_flags(command, Recipe)


def add_import_args(commands: Any) -> None:
    summary = "turn a command line, script or TOML of fla-org/flame into a recipe, and say what differs"
    takes = ("words", "gpus", "to", "markdown")
    command = add_command(commands, "import-args", summary, ("import_args", "import_args"), takes)
    command.add_argument(
        "--gpus", type=int, metavar="N", help="all that the old run had (default: NGPU, else 8)"
    )
    command.add_argument("--to", metavar="RECIPE.toml", help="the new file (default: standard output)")
    command.add_argument("--markdown", action="store_true", help="the table of docs/from-flame.md instead")
    command.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="bash train.sh --job.config_file ... | SCRIPT | FILE.toml",
        help="the old run; options of this command come before it",
    )


def add_demo(commands: Any) -> None:
    summary = "train, interrupt, resume and export a small model on this machine's text"
    demo = add_command(commands, "demo", summary, ("demo", "demo"), ("directory", "keep"))
    demo.add_argument("--directory", default="runs/demo", metavar="DIR", help="(default: %(default)s)")
    demo.add_argument("--keep", action="store_true", help="keep what an earlier demo left in DIR")
