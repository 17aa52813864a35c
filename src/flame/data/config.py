"""The settings that the data plane reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from flame.schema import Duration, parse_count, parse_duration, parse_strings, setting


def parse_weights(raw: Any) -> dict[str, float]:
    """A table of numbers by source name."""
    table = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    numbers = {name: w for name, w in table.items() if isinstance(w, (int, float)) and w is not True}
    if not numbers or len(numbers) != len(table):
        raise ValueError("a weight for each named source, such as { web = 0.5, code = 0.5 }")
    return {name: float(weight) for name, weight in numbers.items()}


BYTES = "bytes"  # as tokenizer.path: no file; 256 bytes and EOS
BACKENDS = ("tokenizers", "gigatoken", "fastokens")
TRAIN_ON = ("assistant", "last", "all")


@dataclass
class TokenizerConfig:
    path: str = setting(
        help="a tokenizer.json, a directory that holds one (as transformers saves it), a .tiktoken file of "
        'ranks, or "bytes": 256 bytes and EOS, without any file',
        identity=False,  # a moved tokenizer is the same: the fingerprint knows its content
    )
    bos: bool = setting(
        False, help="put the tokenizer's BOS token before each document; EOS always ends one", identity=True
    )
    backend: str = setting(
        "tokenizers",
        help="the library that encodes with a tokenizer.json; the faster ones are installed as extras and "
        "refused unless their ids are those of tokenizers",
        identity=False,  # the ids are the same
        choices=BACKENDS,
    )


@dataclass
class SourceConfig:
    name: str = setting(help="what metrics and messages call this source", identity=True)
    files: list[str] = setting(
        [],
        help="a glob, a file, a directory, a URL or a list of them: .jsonl, .txt (also .gz, .zst), .parquet, "
        ".arrow, or what save_to_disk of the datasets package wrote",
        identity=False,  # a moved folder is the same data: the fingerprint knows files by relative name
        parse=parse_strings,
    )
    text: str | None = setting(
        None, help='the field or column that holds the text; left out: "text", else "content"', identity=True
    )
    weight: float = setting(
        1.0, help="this source's share of the tokens, relative to the others", identity=True
    )
    dataset: str | None = setting(
        None,
        help="instead of files: a name on the hub, or a directory, that the datasets package loads",
        identity=False,
    )
    config: str | None = setting(None, help="the configuration of that dataset", identity=False)
    split: str | None = setting(
        None, help="the split of a dataset; left out: train, or the only one that was saved", identity=False
    )
    max_epochs: int | None = setting(
        None,
        help="the source ends when each of its documents was trained this many times; left out: never",
        identity=True,
        parse=parse_count,
    )
    documents: str = setting(
        "file",
        help="plain text: a document is a file, or a paragraph; lines of white space separate paragraphs",
        identity=True,
        choices=("file", "paragraph"),
    )
    validation: list[str] = setting(
        [],
        help="files of documents that are held out of training, named like files, among them or elsewhere",
        identity=False,  # the fingerprint knows them
        parse=parse_strings,
    )
    ids: bool = setting(
        False,
        help="the files hold ids of this recipe's tokenizer: .parquet or .arrow with a column of lists, "
        ".npy, or .bin, Megatron's with its .idx or a flat one; EOS is put where it is missing",
        identity=True,
    )
    ids_column: str | None = setting(
        None, help='the column of ids; left out: "input_ids", else "tokens", else "token_ids"', identity=True
    )
    ids_dtype: str | None = setting(
        None,
        help='of a flat .bin, which has no .idx: nanoGPT writes "uint16"',
        identity=True,
        choices=("uint16", "uint32", "int32", "int64"),
    )
    template: str | None = setting(
        None,
        help='instead of text: several fields joined, such as "{title}\\n\\n{body}"; nested ones with dots, '
        "braces that are text twice",
        identity=True,
    )
    chat: str | None = setting(
        None,
        help='instead of text: the field that holds a conversation, such as "messages", a list of {role, '
        "content} or {from, value}; the tokenizer's chat template renders it",
        identity=True,
    )
    prompt: str | None = setting(
        None,
        help="instead of chat: the user's turn, made of fields as by a template, such as "
        '"{instruction}"; the tokenizer\'s chat template renders it with the completion',
        identity=True,
    )
    completion: str | None = setting(
        None, help='with prompt: the turn that is trained, such as "{output}"', identity=True
    )
    chat_template: str | None = setting(
        None,
        help="a file of Jinja in place of the tokenizer's own chat template",
        identity=False,  # the fingerprint knows its text
    )
    chat_date: str | None = setting(
        None, help="today, such as 2026-01-31, for a chat template that writes the date", identity=True
    )
    train_on: str = setting(
        "assistant",
        help="of a conversation: the turns of the assistant, the last of them, or all of the text",
        identity=True,
        choices=TRAIN_ON,
    )


@dataclass
class ValidationConfig:
    fraction: float = setting(
        0.0,
        help="of the documents of all sources that is never trained, chosen by a hash of what they say",
        identity=True,
    )
    sources: list[SourceConfig] = setting(
        [],
        help="[[validation.sources]] tables, in place of a fraction: documents that no source trains",
        identity=False,
    )
    tokens: int = setting(
        1_000_000,
        help="most that is read of what is held out, from its beginning",
        identity=False,
        parse=parse_count,
    )
    every: Duration | None = setting(
        None,
        help="between validations; there is always one at the end of the run; left out: there is none",
        identity=False,
        parse=parse_duration("steps", "tokens"),
    )
    at_start: bool = setting(
        False, help="validate before the first step too, which then waits for it", identity=False
    )
    hook: str | None = setting(
        None,
        help='"file.py:function", called at each validation; the numbers that it returns are kept with it',
        identity=False,
    )
    prompts: list[str] = setting(
        [],
        help="texts that the model continues at each validation, into RUN/samples.jsonl",
        identity=False,
        parse=parse_strings,
    )
    prompt_tokens: int = setting(
        64, help="tokens of such a continuation, the likeliest one after another", identity=False
    )


@dataclass
class PhaseConfig:
    at: Duration = setting(
        help="since the run began; the phase begins with the first window at or past it",
        identity=True,
        parse=parse_duration("steps", "tokens"),
    )
    weights: dict[str, float] | None = setting(
        None,
        help="new weights by source name; a source that is not named keeps its weight",
        identity=True,
        parse=parse_weights,
    )
    sequence_length: int | None = setting(
        None, help="tokens in a row from here on", identity=True, parse=parse_count
    )
    tokens_per_step: int | None = setting(
        None, help="tokens in one optimizer step from here on", identity=True, parse=parse_count
    )
    max_document_length: int | None = setting(
        None,
        help="longer documents are trained in pieces of this many tokens from here on",
        identity=True,
        parse=parse_count,
    )


@dataclass
class DataConfig:
    sources: list[SourceConfig] = setting(help="one [[data.sources]] table for each source", identity=True)
    sequence_length: int = setting(help="tokens in a row", identity=True, parse=parse_count)
    max_document_length: int | None = setting(
        None,
        help="longer documents are trained in pieces of this many tokens; left out: the sequence length",
        identity=True,
        parse=parse_count,
    )
    lanes: int | None = setting(
        None,
        help="independent streams that make up the order of rows; left out: the largest divisor of the "
        "rows per step (of all phases) up to 32",
        identity=True,
        parse=parse_count,
    )
    window_steps: int | None = setting(
        None,
        help="steps whose tokens are packed together; left out: about 4M tokens, 4 to 32 steps",
        identity=True,
        parse=parse_count,
    )
    packing: str = setting(
        "window",
        help="window: every row is full, and a document is cut where it must be; document: none is cut, and "
        "rows are padded",
        identity=True,
        choices=("window", "document"),
    )
    overlong: str = setting(
        "cut",
        help="a document longer than max_document_length: cut trains it in pieces, skip counts and names it, "
        "error stops the run",
        identity=True,
        choices=("cut", "skip", "error"),
    )
    max_skipped_fraction: float = setting(
        0.001,
        help="stop when more than this share of a source's records (after its first 1,000) is unreadable",
        identity=False,
    )
    cache_directory: str | None = setting(
        None,
        help="where each node keeps what it decoded or fetched; left out: flame/blocks in the user's cache "
        "directory",
        identity=False,
    )
    cache_bytes: int = setting(
        64 * 2**30,
        help="bytes that this cache may hold on a node; the least recently used blocks go first",
        identity=False,
        parse=parse_count,
    )
    skip_corrupt_blocks: bool = setting(
        False,
        help="count and name compressed blocks that cannot be decoded, and go on; else they stop the run",
        identity=False,
    )
    accept_changed_sources: bool = setting(
        False,
        help="go on although files are new, gone or changed since the run began; an event records which",
        identity=False,
    )
    at_source_end: str = setting(
        "redistribute",
        help="when a source has reached its max_epochs in a lane: redistribute its share to the lane's other "
        "sources, or stop the lane; the run ends with its last lane",
        identity=True,
        choices=("redistribute", "stop"),
    )
    phases: list[PhaseConfig] = setting(
        [],
        help="[[data.phases]] tables, in order: settings that hold later; what is not named stays",
        identity=True,
    )
