"""`flame export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from flame.errors import Exit
from flame.exports import export_run
from flame.schema import count_option


def export(run: str, step: int | None, to: str, dtype: str, shard_size: str, ema: bool) -> Exit:
    """Writes the model of a run's checkpoint, or the average of its weights, to the folder `to`."""
    shard_bytes = count_option("--shard-size", shard_size)
    step = export_run(Path(run), step, Path(to), dtype, shard_bytes, averaged=ema)
    what = "average of the model" if ema else "model"
    print(f"{to}: the {what} of {run} after step {step}; transformers' AutoModelForCausalLM loads it")
    return Exit.DONE
