"""The data state: where every lane is. Kilobytes, exact, independent of the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from flame.errors import DataError


@dataclass(frozen=True, slots=True)
class DataState:
    """After some step, the place of every lane."""

    next_step: int  # data steps count from 0
    lanes: np.ndarray  # int64 [N, F]: the sum of `StepRows.state` over the data-parallel ranks
    columns: list[str]  # names of the F columns: `Loader.columns`
    fingerprint: dict[str, Any]  # of the catalog and plan that made it

    def to_json(self) -> dict[str, Any]:
        """As dictionaries, lists, strings and whole numbers, for data.json."""
        return {
            "next_step": self.next_step,
            "columns": self.columns,
            "lanes": self.lanes.tolist(),
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DataState:
        """What `to_json` wrote. Raises DataError where it is something else."""
        try:
            columns = [str(name) for name in cast("list[Any]", raw["columns"])]
            lanes = np.array(raw["lanes"], dtype=np.int64).reshape(-1, len(columns))
            return cls(int(raw["next_step"]), lanes, columns, dict(raw["fingerprint"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"not a data state: {error!r}; the checkpoint's data.json is damaged") from None

    def rows_of_lanes(self, columns: list[str], lanes: int) -> list[list[int]]:
        """The state of each lane in the order of `columns`. Raises DataError where it is of other data."""
        if sorted(columns) != sorted(self.columns) or len(self.lanes) != lanes:
            raise DataError(
                f"the saved data state has {len(self.lanes)} lanes and columns {', '.join(self.columns)}; "
                f"this recipe has {lanes} lanes and columns {', '.join(columns)}: use the run's recipe"
            )
        order = [self.columns.index(name) for name in columns]
        return self.lanes[:, order].tolist()
