"""The command line. Torch-free until a command is called, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
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
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(call(options))
    except FlameError as error:
        print(f"flame: {error}", file=sys.stderr)
        return Exit.WRONG_INPUT
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE


def call(options: argparse.Namespace) -> int:
    """Loads the command's module and calls it."""
    name = options.command if options.command != "data" else f"data {options.data_command}"
    if name in ("train", "resume"):
        from flame.commands import train

        target = options.recipe if name == "train" else options.run
        return getattr(train, name)(target, recipe_flags(options), options.nproc)
    if name == "data preview":
        from flame.commands.preview import preview

        return preview(options.recipe, recipe_flags(options), options.steps, options.ranks, options.json)
    if name == "export":
        from flame.commands.export import export

        return export(options.run, options.step, options.to, options.dtype)
    if name == "generate":
        from flame.commands.generate import generate

        return generate(options.model, options.prompt, options.tokens, options.temperature, options.seed)
    if name == "status":
        from flame.commands.status import status

        return status(options.run)
    if name == "report":
        from flame.commands.report import report

        return report(options.run, options.to)
    from flame.commands.demo import demo

    return demo(options.directory, options.keep)


def recipe_flags(options: argparse.Namespace) -> dict[str, str]:
    """The `--section.field` flags that were given."""
    return {name: value for name, value in vars(options).items() if "." in name}


def make_parser() -> Parser:
    parser = Parser(prog="flame", description="Train language models: raw text in, a model out.")
    parser.add_argument("--version", action="version", version=f"flame {flame.__version__}")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = add_command(
        commands, "train", "train a recipe; a run that was interrupted goes on where it stopped"
    )
    train.add_argument("recipe", metavar="RECIPE.toml")
    resume = add_command(commands, "resume", "go on with a run directory's own recipe")
    resume.add_argument("run", metavar="RUN")
    for command in (train, resume):
        command.add_argument(
            "--nproc", type=int, metavar="N", help="processes on this machine (default: one a GPU, else 1)"
        )
        schema.add_flags(command, Recipe)

    data = add_command(commands, "data", "look at a recipe's data")
    data_commands: Any = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    preview = add_command(data_commands, "preview", "the rows of some steps, as training reads them")
    preview.add_argument("recipe", metavar="RECIPE.toml")
    preview.add_argument("--steps", default="0:1", metavar="A:B", help="from A up to B; steps count from 0")
    preview.add_argument("--ranks", type=int, default=1, metavar="W", help="read through W readers")
    preview.add_argument("--json", action="store_true", help="one JSON object a step")
    schema.add_flags(preview, Recipe)

    export = add_command(commands, "export", "write a run's model as a folder that transformers loads")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--to", required=True, metavar="DIR", help="the new folder")
    export.add_argument("--step", type=int, metavar="N", help="the checkpoint (default: the newest)")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )

    generate = add_command(commands, "generate", "continue a text with an exported model or a run")
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

    status = add_command(commands, "status", "how far a run is")
    status.add_argument("run", metavar="RUN")
    report = add_command(commands, "report", "a run's curves and events as one HTML page")
    report.add_argument("run", metavar="RUN")
    report.add_argument("--to", metavar="FILE", help="the page (default: RUN/report.html)")

    demo = add_command(
        commands, "demo", "train, interrupt, resume and export a small model on this machine's text"
    )
    demo.add_argument("--directory", default="runs/demo", metavar="DIR", help="(default: %(default)s)")
    demo.add_argument("--keep", action="store_true", help="keep what an earlier demo left in DIR")
    return parser


def add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(parser=parser)  # the innermost one: it knows which options are near a misspelled one
    return parser
