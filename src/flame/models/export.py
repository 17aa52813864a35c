"""A trained model as a folder that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from flame.errors import ModelError
from flame.models import cpu
from flame.models.build import build_on_meta
from flame.models.families.own import OwnConfig, module_file, own_config
from flame.models.registry import family_of, load_config
from flame.models.zoo import quiet

OWN_FILE = "model.py"  # the code of an own model, beside its weights
MARK = "exported_by"  # a field of config.json that tells an export from any other folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def export(
    state: dict[str, Tensor],
    config: PretrainedConfig,
    tokenizer_path: Path,
    to: Path,
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write full (unsharded) weights, config and tokenizer as a transformers folder.

    `state` maps parameter names to tensors; `config` is the user's, with the settings that training
    turned off. `tokenizer_path` is a folder or a tokenizer.json. Weights are written as `dtype`, in files
    of at most `shard_bytes`. The folder appears whole or not at all; an earlier export at `to` is
    replaced. Raises ModelError: another folder is there, weights or tokenizer files are missing.
    """
    if to.exists() and not _is_export(to):
        raise ModelError(f"{to}: exists and is not an export of flame's; choose another folder or remove it")
    weights = _weights(state, config, dtype)
    tokenizer_files = _tokenizer_files(tokenizer_path)
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        _write_weights(weights, beside, shard_bytes)
        _write_configs(config, beside, dtype)
        for path in tokenizer_files:
            shutil.copyfile(path, beside / path.name)
        for path in beside.iterdir():
            _sync(path)
        beside.chmod(0o755)  # mkdtemp's is for the owner alone
        _put_in_place(beside, to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_exported(path: Path) -> nn.Module:
    """The model of an export, on the CPU in its stored dtype, in evaluation mode, for generation; an own
    model's from the code beside its weights.

    Raises ModelError where the folder is none or cannot be loaded.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no exported model: there is no config.json in it")
    if (path / OWN_FILE).is_file():
        return _load_own(path)
    family_of(load_config(str(path)))
    if not torch.cuda.is_available():
        cpu.install()
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet():
            model: nn.Module = load(str(path), dtype="auto", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be loaded: {error}") from None
    return model.eval()


def exported_config(path: Path) -> PretrainedConfig:
    """The config of an export, an own model's with the code beside its weights. Raises ModelError."""
    if not (path / OWN_FILE).is_file():
        return load_config(str(path))
    arguments = json.loads((path / "config.json").read_text(encoding="utf-8")).get("arguments", {})
    return own_config(path / OWN_FILE, arguments)


def _load_own(path: Path) -> nn.Module:
    model = build_on_meta(exported_config(path))
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state |= load_file(file)
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: cannot be loaded: {error}") from None
    missing = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if missing:
        raise ModelError(f"{path}: cannot be loaded: it holds no {', '.join(missing)}")
    return model.eval()


def _is_export(path: Path) -> bool:
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path.is_dir() and not any(path.iterdir())
    return isinstance(found, dict) and MARK in found


def _weights(state: dict[str, Tensor], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """`state` in `dtype` on the CPU, contiguous, each tied tensor once, checked against the model."""
    blueprint = build_on_meta(config)
    family = family_of(config)
    shapes = {name: tuple(p.shape) for name, p in blueprint.named_parameters(remove_duplicate=False)}
    kept = {name for name, _ in blueprint.named_parameters()}
    tied = set(shapes) - kept
    missing, unknown = kept - set(state), set(state) - set(shapes)
    if missing or unknown:
        raise ModelError(
            f"weights of a {family.name} model: missing: {', '.join(sorted(missing)) or 'none'}; "
            f"not in the model: {', '.join(sorted(unknown)) or 'none'}"
        )
    wrong = [name for name in sorted(state) if tuple(state[name].shape) != shapes[name]]
    if wrong:
        found = f"{tuple(state[wrong[0]].shape)}, expected {shapes[wrong[0]]}"
        raise ModelError(f"{wrong[0]}: found a tensor of shape {found}; export takes full tensors")
    named = ((name, value.detach()) for name, value in state.items() if name not in tied)
    return {name: value.to("cpu", dtype).contiguous() for name, value in named}


def _write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _write_configs(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> None:
    written: Any = copy.deepcopy(config)
    if isinstance(config, OwnConfig):
        setattr(written, MARK, "flame")
        written.save_pretrained(folder)
        shutil.copyfile(module_file(config), folder / OWN_FILE)
        return
    mapping = cast("Any", AutoModelForCausalLM)._model_mapping
    written.architectures = [mapping[type(config)].__name__]
    written.dtype = dtype
    setattr(written, MARK, "flame")
    written.save_pretrained(folder)
    generation: Any = GenerationConfig.from_model_config(written)
    generation.save_pretrained(folder)


def _tokenizer_files(path: Path) -> list[Path]:
    if str(path) == "bytes":  # the tokenizer without a file
        return []
    if path.is_file():
        return [path]
    found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not found:
        raise ModelError(f"{path}: no tokenizer files found; expected tokenizer.json or a folder with one")
    return found


def _put_in_place(beside: Path, to: Path) -> None:
    """Rename, an earlier export stepping aside first."""
    if to.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{to.name}.old.", dir=to.parent))
        to.rename(old / "export")
        beside.rename(to)
        shutil.rmtree(old)
    else:
        beside.rename(to)
    _sync(to.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
