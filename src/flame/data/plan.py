"""The numbers that fix the order of the rows, resolved from a recipe once."""

from __future__ import annotations

from dataclasses import dataclass

from flame.data.config import DataConfig
from flame.errors import RecipeError

WINDOW_TOKENS = 2**22  # what a window holds over all lanes, by default
MOST_LANES = 32  # by default: few lanes make large windows and few cuts


@dataclass(frozen=True, slots=True)
class DataPlan:
    """The stream of rows is a function of this, the sources and the tokenizer: of no machine."""

    seed: int
    sequence_length: int  # L, tokens in a row
    rows_per_step: int  # B, over all ranks
    lanes: int  # N: global row n comes from lane n mod N
    window_steps: int  # K: steps whose tokens are packed together, once the first windows have grown to it
    max_document_length: int  # longer documents are trained in pieces of this many tokens
    group_blocks: int = 2  # G: blocks of a lane whose documents are permuted together

    @classmethod
    def of(cls, config: DataConfig, tokens_per_step: int, seed: int) -> DataPlan:
        """The plan of a recipe, defaults resolved. Raises RecipeError where settings exclude each other."""
        length = config.sequence_length
        if length < 2:
            raise RecipeError(f"data.sequence_length: found {length}, expected at least 2 tokens")
        if tokens_per_step < length or tokens_per_step % length:
            below = max(1, tokens_per_step // length) * length
            raise RecipeError(
                f"batch.tokens_per_step: found {tokens_per_step}, expected a multiple of "
                f"data.sequence_length = {length}, such as {below} or {below + length}"
            )
        rows = tokens_per_step // length
        lanes = largest_divisor(rows, MOST_LANES) if config.lanes is None else config.lanes
        if lanes < 1 or rows % lanes:
            would_do = largest_divisor(rows, max(1, lanes))
            raise RecipeError(
                f"data.lanes: found {lanes}, expected a divisor of the {rows} rows of a step "
                f"(batch.tokens_per_step / data.sequence_length), such as {would_do}"
            )
        window = config.window_steps
        if window is None:
            window = min(32, max(4, WINDOW_TOKENS // tokens_per_step))
        if window < 1:
            raise RecipeError(f"data.window_steps: found {window}, expected at least 1 step")
        piece = length if config.max_document_length is None else config.max_document_length
        if not 2 <= piece <= length:
            raise RecipeError(
                f"data.max_document_length: found {piece}, expected 2 to data.sequence_length = {length} "
                "(longer documents are trained in pieces of this length)"
            )
        return cls(seed, length, rows, lanes, window, piece)

    @property
    def lane_rows(self) -> int:
        """Rows that each lane gives to a step."""
        return self.rows_per_step // self.lanes

    def steps_in_window(self, window: int) -> int:
        """Its length: the first windows of a run are short, so that a fresh run starts at once."""
        return min(2 ** min(window, 62), self.window_steps)

    def window_at(self, step: int) -> tuple[int, int]:
        """The window that holds `step`, and that window's first step."""
        window = start = 0
        while self.steps_in_window(window) < self.window_steps:
            if step < start + self.steps_in_window(window):
                return window, start
            start += self.steps_in_window(window)
            window += 1
        full = (step - start) // self.window_steps
        return window + full, start + full * self.window_steps


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)
