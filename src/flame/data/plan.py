"""The numbers that fix the order of the rows, resolved from a recipe once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flame.data.config import DataConfig, PhaseConfig
from flame.errors import RecipeError, nearest
from flame.schema import Duration

WINDOW_TOKENS = 2**22  # what a window holds over all lanes, by default
MOST_LANES = 32  # by default: few lanes make large windows and few cuts


@dataclass(frozen=True, slots=True)
class Stage:
    """What holds from one window on: the recipe's first settings, or those of a phase."""

    first_window: int
    first_step: int
    first_row: int  # in the global order
    first_token: int  # tokens of all rows before
    weights: tuple[float, ...]  # of each source
    sequence_length: int  # L, tokens in a row
    rows_per_step: int  # B, over all ranks
    window_steps: int  # K: steps whose tokens are packed together, once the first windows have grown to it
    max_document_length: int  # longer documents are trained in pieces of this many tokens

    @property
    def tokens_per_step(self) -> int:
        """Of full rows."""
        return self.sequence_length * self.rows_per_step

    def steps_in_window(self, window: int) -> int:
        """Its length: the first windows of a run are short, so that a fresh run starts at once."""
        return min(2 ** min(window, 62), self.window_steps)

    def window_at(self, step: int) -> tuple[int, int]:
        """The window of this stage, were it the last one, that holds `step`, and the window's first step."""
        window, start = self.first_window, self.first_step
        while self.steps_in_window(window) < self.window_steps:
            if step < start + self.steps_in_window(window):
                return window, start
            start += self.steps_in_window(window)
            window += 1
        full = (step - start) // self.window_steps
        return window + full, start + full * self.window_steps


