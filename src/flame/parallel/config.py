"""The settings that the parallel package reads."""

from __future__ import annotations

from dataclasses import dataclass

from flame.schema import setting


@dataclass
class ParallelConfig:
    replicate: int = setting(1, help="copies of the (sharded) model: HSDP when above 1", identity=False)
    shard: int = setting(
        -1, help="ranks that share one copy's parameters (FSDP); -1: all that are left", identity=False
    )
    context: int = setting(
        1, help="ranks that share each row: context parallel over the sequence", identity=False
    )
    context_method: str = setting(
        "auto",
        help="how layers mix the tokens of rows that ranks share: heads exchanges tokens for heads, which "
        "the ranks have to divide; state hands a recurrence's state, and attention's keys and values, on "
        "from rank to rank; auto: heads where they divide, else state",
        identity=False,
        choices=("auto", "heads", "state"),
    )
    tensor: int = setting(
        1, help="ranks that share each block's matrices: tensor and sequence parallel", identity=False
    )
    pipeline: int = setting(1, help="stages of blocks, on a rank each: pipeline parallel", identity=False)


@dataclass
class PrecisionConfig:
    compute: str | None = setting(
        None,
        help="dtype of forward and backward; masters and reductions stay float32; "
        "left out: bfloat16 on GPUs, float32 on CPU",
        identity=True,
        choices=("bfloat16", "float32"),
    )
