"""Files of token ids, as other programs write them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

MEGATRON = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> None:
    """A .bin and its .idx of documents of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    starts = np.concatenate([[0], np.cumsum(sizes)])[: len(sizes)].astype("<i8") * np.dtype(dtype).itemsize
    bounds = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, MEGATRON[dtype], len(sizes), len(bounds))
    path.with_suffix(".idx").write_bytes(head + sizes.tobytes() + starts.tobytes() + bounds.tobytes())
    path.write_bytes(np.array([i for s in sequences for i in s], dtype=dtype).tobytes())


def write_ids(root: Path, documents: list[list[int]]) -> None:
    """The same documents, which end with EOS, in each format; some of them without it, where that may be."""
    half = [tokens[: len(tokens) - i % 2] for i, tokens in enumerate(documents)]
    table = pyarrow.table({"tokens": half})
    pyarrow.parquet.write_table(table, root / "t.parquet", row_group_size=30)
    with pyarrow.ipc.new_stream(str(root / "t.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    flat = np.concatenate(documents)[:-1]
    np.save(root / "t.npy", flat.astype(np.int64))
    flat.astype("<u2").tofile(root / "flat.bin")
    write_megatron(root / "m.bin", [[tokens[:3], tokens[3:]] for tokens in half])
