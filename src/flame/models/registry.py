"""From a config's name to the config, and from the config to its family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame.errors import ModelError, nearest
from flame.models.families.fla import FLA_FAMILIES
from flame.models.families.huggingface import HUGGINGFACE_FAMILIES, by_default_rules
from flame.models.families.own import OwnConfig, own_config, own_family
from flame.models.families.refused import REFUSED
from flame.models.family import Family

FAMILIES: tuple[Family, ...] = (*FLA_FAMILIES, *HUGGINGFACE_FAMILIES)


def families() -> tuple[Family, ...]:
    """All families that can be trained."""
    return FAMILIES


def refused() -> dict[str, str]:
    """fla's other families: `model_type` to why it is not trained, and what to use."""
    return dict(REFUSED)


def load_config(spec: str, module: str | None = None) -> PretrainedConfig:
    """The config in a json file, in a directory that holds config.json, or of a model on the hub; with
    `module`, of the own model in that file, with its arguments from the json file `spec`, if any.

    Raises ModelError: no such file, not a config, or a `model_type` that nobody knows.
    """
    path = Path(spec)
    if module is not None:
        return own_config(Path(module), path if spec else None)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        return _read_config(path)
    return _read_config(path) if path.is_file() else _hub_config(spec)


def _read_config(path: Path) -> PretrainedConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_hook=_infinite)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such model config; give a config.json or a folder with one") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a model config: {error}") from None
    if not isinstance(raw, dict) or not isinstance(cast("Any", raw).get("model_type"), str):
        raise ModelError(f"{path}: not a model config: it names no model_type; known here: {_known()}")
    values = cast("dict[str, Any]", raw)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        hint = nearest(model_type, [t for family in FAMILIES for t in family.model_types])
        hint = hint or nearest(model_type, CONFIG_MAPPING.keys())
        raise ModelError(f'{path}: unknown model_type "{model_type}"; {hint}families: {_known()}')
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: not a valid {model_type} config: {error}") from None


def _infinite(value: dict[str, Any]) -> Any:
    """A float that JSON has no word for, as transformers writes it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _hub_config(name: str) -> PretrainedConfig:
    try:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ModelError(
            f'model config "{name}": no such file, and the hub gave none: {str(error).splitlines()[0]}'
        ) from None


def family_of(config: PretrainedConfig) -> Family:
    """The family of a config: a registered one, or transformers' default rules where they are proven to
    hold for it. Raises ModelError where they do not, or where a family refuses a setting."""
    if isinstance(config, OwnConfig):
        return own_family(config)
    model_type = str(config.model_type)
    for family in FAMILIES:
        if model_type in family.model_types:
            reason = family.refuses(config)
            if reason is not None:
                raise ModelError(f"a {family.name} model with {reason}")
            return family
    if model_type in REFUSED:
        raise ModelError(f"a {model_type} model is not trained here: {REFUSED[model_type]}")
    return by_default_rules(config)


def _known() -> str:
    return ", ".join(t for family in FAMILIES for t in family.model_types)
