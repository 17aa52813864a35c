"""`flame demo`: trains a small model on text of this machine, interrupts it twice, and shows what came of it.

It uses the commands as anybody would; nothing in training knows that it is a demo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flame.commands.generate import continuation
from flame.commands.report import report
from flame.data.tokens import train_tokenizer
from flame.errors import Exit, FlameError
from flame.exports import export_run
from flame.train.journal import read_lines

STEPS = 100
KILL_AT, STOP_AT = STEPS // 2, STEPS * 3 // 4
TEXT_CHARACTERS = 6_000_000
VOCABULARY = 4096
LOSS_TOLERANCE = 1e-3  # the two differ in threads a rank, hence at times in a rounding
PROMPT = "def __init__(self"
STEP_SECONDS = 120  # the longest that the demo waits for a step

GLA = {
    "model_type": "gla",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "expand_k": 0.5,
    "expand_v": 1,
    "hidden_ratio": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "fuse_cross_entropy": False,
}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}

RECIPE = """\
# gated linear attention on this machine's own text
[run]
directory = "{directory}"
steps = {steps}

[model]
config = "{model}"

[tokenizer]
path = "{tokenizer}"

[data]
sequence_length = 512

[[data.sources]]
name = "python"
files = "{text}"

[batch]
tokens_per_step = 3072

[optimizer]
learning_rate = 4e-3

[schedule]
warmup = "10 steps"

[checkpoint]
every = "10 steps"
"""


def demo(directory: str, keep: bool) -> Exit:
    """Runs the whole story in `directory`; FlameError where a part of it does not hold."""
    began = time.monotonic()
    folder = Path(directory).absolute()
    if folder.exists() and not keep:
        if not (folder / "demo.toml").exists() and any(folder.iterdir()):
            raise FlameError(f"{folder}: exists and is no earlier demo; choose another --directory")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)

    say("1. Raw text: Python's own standard library, and a tokenizer trained on it")
    reference, interrupted = prepare(folder)

    say(f"2. Gated linear attention, {STEPS} steps on 1 process, undisturbed: what the rest is compared with")
    finish_of(start(reference, 1), 0)

    say(f"3. The same recipe on 2 processes; one of them gets SIGKILL at step {KILL_AT}")
    run = folder / "interrupted"
    trainer = start(interrupted, 2)
    wait_for_step(run, KILL_AT, trainer)
    os.kill(pids_of(run)[1], signal.SIGKILL)
    wait_for_step(run, STOP_AT, trainer)
    say(f"   it recovered by itself; the whole run gets SIGTERM after step {STOP_AT}")
    trainer.send_signal(signal.SIGTERM)
    finish_of(trainer, Exit.STOPPED)

    say("4. The run goes on, now on 1 process")
    finish_of(start(interrupted, 1), 0)

    say("5. What became of it")
    compare(folder / "undisturbed", run)
    step = export_run(run, None, folder / "exported", "float32")
    text = continuation(folder / "exported", PROMPT, 40, 0.0, 0)
    print(f"   exported after step {step}; loaded with transformers' AutoModelForCausalLM, it writes:\n")
    print("   | " + text.replace("\n", "\n   | ") + "\n")
    report(str(run), None)
    print(f"   {time.monotonic() - began:.0f} seconds in all. Next:")
    for line in next_steps(folder):
        print(f"   {line}")
    return Exit.DONE


def say(line: str) -> None:
    print(f"\n{line}", flush=True)


# --------------------------------------------------------------------------------- preparation


def prepare(folder: Path) -> tuple[Path, Path]:
    """Writes text, tokenizer, model config and the two recipes, which differ in their directory alone."""
    text, tokenizer, model = folder / "text.jsonl", folder / "tokenizer", folder / "gla.json"
    documents = list(standard_library(TEXT_CHARACTERS))
    with text.open("w") as file:
        for name, content in documents:
            file.write(json.dumps({"name": name, "text": content}) + "\n")
    train_tokenizer((content for _, content in documents), VOCABULARY, tokenizer)
    model.write_text(json.dumps(GLA, indent=2))
    (folder / "llama.json").write_text(json.dumps(LLAMA, indent=2))
    size = sum(len(content) for _, content in documents)
    print(f"   {len(documents)} files, {size:,} characters, {VOCABULARY} tokens: {text}")
    recipes: list[Path] = []
    for file, directory in (("reference.toml", "undisturbed"), ("demo.toml", "interrupted")):
        recipe = RECIPE.format(
            directory=folder / directory, steps=STEPS, model=model, tokenizer=tokenizer, text=text
        )
        (folder / file).write_text(recipe)
        recipes.append(folder / file)
    return recipes[0], recipes[1]


def standard_library(characters: int) -> Iterator[tuple[str, str]]:
    """Name and content of Python's own source files, up to `characters` in all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or characters <= 0:
            continue
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if content:
            characters -= len(content)
            yield str(path.relative_to(root)), content


