"""Remote sources: a real HTTP server that fails when it is told to, and a server that speaks S3."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data.id_files import write_ids
from data.test_compressed import STORED

from flame.data import files, remote
from flame.data.cache import Access
from flame.data.catalog import fingerprint, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.files import look
from flame.data.lines import JsonLines
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.sources import list_files
from flame.data.tokens import load_tokenizer
from flame.data.validation import own_validation_data
from flame.data.validation_set import ValidationSet, read_validation_set
from flame.errors import DataError

LINES = [json.dumps({"text": f"{i} " + "word " * (i % 37)}) for i in range(400)]
PLAIN = ("\n".join(LINES) + "\n").encode()


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges. `faults` are met by the next requests, one each."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.requests = root, list[str](), list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        fault = self.server.faults.pop(0) if self.server.faults else ""
        path = self.server.root / self.path.lstrip("/")
        if fault == "reset":
            self.connection.shutdown(2)
            self.close_connection = True
            return
        if fault.isdigit() or not path.exists():
            self.answer(int(fault or 404), b"no")
        elif path.is_dir():
            links = "".join(f'<a href="{self.path.rstrip("/")}/{p.name}">x</a>' for p in path.iterdir())
            self.answer(200, links.encode(), "text/html")
        else:
            self.send_file(path.read_bytes(), fault)

    def send_file(self, content: bytes, fault: str) -> None:
        wanted = self.headers.get("Range")
        if not wanted or fault == "whole":
            self.answer(200, content)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        if fault == "short":
            part = part[: len(part) // 2]
        self.answer(206 if part else 416, part)

    def answer(self, status: int, content: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(remote, "CHUNK", 5000)
    root = tmp_path / "served"
    root.mkdir()
    with Server(root) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def write_formats(root: Path) -> None:
    (root / "plain.jsonl").write_bytes(PLAIN)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(PLAIN))
    (root / "a.jsonl.zst").write_bytes(zstandard.compress(PLAIN))
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in LINES]})
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=90)


def rows(base: Path, folder: Path, file: str, **settings: Any) -> tuple[object, object]:
    """The first rows of a source and its fingerprint."""
    source = SourceConfig("web", [file], **settings)
    config = DataConfig([source], sequence_length=32, lanes=4, cache_directory=str(base / "cache"))
    plan = DataPlan.of(config, 12 * 32, seed=3)
    catalog = open_catalog(config, TokenizerConfig(str(folder / "tok")), plan, base)
    loader = Loader(catalog, plan, 0, 1, 1, prefetch=False)
    steps = [loader.next_step() for _ in range(12)]
    return [row.segments for step in steps for row in step.rows], fingerprint(catalog, plan)


def test_a_validation_set_is_read_by_url(server: Server, folder: Path, tmp_path: Path) -> None:
    write_formats(server.root)
    found: list[ValidationSet] = []
    for file in (f"{server.url}/plain.jsonl", str(server.root / "plain.jsonl")):
        source = SourceConfig("web", [file])
        config = DataConfig([source], sequence_length=32, cache_directory=str(tmp_path / "cache"))
        plan, tokenizer = DataPlan.of(config, 12 * 32, seed=3), TokenizerConfig(str(folder / "tok"))
        found.append(
            read_validation_set(*own_validation_data([source], config, tokenizer, plan, tmp_path, 400))
        )
    remote_one, local_one = found
    assert remote_one.counts.tolist() == local_one.counts.tolist()
    assert remote_one.counts[0, 0] == 400
    assert [r.tokens.tobytes() for r in remote_one.rows] == [r.tokens.tobytes() for r in local_one.rows]


@pytest.mark.parametrize("name", ["plain.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_remote_files_give_the_rows_of_local_ones(
    server: Server, folder: Path, tmp_path: Path, name: str
) -> None:
    write_formats(server.root)
    local = rows(tmp_path, folder, str(server.root / name))
    assert rows(tmp_path, folder, f"{server.url}/{name}") == local


@pytest.mark.parametrize("name", STORED)
def test_a_compressed_file_is_cut_alike_wherever_it_lies(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (server.root / name).write_bytes(STORED[name](PLAIN))
    access = Access(str(tmp_path / "cache"))
    remote_file = look(name, f"{server.url}/{name}")
    for largest in (4000, 2**24):  # also where a frame is too large to be a block
        monkeypatch.setattr(files, "LARGEST_FRAME", largest)
        local = JsonLines([server.root / name], "text", access)
        far = JsonLines([remote_file], "text", access)
        assert far.decoded_bytes(0) == local.decoded_bytes(0)
        for block_bytes in (1000, 7000):
            for ours, theirs in zip(far.ranges(0, block_bytes), local.ranges(0, block_bytes), strict=True):
                assert ours.tolist() == theirs.tolist()
    server.requests.clear()
    JsonLines([remote_file], "text", access).ranges(0, 7000)
    assert len(server.requests) <= 1, "the frames are found once, and remembered"


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.npy", "flat.bin", "m.bin"])
def test_remote_files_of_ids_give_the_rows_of_local_ones(
    server: Server, folder: Path, tmp_path: Path, name: str
) -> None:
    written = [json.loads(line)["text"] for line in LINES]
    write_ids(server.root, [i.tolist() for i in load_tokenizer(folder / "tok", False).encode(written)])
    dtype = "uint16" if name == "flat.bin" else None
    local = rows(tmp_path, folder, str(server.root / name), ids=True, ids_dtype=dtype)
    assert rows(tmp_path, folder, f"{server.url}/{name}", ids=True, ids_dtype=dtype) == local
    with pytest.raises(DataError, match=r"no m\.idx beside it"):
        (server.root / "m.idx").unlink()
        rows(tmp_path, folder, f"{server.url}/m.bin", ids=True)


def test_a_chunk_is_fetched_once_per_node_and_ahead(server: Server, tmp_path: Path) -> None:
    (server.root / "a.jsonl").write_bytes(PLAIN)
    file = look("a.jsonl", f"{server.url}/a.jsonl")
    server.requests.clear()
    access = Access(str(tmp_path / "cache"))
    for _ in range(2):
        reader = JsonLines([file], "text", access)
        reader.expect(0, 0, len(PLAIN))
        assert len(reader.read(0, 0, len(PLAIN))) == 400
    ranges = sorted(int(line.split("bytes=")[1].split("-")[0]) for line in server.requests)
    assert ranges == list(range(0, len(PLAIN), 5000))


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "short", "whole"])
def test_requests_that_fail_in_passing_are_made_again(server: Server, tmp_path: Path, fault: str) -> None:
    (server.root / "a.jsonl").write_bytes(PLAIN)
    file = look("a.jsonl", f"{server.url}/a.jsonl")
    reader = JsonLines([file], "text", Access(str(tmp_path / "cache")))
    server.faults += [fault] * 3
    assert [position for position, _ in reader.read(0, 0, len(PLAIN))][:2] == [0, len(LINES[0]) + 1]
    assert not server.faults


def test_a_lasting_failure_stops_with_the_url(server: Server, tmp_path: Path) -> None:
    (server.root / "a.jsonl").write_bytes(PLAIN)
    file = look("a.jsonl", f"{server.url}/a.jsonl")
    skipping = Access(str(tmp_path / "cache"), skip_corrupt=True)
    reader = JsonLines([file], "text", skipping)
    server.requests.clear()
    server.faults += ["503"] * (2 * remote.TRIES)
    with pytest.raises(DataError, match=rf"{server.url}/a.jsonl: cannot be read after 6 tries"):
        reader.read(0, 0, 100)
    server.faults.clear()
    assert len(reader.read(0, 0, 100)) > 1  # a failure is not kept
    server.faults.append("403")
    reader = JsonLines([file], "text", Access(str(tmp_path / "other")))
    with pytest.raises(DataError, match=rf"{server.url}/a.jsonl: cannot be read: .*403"):
        reader.read(0, 0, 100)


def test_a_remote_file_that_shrinks_or_vanishes_is_a_failed_read(server: Server, tmp_path: Path) -> None:
    (server.root / "a.jsonl").write_bytes(PLAIN)
    file = look("a.jsonl", f"{server.url}/a.jsonl")
    (server.root / "a.jsonl").write_bytes(PLAIN[:9000])
    reader = JsonLines([file], "text", Access(str(tmp_path / "cache"), skip_corrupt=True))
    with pytest.raises(DataError, match=r"a.jsonl: ends after 9000 bytes.*put the file back"):
        reader.read(0, 0, len(PLAIN))
    (server.root / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read"):
        reader.read(0, 20_000, 20_100)


def test_listing_meets_failures_that_pass(server: Server, tmp_path: Path) -> None:
    (server.root / "a.jsonl").write_bytes(PLAIN)
    server.faults += ["503", "503", "503"]
    assert look("a.jsonl", f"{server.url}/a.jsonl").size == len(PLAIN)


def test_remote_files_are_listed_by_glob_and_named_from_the_fixed_prefix(
    server: Server, tmp_path: Path
) -> None:
    (server.root / "in").mkdir()
    for name in ("in/b.jsonl", "in/a.jsonl", "in/c.txt"):
        (server.root / name).write_bytes(PLAIN)

    def names(*files: str) -> list[str]:
        return [name for name, _ in list_files(SourceConfig("s", list(files)), tmp_path)]

    assert names(f"{server.url}/in/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{server.url}/in/b.jsonl", f"{server.url}/in/*.txt") == ["b.jsonl", "c.txt"]
    with pytest.raises(DataError, match=r"nothing/\*.jsonl.*no file matches"):
        names(f"{server.url}/in/nothing/*.jsonl")
    with pytest.raises(DataError, match="local and remote"):
        names(f"{server.url}/in/b.jsonl", "a.jsonl")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bucket_gives_the_rows_of_a_folder(bucket: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_formats(tmp_path / "data")
    fsspec.filesystem("s3").put(str(tmp_path / "data") + "/", f"{bucket}/data/", recursive=True)
    for pattern in ("data/*.jsonl", "data/a.parquet", "data/*.gz"):
        local = rows(tmp_path, folder, str(tmp_path / pattern))
        assert rows(tmp_path, folder, f"{bucket}/{pattern}") == local
    with pytest.raises(DataError, match=r"bucket/none/\*.jsonl.*no file matches"):
        rows(tmp_path, folder, f"{bucket}/none/*.jsonl")