@dataclass(frozen=True, slots=True)
class DataPlan:
    """The stream of rows is a function of this, the sources and the tokenizer: of no machine."""

    seed: int
    lanes: int  # N: global row n comes from lane n mod N
    stages: tuple[Stage, ...]  # in the order of their first windows; the first begins the run
    max_epochs: tuple[int | None, ...]  # of each source; None: without end
    stops_at_source_end: bool  # a source that ends in a lane ends the lane; else its other sources go on
    group_blocks: int = 2  # G: blocks of a lane whose documents are permuted together
    validation_fraction: float = 0.0  # of the documents is held out, by a hash of each
    validates: bool = False  # gives what is held out, in place of the rest, in file order
    most_tokens: int | None = None  # that a lane gives in all
    packing: str = "window"  # or "document": none is cut, and rows are padded
    overlong: str = "cut"  # what happens to a document above max_document_length; or "skip", "error"

    @classmethod
    def of(
        cls, config: DataConfig, tokens_per_step: int, seed: int, validation_fraction: float = 0.0
    ) -> DataPlan:
        """The plan of a recipe, defaults resolved. Raises RecipeError where settings exclude each other."""
        if not 0 <= validation_fraction < 1:
            raise RecipeError(
                f"validation.fraction: found {validation_fraction}, expected a share from 0 to below 1"
            )
        if validation_fraction and any(source.validation for source in config.sources):
            raise RecipeError("validation.fraction: a source names validation files; give one of the two")
        for source in config.sources:
            if source.max_epochs is not None and source.max_epochs < 1:
                found = source.max_epochs
                raise RecipeError(
                    f'data.sources: source "{source.name}": max_epochs: found {found}, expected at least 1'
                )
        stages = [first_stage(config, tokens_per_step)]
        for number in range(len(config.phases)):
            stages.append(next_stage(config, stages[-1], number))
        lanes = resolve_lanes(config.lanes, [stage.rows_per_step for stage in stages])
        epochs = tuple(source.max_epochs for source in config.sources)
        return cls(
            seed,
            lanes,
            tuple(stages),
            epochs,
            config.at_source_end == "stop",
            validation_fraction=validation_fraction,
            packing=config.packing,
            overlong=config.overlong,
        )

    @property
    def ends(self) -> bool:
        """Whether the data end by themselves, in every lane."""
        last = [most for most, w in zip(self.max_epochs, self.stages[-1].weights, strict=True) if w]
        limited = [most is not None for most in last]
        return any(limited) if self.stops_at_source_end else all(limited)

    @property
    def fewest_rows(self) -> int:
        """The smallest B of all stages."""
        return min(stage.rows_per_step for stage in self.stages)

    def stage_number(self, window: int) -> int:
        """Which stage a window belongs to."""
        return max(i for i, stage in enumerate(self.stages) if stage.first_window <= window)

    def stage_of(self, window: int) -> Stage:
        """The stage that a window belongs to."""
        return self.stages[self.stage_number(window)]

    def begins_stage(self, window: int) -> bool:
        """Whether a window is the first of a phase."""
        return any(stage.first_window == window for stage in self.stages[1:])

    def steps_in_window(self, window: int) -> int:
        """A window's length in steps."""
        return self.stage_of(window).steps_in_window(window)

    def lane_rows(self, window: int) -> int:
        """Rows that each lane gives to a step of a window."""
        return self.stage_of(window).rows_per_step // self.lanes

    def window_at(self, step: int) -> tuple[int, int]:
        """The window that holds `step`, and that window's first step."""
        return next(s for s in reversed(self.stages) if s.first_step <= step).window_at(step)

    def first_row(self, step: int) -> int:
        """The global number of a step's first row."""
        stage = self.stage_of(self.window_at(step)[0])
        return stage.first_row + (step - stage.first_step) * stage.rows_per_step

    def steps_of(self, length: Duration) -> int:
        """A length from the run's beginning in whole steps, rounded up, through all phases."""
        if length.unit != "tokens":
            return length.steps(self.stages[0].tokens_per_step)
        stage = next((s for s in reversed(self.stages) if s.first_token < length.amount), self.stages[0])
        return stage.first_step + -(-(length.amount - stage.first_token) // stage.tokens_per_step)


def first_stage(config: DataConfig, tokens_per_step: int) -> Stage:
    """The stage that begins a run."""
    weights = tuple(source.weight for source in config.sources)
    start = Stage(0, 0, 0, 0, weights, 0, 0, 0, 0)
    length = config.sequence_length
    return resolve(config, start, length, tokens_per_step, config.max_document_length, "")


def next_stage(config: DataConfig, last: Stage, number: int) -> Stage:
    """The stage that a phase begins: at the first window at or past its threshold."""
    phase, place = config.phases[number], f"data.phases[{number}]"
    step = phase.at.amount
    if phase.at.unit == "tokens":
        step = last.first_step + -(-(phase.at.amount - last.first_token) // last.tokens_per_step)
    if step <= last.first_step:
        raise RecipeError(
            f"{place}.at: {phase.at}: the window that begins at step {last.first_step} is past it, and "
            "the settings before would never hold; phases come in order, and each begins with a window: "
            "put them further apart, or set a smaller data.window_steps"
        )
    window, start = last.window_at(step - 1)
    steps = start + last.steps_in_window(window) - last.first_step
    begun = Stage(
        window + 1,
        last.first_step + steps,
        last.first_row + steps * last.rows_per_step,
        last.first_token + steps * last.tokens_per_step,
        phase_weights(config, last.weights, phase, place),
        last.sequence_length,
        last.rows_per_step,
        0,
        0,
    )
    length = last.sequence_length if phase.sequence_length is None else phase.sequence_length
    tokens = last.tokens_per_step if phase.tokens_per_step is None else phase.tokens_per_step
    named = [phase.max_document_length for phase in config.phases[: number + 1]]
    piece = next((n for n in reversed(named) if n is not None), config.max_document_length)
    return resolve(config, begun, length, tokens, piece, place)


def phase_weights(
    config: DataConfig, before: tuple[float, ...], phase: PhaseConfig, place: str
) -> tuple[float, ...]:
    """The weights of a phase: those that it names, over those before it."""
    names = [source.name for source in config.sources]
    changed = phase.weights or {}
    for name, weight in changed.items():
        if name not in names:
            hint = f"{nearest(name, names)}sources: {', '.join(names)}"
            raise RecipeError(f'{place}.weights: no source is called "{name}"; {hint}')
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"{place}.weights.{name}: found {weight}, expected 0 or more")
    weights = tuple(changed.get(name, weight) for name, weight in zip(names, before, strict=True))
    if names and not any(weights):
        raise RecipeError(f"{place}.weights: every weight is 0, so no source gives tokens; set one above 0")
    return weights


def resolve(
    config: DataConfig, begun: Stage, length: int, tokens_per_step: int, piece: int | None, place: str
) -> Stage:
    """A stage with its lengths. `place`: of the phase in the recipe; empty for the first stage."""
    of_data, of_batch = (f"{place}.", f"{place}.") if place else ("data.", "batch.")
    if length < 2:
        raise RecipeError(f"{of_data}sequence_length: found {length}, expected at least 2 tokens")
    if tokens_per_step < length or tokens_per_step % length:
        below = max(1, tokens_per_step // length) * length
        raise RecipeError(
            f"{of_batch}tokens_per_step: found {tokens_per_step}, expected a multiple of "
            f"{of_data}sequence_length = {length}, such as {below} or {below + length}"
        )
    window = config.window_steps
    if window is None:
        window = min(32, max(4, WINDOW_TOKENS // tokens_per_step))
    if window < 1:
        raise RecipeError(f"data.window_steps: found {window}, expected at least 1 step")
    piece = length if piece is None else piece
    if not 2 <= piece <= length:
        raise RecipeError(
            f"{of_data}max_document_length: found {piece}, expected 2 to {of_data}sequence_length = {length} "
            "(longer documents are trained in pieces of this length)"
        )
    return Stage(
        begun.first_window,
        begun.first_step,
        begun.first_row,
        begun.first_token,
        begun.weights,
        length,
        tokens_per_step // length,
        window,
        piece,
    )


def resolve_lanes(lanes: int | None, rows_per_step: Sequence[int]) -> int:
    """N: a divisor of the rows per step of every stage."""
    rows = math.gcd(*rows_per_step)
    if lanes is None:
        return largest_divisor(rows, MOST_LANES)
    if lanes < 1 or rows % lanes:
        would_do = largest_divisor(rows, max(1, lanes))
        raise RecipeError(
            f"data.lanes: found {lanes}, expected a divisor of the {_listed(rows_per_step)} rows of a step "
            f"(batch.tokens_per_step / data.sequence_length), such as {would_do}"
        )
    return lanes


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(str(number) for number in dict.fromkeys(numbers))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)