# ------------------------------------------------------------------------------------ training


def start(recipe: Path, ranks: int) -> subprocess.Popen[bytes]:
    """`flame train` in a process of its own."""
    command = [sys.executable, "-m", "flame", "train", str(recipe), "--nproc", str(ranks)]
    print(f"   $ flame train {recipe.name} --nproc {ranks}", flush=True)
    return subprocess.Popen(command)


def finish_of(trainer: subprocess.Popen[bytes], expected: int) -> None:
    """Waits for the end. Raises FlameError where the exit code is another one."""
    code = trainer.wait()
    if code != expected:
        raise FlameError(f"demo: flame train ended with exit code {code}, expected {expected}")
    print(f"   exit code {code}", flush=True)


def wait_for_step(run: Path, step: int, trainer: subprocess.Popen[bytes]) -> None:
    """Waits until the run's metrics have come to `step`. Raises FlameError where they never do."""
    heard = time.monotonic()
    last = 0
    while last < step:
        now = max((r["step"] for r in read_lines(run / "metrics.jsonl")), default=0)
        if now > last:
            last, heard = now, time.monotonic()
        if trainer.poll() is not None or time.monotonic() - heard > STEP_SECONDS:
            raise FlameError(f"demo: training came to step {last} only, not to {step}")
        time.sleep(0.02)


def pids_of(run: Path) -> list[int]:
    """The ranks' process ids, as the run itself notes them."""
    begun = [e for e in read_lines(run / "events.jsonl") if e["event"] in ("start", "resume")]
    return begun[-1]["pids"]


# -------------------------------------------------------------------------------------- result


def compare(undisturbed: Path, interrupted: Path) -> None:
    """Prints how the two runs compare. Raises FlameError where rows or losses differ."""
    whole, cut = (list(read_lines(run / "metrics.jsonl")) for run in (undisturbed, interrupted))
    same_rows = [a["rows_digest"] for a in whole] == [b["rows_digest"] for b in cut]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, cut, strict=True))
    again: list[dict[str, Any]] = list(read_lines(interrupted / "logs" / "superseded.jsonl"))
    print(f"   rows       {'identical' if same_rows else 'DIFFERENT'} at all {len(cut)} steps (hash of rows)")
    print(f"   loss       {cut[0]['loss']:.3f} -> {cut[-1]['loss']:.3f}, undisturbed {whole[-1]['loss']:.3f}")
    print(f"   difference {worst:.2g} at most over all steps, tolerance {LOSS_TOLERANCE}")
    print(f"   recovery   {len(again)} steps trained again after the crash, from the newest checkpoint")
    if not same_rows or worst > LOSS_TOLERANCE:
        raise FlameError("demo: the interrupted run is not the undisturbed one")


def next_steps(folder: Path) -> list[str]:
    recipe = folder / "demo.toml"
    return [
        f"the report         {folder / 'interrupted' / 'report.html'}",
        f"a transformer      flame train {recipe} --model.config {folder / 'llama.json'} "
        "--run.directory runs/llama",
        f'your own text      in {recipe}: files = "my/text/*.jsonl" (or .txt, .parquet)',
        "all settings       flame train --help",
    ]
