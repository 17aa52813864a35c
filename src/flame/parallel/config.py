"""The settings that the parallel package reads."""

from __future__ import annotations

from dataclasses import dataclass

from flame.schema import setting

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")


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
    reduce: str = setting(
        "step",
        help="when gradients are reduced over ranks: once a step, until which each holds its model's whole "
        "gradient in float32; or after every micro-batch, for less memory and more traffic",
        identity=False,
        choices=("step", "micro_batch"),
    )
    reshard: str = setting(
        "auto",
        help="after what a block's gathered parameters are freed: forward, its forward pass (ZeRO-3); "
        "micro_batch, its backward pass (ZeRO-2); step, its last backward pass of a step: most memory, least "
        "traffic; auto: forward, and step with a pipeline",
        identity=False,
        choices=("auto", "forward", "micro_batch", "step"),
    )
    pipeline: int = setting(
        1, help="ranks that share the blocks, some after the others: pipeline parallel", identity=False
    )
    pipeline_schedule: str = setting(
        "1f1b",
        help="in which order the stages of a pipeline take the micro-batches",
        identity=False,
        choices=SCHEDULES,
    )
    pipeline_stages_per_rank: int | None = setting(
        None,
        help="stages that one rank of a pipeline has in turn; left out: 2 for interleaved and zbv, else 1",
        identity=False,
    )
    pipeline_split: list[int] | None = setting(
        None,
        help="how many blocks each stage of a pipeline has, such as [7, 9]; left out: balanced by parameters "
        "and FLOPs",
        identity=False,
    )

    @property
    def freed_after(self) -> str:
        """`reshard`, decided."""
        if self.reshard != "auto":
            return self.reshard
        return "forward" if self.pipeline == 1 else "step"


@dataclass
class MemoryConfig:
    recompute: str = setting(
        "none",
        help="activation checkpointing: what blocks compute again in the backward pass; full keeps their "
        "inputs alone, offload keeps those in host memory, selective keeps matrix products and attention too",
        identity=False,
        choices=("none", "selective", "full", "offload"),
    )
    recompute_every: int = setting(
        1, help="1: in every block; n: in every n-th, for less time and more memory", identity=False
    )


@dataclass
class PrecisionConfig:
    compute: str | None = setting(
        None,
        help="dtype of forward and backward; masters and reductions stay float32; "
        "left out: bfloat16 on GPUs, float32 on CPU",
        identity=True,
        choices=("bfloat16", "float32"),
    )
