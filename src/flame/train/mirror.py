"""A copy of a run's checkpoints at a URL (s3, gcs, whatever fsspec knows): saved locally, then uploaded
beside training, and fetched by a start that finds none in its run directory.

URL/recipe.toml   URL/step-00001000/ as in RUN/checkpoints, its manifest last: without it there is none
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import fsspec
import orjson

from flame.data.remote import ShortAnswer, retried
from flame.errors import CheckpointError, FlameError
from flame.train.journal import event, replace_file, sync_directory
from flame.train.keeping import MANIFEST, saved_steps, step_directory
from flame.train.rollback import FILE as SKIPPED
from flame.train.rollback import Skipped, write_skipped

RECIPE = "recipe.toml"
PART = 8 << 20  # bytes read, hashed and sent at a time
STOP_SECONDS = 15.0  # that a stop request leaves to an upload under way

core = cast("Any", fsspec).core


class Mirror:
    """Of one run, on rank 0 alone."""

    def __init__(self, run: Path, url: str) -> None:
        """Raises CheckpointError where nothing can be at such a URL."""
        self._run, self._url = run, url.rstrip("/")
        try:
            self._system, self._root = core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"checkpoint.upload: {url}: {error}") from None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wanted = self._stopped = False
        self._held: set[int] = set()
        self._gone: set[int] = set()

    # uploading

    def committed(self, gone: Iterable[int] = ()) -> None:
        """There is another checkpoint, and those of the steps `gone` are no more: uploads and deletes in the
        background."""
        with self._lock:
            self._gone |= set(gone)
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()

    def held(self) -> set[int]:
        """Steps whose checkpoints must stay for now."""
        with self._lock:
            return set(self._held)

    def wait(self, seconds: float | None = None) -> None:
        """For what is under way; after `seconds` it is given up, and the next start uploads it."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
            self._stopped = True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted or self._stopped:
                    self._thread = None
                    return
                self._wanted = False
            try:
                self.update()
            except Exception as error:  # whatever it is, the run goes on; the next checkpoint tries again
                event(self._run, "upload_failed", to=self._url, why=f"{error}")
                print(f"checkpoints could not be uploaded to {self._url}: {error}", flush=True)

    def update(self) -> None:
        """Uploads what is not there yet, the newest first, and deletes what is kept here no more."""
        recipe = (self._run / RECIPE).read_bytes()
        retried(self._url, lambda: self._system.makedirs(self._root, exist_ok=True), "written")
        retried(self._url, lambda: self._system.pipe_file(self._at(RECIPE), recipe), "written")
        there, here = self._steps(), saved_steps(self._run)
        for step in reversed(here):
            with self._lock:
                self._held.add(step)
            try:
                if step not in there or self._read(step, MANIFEST) != self._local(step, MANIFEST):
                    self._upload(step)
            except FileNotFoundError:
                if step in saved_steps(self._run):
                    raise  # else it was deleted or set aside meanwhile
            finally:
                with self._lock:
                    self._held.discard(step)
        folders = (self._run / "checkpoints").glob("step-*.rolled-back*")
        with self._lock:
            gone, self._gone = self._gone, set()
        gone |= {int(folder.name[5:].partition(".")[0]) for folder in folders}
        for step in (gone & set(there)) - set(saved_steps(self._run)):
            self._delete(step)

    def _upload(self, step: int) -> None:
        began = time.monotonic()
        manifest = self._local(step, MANIFEST)
        files = cast("dict[str, dict[str, Any]]", orjson.loads(manifest)["files"])
        self._delete(step)
        for name, seal in files.items():
            source, target = step_directory(self._run, step) / name, self._at(_folder(step), name)
            retried(self._url, lambda s=source, t=target, e=seal: self._send(s, t, e), "written")
        target = self._at(_folder(step), MANIFEST)
        retried(self._url, lambda: self._system.pipe_file(target, manifest), "written")
        seconds, size = round(time.monotonic() - began, 3), sum(seal["bytes"] for seal in files.values())
        event(self._run, "checkpoint_uploaded", step=step, to=self._url, bytes=size, seconds=seconds)

    def _send(self, source: Path, target: str, seal: dict[str, Any]) -> None:
        """One file; what was read for it is what its manifest says, and as much has arrived."""
        digest, sent = hashlib.blake2b(digest_size=16), 0
        self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
        with source.open("rb") as file, self._system.open(target, "wb") as out:
            while part := file.read(PART):
                digest.update(part)
                sent += out.write(part)
        if {"bytes": sent, "blake2b": digest.hexdigest()} != seal:
            raise CheckpointError(f"{source} is damaged: its hash differs from the manifest's")
        self._system.invalidate_cache()
        if (arrived := self._system.info(target)["size"]) != sent:
            raise ShortAnswer(f"{arrived} bytes of {sent} arrived")

    def _delete(self, step: int) -> None:
        """Its manifest first: a crash in between leaves no checkpoint that seems whole."""
        folder = self._at(_folder(step))
        self._system.invalidate_cache()
        if self._system.exists(f"{folder}/{MANIFEST}"):
            self._system.rm_file(f"{folder}/{MANIFEST}")
        if self._system.exists(folder):
            self._system.rm(folder, recursive=True)

    # fetching

    def fetch(self, check_recipe: Callable[[], None]) -> None:
        """The newest checkpoint that is whole, for a run directory that has none. `check_recipe` raises where
        the recipe of the run that lies there is another one. Raises FlameError."""
        steps = self._steps()
        if not steps:
            return None
        copied = not (self._run / RECIPE).exists()
        if copied:
            text = retried(self._url, lambda: self._system.cat_file(self._at(RECIPE)))
            replace_file(self._run / RECIPE, text)
        try:
            check_recipe()
        except FlameError:
            if copied:
                (self._run / RECIPE).unlink()
            raise
        broken: list[str] = []
        for step in reversed(steps):
            try:
                return self._fetch(step)
            except (ValueError, KeyError, TypeError) as error:
                broken.append(f"step {step}: {error}")
                event(self._run, "checkpoint_rejected", step=step, why=f"{self._url}: {error}")
        raise CheckpointError(
            f"{self._url}: none of its checkpoints is whole ({'; '.join(broken)}); restore one of them, or "
            "start anew with another checkpoint.upload"
        )

    def _fetch(self, step: int) -> None:
        """Raises ValueError, KeyError or TypeError where it is not whole."""
        began, final = time.monotonic(), step_directory(self._run, step)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = self._read(step, MANIFEST)
        for name, seal in orjson.loads(manifest)["files"].items():
            target, source = partial / name, self._at(_folder(step), name)
            if not self._system.exists(source):
                raise ValueError(f"{name} is missing")
            retried(self._url, lambda s=source, t=target: self._system.get_file(s, str(t)))
            with target.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            if digest.hexdigest() != seal["blake2b"]:
                raise ValueError(f"{name} is corrupt: its hash differs from the manifest's")
        replace_file(partial / MANIFEST, manifest)
        partial.rename(final)
        sync_directory(final.parent)
        skipped = Skipped.from_json(orjson.loads((final / "data.json").read_bytes()).get("skipped_rows", []))
        if skipped.ranges and not (self._run / SKIPPED).exists():
            write_skipped(self._run, skipped)
        seconds = round(time.monotonic() - began, 3)
        event(self._run, "checkpoint_fetched", step=step, source=self._url, seconds=seconds)
        print(f"fetched the checkpoint of step {step} from {self._url}", flush=True)

    def _steps(self) -> list[int]:
        """Of the checkpoints that lie there, oldest first."""

        def look() -> list[str]:
            self._system.invalidate_cache()
            return self._system.glob(f"{self._root}/step-*/{MANIFEST}")

        names = [path.split("/")[-2][5:] for path in retried(self._url, look)]
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self, step: int, name: str) -> bytes:
        path = self._at(_folder(step), name)
        return bytes(retried(self._url, lambda: self._system.cat_file(path)))

    def _local(self, step: int, name: str) -> bytes:
        return (step_directory(self._run, step) / name).read_bytes()

    def _at(self, *names: str) -> str:
        return "/".join([self._root, *names])


def _folder(step: int) -> str:
    return f"step-{step:08d}"
