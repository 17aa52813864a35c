"""What several tests share: a small corpus of real text, and a recipe on it."""

from __future__ import annotations

import json
import os
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from small_recipes import MODELS, RECIPE, WriteRecipe

from flame.data.tokens import train_tokenizer

# how long an example takes says more of a busy machine than of the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    """Nothing here may ask a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl of Python's own source files, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("text")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    texts = [path.read_text(errors="ignore")[:4000] for path in files]
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts if text)
    train_tokenizer(texts, 384, folder / "tokenizer")
    return folder


@pytest.fixture
def write_recipe(text_folder: Path, tmp_path: Path) -> WriteRecipe:
    """Writes a recipe of a tiny model; gives its path. The run lies in tmp_path/NAME."""

    def write(
        name: str = "run", model: str = "gla", steps: int = 30, replaced: dict[str, str] | None = None
    ) -> Path:
        config = tmp_path / f"{model}.json"
        config.write_text(json.dumps(MODELS[model]))
        text = RECIPE.format(
            run=tmp_path / name,
            steps=steps,
            model=config,
            tokenizer=text_folder / "tokenizer",
            text=text_folder / "text.jsonl",
        )
        for old, new in (replaced or {}).items():
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder in a new S3 bucket, on a server of this machine."""
    import fsspec  # and moto: for the few tests that talk to a bucket
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4()}"  # moto keeps buckets for as long as its process lives
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}/bucket"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()
