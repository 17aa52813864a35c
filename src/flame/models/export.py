"""A trained model as a folder that `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from flame.errors import ModelError
from flame.models import cpu
from flame.models.build import build_on_meta, initialize
from flame.models.families.own import OWN_FILE, OwnConfig, module_file, transformers_config
from flame.models.pretrained import fill, folder_config
from flame.models.registry import family_of, load_config
from flame.models.weights import open_weights
from flame.models.zoo import quiet

GENERATION = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MARK = "exported_by"  # a field of config.json that tells an export from any other folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


SHARD_BYTES = 5 * 10**9  # of a file of weights, at most
STEP = "exported_step"  # a field of config.json: the step of the run that was exported
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    state: Mapping[str, Tensor],
    config: PretrainedConfig,
    tokenizer_path: Path,
    to: Path,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    *,
    step: int | None = None,
    generation_config: Path | None = None,
    chat_template: Path | None = None,
) -> None:
    """Write full (unsharded) weights, config and tokenizer as a transformers folder.

    `state` maps names to tensors, of which each is asked for once: where it reads them from a disk, no more
    than a file of at most `shard_bytes` and one tensor more are in memory. Floating-point weights are written
    as `dtype`. `config` is the user's, with the settings that training turned off. `tokenizer_path` is a
    folder, a tokenizer.json or "bytes"; `chat_template` stands in for the folder's own, `generation_config`
    for what follows from the config. `step`: of the run, noted in the config. The folder appears whole or not
    at all; an earlier export at `to` is replaced. Raises ModelError: another folder is there, weights or
    tokenizer files are missing, a value is too large for `dtype`.
    """
    if to.exists() and not _is_export(to):
        raise ModelError(f"{to}: exists and is not an export of flame's; choose another folder or remove it")
    blanks = _blanks(state, config, dtype)
    tokenizer_files = _tokenizer_files(tokenizer_path)
    to.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    try:
        _write_weights(state, blanks, beside, shard_bytes)
        _write_configs(config, beside, dtype, step, generation_config)
        for path in tokenizer_files:
            shutil.copyfile(path, beside / path.name)
        if chat_template is not None:
            shutil.copyfile(chat_template, beside / CHAT_TEMPLATE)
        for path in beside.iterdir():
            _sync(path)
        beside.chmod(0o755)  # mkdtemp's is for the owner alone
        _put_in_place(beside, to)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def exported_step(path: Path) -> int | None:
    """The step of the run that an export was made at; None where there is no export, or it does not say."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", found).get(STEP) if isinstance(found, dict) and MARK in found else None


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
            model: nn.Module = load(str(path), dtype="auto", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be loaded: {error}") from None
    return model.eval()


def _load_own(path: Path) -> nn.Module:
    config = folder_config(path)
    model = build_on_meta(config)
    initialize(model, config, 0, "cpu")  # buffers that are not stored
    weights = open_weights(path)
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    fill({name: (tensor, tensor.detach()) for name, tensor in held.items()}, weights, config)
    stored = {weights.read(name, (slice(0, 0),)).dtype for name in weights.shapes if weights.shapes[name]}
    floats = [dtype for dtype in stored if dtype.is_floating_point]
    return model.to(floats[0] if len(floats) == 1 else torch.float32).eval()


def _is_export(path: Path) -> bool:
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path.is_dir() and not any(path.iterdir())
    return isinstance(found, dict) and MARK in found


def _blanks(state: Mapping[str, Tensor], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is to be written, on the meta device, each tied tensor once. Raises ModelError where `state` has
    other names than the model."""
    blueprint = build_on_meta(config)
    held: dict[str, Tensor] = blueprint.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in held.items():
        first.setdefault(id(tensor), name)
    kept = {name: tensor for name, tensor in held.items() if first[id(tensor)] == name}
    missing, unknown = kept.keys() - set(state), set(state) - held.keys()
    if missing or unknown:
        raise ModelError(
            f"weights of a {family_of(config).name} model: missing: {', '.join(sorted(missing)) or 'none'}; "
            f"not in the model: {', '.join(sorted(unknown)) or 'none'}"
        )
    return {
        name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device="meta")
        for name, t in kept.items()
    }


def _write_weights(
    state: Mapping[str, Tensor], blanks: dict[str, Tensor], folder: Path, shard_bytes: int
) -> None:
    split = split_torch_state_dict_into_shards(blanks, max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        weights = {name: _as_written(name, state[name], blanks[name]) for name in names}
        save_file(weights, folder / filename, metadata={"format": "pt"})
        del weights  # before the next file's are read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _as_written(name: str, value: Tensor, blank: Tensor) -> Tensor:
    """`value` on the CPU in its dtype in the file, contiguous."""
    if value.shape != blank.shape:
        found = f"{tuple(value.shape)}, expected {tuple(blank.shape)}"
        raise ModelError(f"{name}: found a tensor of shape {found}; export takes full tensors")
    written = value.detach().to("cpu", blank.dtype).contiguous()
    if blank.dtype == torch.float16 and not torch.equal(written.isfinite(), value.isfinite().cpu()):
        raise ModelError(f"{name}: holds values too large for float16; export as bfloat16 or float32")
    return written


def _write_configs(
    config: PretrainedConfig, folder: Path, dtype: torch.dtype, step: int | None, generation: Path | None
) -> None:
    written: Any = copy.deepcopy(config)
    setattr(written, MARK, "flame")
    setattr(written, STEP, step)  # also where a model began with another run's export
    if isinstance(config, OwnConfig):
        shutil.copyfile(module_file(config), folder / OWN_FILE)
        own: Any = transformers_config(config)
        if own is None:
            written.save_pretrained(folder)
            return
        own.exported_by, own.exported_step = "flame", step
        written = own
    else:
        mapping = cast("Any", AutoModelForCausalLM)._model_mapping
        written.architectures = [mapping[type(config)].__name__]
    written.dtype = dtype
    written.save_pretrained(folder)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION)
        return
    made: Any = GenerationConfig.from_model_config(written)
    made.save_pretrained(folder)


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
