"""`flame kernels`: a GPU's kernels made ready before training, and carried to other machines."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from flame import schema
from flame.errors import Exit, FlameError
from flame.recipe import read_recipe

Report = dict[str, Any]


def warm(path: str, flags: dict[str, str], ranks: int | None, as_json: bool) -> Exit:
    """Tunes and compiles all kernels of a recipe, then compiles the chosen ones alone, for `pack`."""
    recipe = read_recipe(Path(path), flags)
    text = schema.to_toml(recipe)
    tuned = _in_process(text, ranks, {})
    folders = {part: Path(place) for part, place in tuned["compiled"].items()}
    # beside the places that its files move to, so that moving is renaming
    with tempfile.TemporaryDirectory(dir=tuned["folder"], prefix=".fresh-") as fresh:
        parts = {part: Path(fresh) / part for part in folders}
        again = _in_process(
            text,
            ranks,
            {
                "TRITON_CACHE_DIR": str(parts["triton"]),
                "TORCHINDUCTOR_CACHE_DIR": str(parts["inductor"]),
                "TRITON_STORE_BINARY_ONLY": "1",
            },
        )
        from flame.models.kernel_archive import keep_needed

        files = keep_needed(Path(tuned["folder"]), text, parts, folders)
    report = {"tuning": tuned, "chosen": again, "files": files}
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(
            f"{tuned['gpu']}: {len(tuned['tuned'])} choices made, {tuned['first_step_seconds']:.1f} s to the "
            f"first step; with them {again['first_step_seconds']:.1f} s\n"
            f"{tuned['folder']}: {files} files needed"
        )
    if again["tuned"]:
        raise FlameError(
            f"{path}: {again['tuned'][0]['kernel']} was tuned twice: its choice was not found again in "
            f"{tuned['folder']}; see that the folder can be written"
        )
    return Exit.DONE


def pack(archive: str) -> Exit:
    """Packs what warmed recipes need on this machine."""
    from flame.models import kernel_archive

    platform, folder, compiled = _here()
    sizes = kernel_archive.pack(Path(archive), platform, folder, compiled)
    inside = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sizes.items())
    print(f"{archive}: {Path(archive).stat().st_size / 1e6:.1f} MB ({inside}), for {platform.gpu}")
    return Exit.DONE


def unpack(archive: str) -> Exit:
    """Puts an archive's kernels where training on this machine finds them."""
    from flame.models import kernel_archive

    platform, folder, compiled = _here()
    counts = kernel_archive.unpack(Path(archive), platform, folder, compiled)
    print(f"{folder}: " + ", ".join(f"{count} files of {part}" for part, count in counts.items()))
    return Exit.DONE


def _here() -> tuple[Any, Path, dict[str, Path]]:
    """This machine's platform, the user's folder for it, and where its compiled kernels lie."""
    import torch

    from flame.models.kernel_platform import ask_for_gpu, compiled_parts, platform_of, user_folder

    ask_for_gpu()
    platform = platform_of(torch.device("cuda", 0))
    return platform, user_folder(platform), compiled_parts(platform)


def _in_process(text: str, ranks: int | None, variables: dict[str, str]) -> Report:
    """Prepares the recipe's kernels in a process of its own, whose caches in memory are empty."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_prepare, args=(text, ranks, variables, theirs))
    process.start()
    theirs.close()
    try:
        answer: Report | FlameError = ours.recv()
    except EOFError:
        process.join()
        raise FlameError(
            f"the process that prepares the kernels ended with exit code {process.exitcode}; "
            "what it said is above"
        ) from None
    process.join()
    if isinstance(answer, FlameError):
        raise answer
    return answer


def _prepare(text: str, ranks: int | None, variables: dict[str, str], answer: Any) -> None:
    """What that process runs."""
    from flame.train.lifeline import die_with_parent

    die_with_parent()
    os.environ.update(variables)
    try:
        from flame.kernels import prepare

        answer.send(prepare(text, ranks))
    except FlameError as error:
        answer.send(error)
