"""The settings that the models package reads."""

from __future__ import annotations

from dataclasses import dataclass

from flame.schema import setting


@dataclass
class ModelConfig:
    config: str = setting(
        "",
        help="a config.json, a directory that holds one, or a hub name; its model_type names the family; "
        "with module, a JSON file with the arguments of its Model, if it takes any",
        identity=False,  # a moved file is the same model: checkpoints know its content
    )
    module: str | None = setting(
        None,
        help="a Python file with a model of your own: class Model (see docs/models.md)",
        identity=False,  # as above
    )
    init_from: str | None = setting(
        None,
        help="begin with the weights in this folder, or of this model on the hub; config left out: theirs",
        identity=False,  # as above; checkpoints know what it held
    )
    compile: bool | None = setting(
        None,
        help="torch.compile each block; left out: on GPUs, for families where it is known to help",
        identity=False,
    )
