"""Validation apart from a run: what it leaves behind, its sums, samples, hooks, and the reader of its set."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_recipes import MODELS
from torch import nn

from flame.batch import HeldOutBatch, Row
from flame.data.loader import make_batch
from flame.errors import DataError, RecipeError
from flame.held_out import SetReader
from flame.models.build import build_on_meta, initialize
from flame.models.registry import family_of, load_config
from flame.train.hook import load_hook, numbers_of
from flame.train.loss import LossModule, token_losses
from flame.train.metrics import Meter
from flame.train.samples import continue_all
from flame.train.step import StepResult
from flame.train.validation import evaluating, figures_of, loss_sums

CPU = torch.device("cpu")


class Dropping(nn.Module):
    """A guest with dropout and a module that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.head = nn.Linear(12, 50, bias=False)


def hidden(model: nn.Module, tokens: torch.Tensor, *_: object) -> torch.Tensor:
    guest = cast("Dropping", model)
    return guest.frozen(guest.drop(guest.embedding(tokens)))


class Rows:
    """Six rows of two sources, for one rank of `ranks`."""

    sources = ("a", "b")
    total_rows = 6
    counts = np.array([[40, 4, 38, 90], [8, 2, 6, 0]], dtype=np.int64)

    def __init__(self, rank: int = 0, ranks: int = 1, size: int = 1) -> None:
        self.mine, self.size = range(rank, 6, ranks), size

    def batches(self) -> Iterator[HeldOutBatch]:
        for first in range(0, len(self.mine), self.size):
            numbers = list(self.mine[first : first + self.size])
            rows = [Row(n, np.arange(8, dtype=np.int32) * (n + 3) % 50, np.array([5, 3])) for n in numbers]
            sources = np.array([[0] * 5 + [n % 2] * 3 for n in numbers])
            yield HeldOutBatch(make_batch(rows), numbers, sources)


@pytest.fixture
def dropping() -> LossModule:
    torch.manual_seed(3)
    guest = Dropping()
    return LossModule(guest, hidden, guest.head)


def test_nothing_is_left_of_an_evaluation(dropping: LossModule) -> None:
    modes = [module.training for module in dropping.modules()]
    state = torch.get_rng_state()
    with evaluating(dropping, CPU):
        first = loss_sums(dropping, Rows(), CPU, None)
        torch.rand(7)
        assert (loss_sums(dropping, Rows(), CPU, None) == first).all()
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in dropping.modules()] == modes
    assert torch.is_grad_enabled() and all(p.grad is None for p in dropping.parameters())
    with pytest.raises(ValueError, match="a mistake"), evaluating(dropping, CPU):
        raise ValueError("a mistake")
    assert dropping.training


def test_sums_are_of_each_source_and_add_up_alike_however_rows_are_shared(dropping: LossModule) -> None:
    dropping.eval()
    with torch.no_grad():
        whole = loss_sums(dropping, Rows(), CPU, None)
        total = sum(float(dropping(part.batch).double()) for part in Rows().batches())
        assert whole.sum() == pytest.approx(total, rel=1e-6)
        parts = [loss_sums(dropping, Rows(rank, 3), CPU, None) for rank in range(3)]
        assert sum(parts) == pytest.approx(whole, rel=1e-12)
        assert loss_sums(dropping, Rows(size=4), CPU, None) == pytest.approx(whole, rel=1e-6)
    found = figures_of(Rows(), whole)
    assert found["loss"] == pytest.approx(whole.sum() / 44)
    assert found["sources"]["a"]["bits_per_byte"] == pytest.approx(whole[0] / math.log(2) / 90)
    assert found["sources"]["b"]["bits_per_byte"] is None  # its tokens stand for no text


def test_a_loss_that_is_not_finite_stays_with_its_source(dropping: LossModule) -> None:
    class OneBad(Rows):
        counts = np.ones((2, 4), dtype=np.int64)

    def forward(batch: Any, read: Any) -> torch.Tensor:
        losses = torch.ones(batch.tokens.numel())
        losses[5:] = math.nan  # of source b in odd rows, of a in even ones
        return losses

    rows = OneBad(rank=1, ranks=2)
    sums = loss_sums(cast("Any", forward), rows, CPU, None)
    assert sums[0] == 15 and math.isnan(sums[1])


