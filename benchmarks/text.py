"""Real text for benchmarks: the Python source files on this machine, and a tokenizer trained on them."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from flame.data.tokens import train_tokenizer

DOCUMENT_CHARACTERS = 100_000  # of a file, at most: a generated table of constants is no text
TOKENIZER_CHARACTERS = 8_000_000


def source_files(characters: int) -> Iterator[str]:
    """Contents of the standard library's and the installed packages' Python files, up to `characters`."""
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            if characters <= 0:
                return
            try:
                text = path.read_text(encoding="utf-8")[:DOCUMENT_CHARACTERS]
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                characters -= len(text)
                yield text


def prepare(folder: Path, characters: int, vocabulary: int) -> tuple[Path, Path]:
    """text.jsonl and a tokenizer in `folder`, made once; their paths."""
    text, tokenizer = folder / "text.jsonl", folder / f"tokenizer-{vocabulary}"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = text.with_suffix(".partial")
        with partial.open("w") as file:
            file.writelines(json.dumps({"text": t}) + "\n" for t in source_files(characters))
        partial.rename(text)
    if not tokenizer.exists():
        train_tokenizer(source_files(TOKENIZER_CHARACTERS), vocabulary, tokenizer)
    return text, tokenizer


if __name__ == "__main__":
    print(*prepare(Path(sys.argv[1]), int(float(sys.argv[2])), int(sys.argv[3])))
