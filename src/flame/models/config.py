"""The settings that the models package reads."""

from __future__ import annotations

from dataclasses import dataclass

from flame.schema import setting


@dataclass
class ModelConfig:
    config: str = setting(
        help="a config.json, a directory that holds one, or a hub name; its model_type names the family",
        identity=False,  # a moved file is the same model: checkpoints know its content
    )
    compile: bool | None = setting(
        None,
        help="torch.compile each block; left out: on GPUs, for families where it is known to help",
        identity=False,
    )
