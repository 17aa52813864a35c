"""Real text for benchmarks: the Python source files on this machine, and a tokenizer trained on them."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flame.data.tokens import train_tokenizer

CHARACTERS_A_TOKEN = 3.4  # of this text with 32,000 tokens
MEAN_LOG_TOKENS, SPREAD = 6.2, 1.1  # of a document's length: web-like, log-normal, 900 tokens on average
TOKENIZER_CHARACTERS = 8_000_000


def documents(characters: int) -> Iterator[str]:
    """The standard library's and the installed packages' Python files, up to `characters` in all, cut at
    line ends into documents whose lengths are distributed as those of web text."""
    lengths = np.random.default_rng(0)
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            except (OSError, UnicodeDecodeError):
                continue
            while lines:
                wanted = CHARACTERS_A_TOKEN * (lengths.lognormal(MEAN_LOG_TOKENS, SPREAD) + 16)
                text = ""
                while lines and len(text) < wanted:
                    text += lines.pop(0)
                characters -= len(text)
                yield text
                if characters <= 0:
                    return


def prepare(folder: Path, characters: int, vocabulary: int, tokenizer: bool = True) -> tuple[Path, Path]:
    """text.jsonl and, where it is wanted, a tokenizer in `folder`, made once; their paths."""
    text, trained = folder / "text.jsonl", folder / f"tokenizer-{vocabulary}"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = text.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(json.dumps({"text": t}) + "\n" for t in documents(characters))
        partial.rename(text)
    if tokenizer and not trained.exists():
        train_tokenizer(documents(min(characters, TOKENIZER_CHARACTERS)), vocabulary, trained)
    return text, trained


def copies(text: Path, count: int) -> Path:
    """A folder of so many files that are all `text`: links to it."""
    folder = text.with_name(f"copies-{count}")
    folder.mkdir(exist_ok=True)
    for i in range(count):
        name = folder / f"{i:04}.jsonl"
        if not name.exists():
            name.hardlink_to(text)
    return folder


if __name__ == "__main__":
    print(*prepare(Path(sys.argv[1]), int(float(sys.argv[2])), int(sys.argv[3])))