def test_the_loss_of_each_token_adds_up_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame.train.loss.CHUNK_TOKENS", 4)
    states, head = torch.randn(10, 12), nn.Linear(12, 50)
    labels = torch.tensor([3, -100, 7, 9, 11, -100, 0, 49, 5, 6])
    with torch.no_grad():
        found = token_losses(states, head, labels)
        assert torch.equal(found == 0, labels == -100)
        wanted = F.cross_entropy(head(states), labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(found.sum(), wanted)


@pytest.mark.parametrize("name", ["gla", "llama"])
def test_samples_are_the_greedy_continuations_of_each_prompt_alone(name: str, tmp_path: Path) -> None:
    import json

    (tmp_path / "m.json").write_text(json.dumps(MODELS[name]))
    config = load_config(str(tmp_path / "m.json"))
    family, model = family_of(config), build_on_meta(config)
    initialize(model, config, seed=5, device=CPU)
    with_loss = LossModule(model, family.hidden, family.head(model)).eval()
    prompts = [[5, 6, 7], [300], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    with torch.no_grad():
        found = continue_all(with_loss, prompts, 6, CPU)
        for prompt, new in zip(prompts, found, strict=True):
            ids = list(prompt)
            for _ in range(6):
                logits = cast("Any", model)(torch.tensor([ids]), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            assert ids[len(prompt) :] == new


def test_a_pause_is_no_part_of_a_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    journal = SimpleNamespace(metrics=lines.append)
    meter = Meter(
        flops=lambda _: 0.0,
        peak_flops=None,
        device=CPU,
        updates_skipped=0,
        sources=[],
        journal=cast("Any", journal),
        screen=None,
    )
    began = time.perf_counter()
    clock = iter([began, began, began + 5.0])
    monkeypatch.setattr("flame.train.metrics.time.perf_counter", lambda: next(clock, began + 5.0))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    meter.start()
    counts = SimpleNamespace(tokens=100, predicted=99, padding=0, digest=0)
    agreed: Any = SimpleNamespace(counts=counts, epoch=0, epochs=np.zeros(0, np.int64))
    result: Any = StepResult(torch.tensor(1.0), torch.tensor(1.0))
    progress: Any = SimpleNamespace(step=1, tokens=100, documents=1, records=[], sources=[])
    meter.count(agreed, result, 0.0)
    clock = iter([began + 5.0])
    meter.pause(4.0)
    meter.log(progress, agreed, result, 0.1)
    assert lines[0]["step_seconds"] == pytest.approx(1.0, abs=0.01)
    assert lines[0]["tokens_per_second"] == pytest.approx(100, rel=0.01)


# ------------------------------------------------------------------------------------- the set


def reader_of(read: Any) -> tuple[SetReader, list[Any]]:
    told: list[Any] = []
    world: Any = SimpleNamespace(from_rank_zero=lambda make: make())
    return SetReader(world, read, lambda whole: whole, lambda whole, seconds: told.append(whole)), told


def test_the_set_is_read_in_the_background_once() -> None:
    go, calls = threading.Event(), []

    def read() -> Any:
        calls.append(threading.current_thread().name)
        assert go.wait(20)
        return "the set"

    reader, told = reader_of(read)
    assert calls == []
    for _ in range(3):
        reader.begin()
    assert reader.failure() is None
    go.set()
    assert [reader.rows(), reader.rows()] == ["the set"] * 2 == told * 2
    assert calls == ["flame-validation"]


def test_what_cannot_be_read_is_known_before_anybody_asks_for_it() -> None:
    def read() -> Any:
        raise DataError("no such file")

    reader, _ = reader_of(read)
    reader.begin()
    deadline = time.monotonic() + 20
    while reader.failure() is None:
        assert time.monotonic() < deadline
    with pytest.raises(DataError, match="no such file"):
        reader.rows()


# ------------------------------------------------------------------------------------ the hook


def test_a_hooks_numbers_are_checked() -> None:
    assert numbers_of(None) == {}
    found = numbers_of({"a": torch.tensor(0.5), "b": 3, "c": np.float32(2), 4: math.inf})
    assert found == {"a": 0.5, "b": 3, "c": 2.0, "4": math.inf}
    for wrong in (7, {"a": "text"}, {"a": torch.zeros(2)}):
        with pytest.raises(TypeError, match="expected"):
            numbers_of(wrong)


def test_a_hooks_file_that_cannot_be_loaded_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text("import nothing_like_this")
    with pytest.raises(RecipeError, match=r"h\.py: ModuleNotFoundError"):
        load_hook(f"{tmp_path}/h.py:f")
