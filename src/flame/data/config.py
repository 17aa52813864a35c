"""The settings that the data plane reads."""

from __future__ import annotations

from dataclasses import dataclass

from flame.schema import parse_count, parse_strings, setting

BYTES = "bytes"  # as tokenizer.path: no file; 256 bytes and EOS
BACKENDS = ("tokenizers", "gigatoken", "fastokens")


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
        "rows per step up to 32",
        identity=True,
        parse=parse_count,
    )
    window_steps: int | None = setting(
        None,
        help="steps whose tokens are packed together; left out: about 4M tokens, 4 to 32 steps",
        identity=True,
        parse=parse_count,
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
