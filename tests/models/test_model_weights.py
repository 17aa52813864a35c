"""Weights that come in: from a folder of any shape into a model of any layout, and out again as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import Ranks
from models.small_models import SMALL, VOCABULARY, _gla, _llama, initialized
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from flame.errors import ModelError, RecipeError
from flame.models import weights as weights_module
from flame.models.build import build_on_meta, initialize
from flame.models.export import export
from flame.models.families.own import own_config
from flame.models.pretrained import fill, folder_config
from flame.models.registry import family_of
from flame.models.weights import find_weights, open_weights
from flame.models.zoo import quiet
from flame.parallel.apply import apply_parallelism
from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import join_world

OWN = Path(__file__).parents[2] / "examples" / "own_model.py"


def stored(config, folder: Path, dtype=torch.bfloat16, seed: int = 1, **options) -> nn.Module:
    """A model with weights of the seed, saved by transformers as its users save it."""
    with quiet():
        model = AutoModelForCausalLM.from_config(config).to(
            dtype
        )  # fla makes some in float32 whatever is asked
    values = initialized(config, seed).state_dict()
    model.load_state_dict(values)
    with torch.no_grad():
        for parameter in model.parameters():  # norms are all ones, which would hide an exchange
            parameter += 0.01 * torch.randn(parameter.shape).to(dtype)
    with quiet():
        model.save_pretrained(folder, **options)
    return model


def filled(config, folder: Path, exclude: tuple[str, ...] = (), seed: int = 2) -> nn.Module:
    """Another model of the config, with the folder's weights."""
    model = initialized(config, seed)
    targets = {n: (t, t.detach()) for n, t in model.state_dict(keep_vars=True).items()}
    fill(targets, open_weights(folder), config, exclude)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


@pytest.mark.parametrize("name", SMALL)
def test_what_comes_in_goes_out_bit_for_bit(tmp_path, name):
    stored(SMALL[name], tmp_path / "in", max_shard_size="40KB")
    config = folder_config(tmp_path / "in")
    model = filled(config, tmp_path / "in")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    export(dict(model.state_dict()), config, Path("bytes"), tmp_path / "out", torch.bfloat16)
    assert same_bits(tensors(tmp_path / "in"), tensors(tmp_path / "out"))


def test_tied_weights_stay_tied_and_are_read_by_any_of_their_names(tmp_path):
    config = _llama(tie_word_embeddings=True)
    stored(config, tmp_path / "in")
    model = filled(config, tmp_path / "in")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    values = tensors(tmp_path / "in")
    assert "lm_head.weight" not in values
    values["lm_head.weight"] = values.pop("model.embed_tokens.weight")
    save_file(values, tmp_path / "in" / "model.safetensors")
    assert same_bits(dict(filled(config, tmp_path / "in").state_dict()), dict(model.state_dict()))
    values["model.embed_tokens.weight"] = values["lm_head.weight"] * 2
    save_file(values, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ModelError, match="different values, but the model ties them: set tie_word"):
        filled(config, tmp_path / "in")


def test_a_bin_file_is_read_and_nothing_in_it_is_run(tmp_path):
    config = _llama()
    expected = stored(config, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save(expected.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    found = filled(config, tmp_path / "in").state_dict()
    assert all(torch.equal(t.float(), found[n]) for n, t in expected.state_dict().items())

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"x": Evil()}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as weights"):
        filled(config, tmp_path / "in")
    assert not (tmp_path / "touched").exists()


def test_weights_saved_without_a_head_lack_only_that(tmp_path):
    config = _llama(tie_word_embeddings=True)
    whole = stored(config, tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in tensors(tmp_path / "base")
    one, other = (filled(config, tmp_path / name).state_dict() for name in ("whole", "base"))
    assert same_bits(dict(one), dict(other))


def test_a_name_of_the_hub_is_its_local_copy(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    stored(_llama(), snapshot)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    original = weights_module.snapshot_download
    monkeypatch.setattr(
        weights_module, "snapshot_download", lambda *a, **k: original(*a, cache_dir=tmp_path, **k)
    )
    assert find_weights("some/model") == snapshot
    assert open_weights(find_weights("some/model")).shapes["model.norm.weight"] == (32,)
    with pytest.raises(ModelError, match='"some/other": no such folder, and the hub gave none'):
        find_weights("some/other")
    with pytest.raises(ModelError, match=r"\./nothing: no such folder; give one with config\.json"):
        find_weights("./nothing")


# --------------------------------------------------------------------------------- refusals


def _error(config, folder, *exclude, kind=ModelError) -> str:
    with pytest.raises(kind) as raised:
        filled(config, folder, exclude)
    return str(raised.value)


def test_what_does_not_fit_is_named_with_the_settings_that_differ(tmp_path):
    stored(_llama(), tmp_path / "in")
    said = _error(_llama(num_hidden_layers=3), tmp_path / "in")
    assert "in: these are not the weights of the recipe's model: missing there: model.layers.2." in said
    assert "and 4 more" in said
    assert "the configs differ: " in said and "num_hidden_layers is 2 there and 3 here" in said
    said = _error(_llama(num_hidden_layers=1), tmp_path / "in")
    assert "not in the model: model.layers.1." in said
    said = _error(_llama(intermediate_size=40), tmp_path / "in")
    assert "model.layers.0.mlp.gate_proj.weight (48, 32) there and (40, 32) here" in said
    assert "a gla model, but the recipe's is llama" in _error(_llama(), _as_gla(tmp_path))
    values = tensors(tmp_path / "in")
    values["model.norms.weight"] = values.pop("model.norm.weight")
    save_file(values, tmp_path / "in" / "model.safetensors")
    said = _error(_llama(), tmp_path / "in")
    assert "missing there: model.norm.weight (did you mean model.norms.weight?)" in said


def _as_gla(tmp_path) -> Path:
    stored(_gla(), tmp_path / "gla")
    return tmp_path / "gla"


def test_another_vocabulary_is_refused_with_what_to_do(tmp_path):
    stored(_llama(), tmp_path / "in")
    larger = _llama(vocab_size=VOCABULARY + 7)
    said = _error(larger, tmp_path / "in")
    assert f"vocab_size is {VOCABULARY} there and {VOCABULARY + 7} here" in said
    assert "resize it with transformers' resize_token_embeddings" in said
    model = filled(larger, tmp_path / "in", ("*embed_tokens*", "lm_head.*"))
    fresh, given = initialized(larger, 2).state_dict(), tensors(tmp_path / "in")
    for name, tensor in model.state_dict().items():
        excluded = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(tensor, fresh[name] if excluded else given[name].float()), name


def test_patterns_that_fit_nothing_or_half_of_a_tie_are_refused(tmp_path):
    config = _llama(tie_word_embeddings=True)
    stored(config, tmp_path / "in")
    said = _error(config, tmp_path / "in", "lm_haed.weight", kind=RecipeError)
    assert 'run.exclude: "lm_haed.weight" is the name of no parameter; did you mean lm_head.weight?' in said
    said = _error(config, tmp_path / "in", "lm_head.*", kind=RecipeError)
    assert "lm_head.weight is tied to model.embed_tokens.weight: exclude both or neither" in said


def test_quantised_damaged_and_absent_weights_are_refused(tmp_path):
    config = _llama()
    stored(config, tmp_path / "in", max_shard_size="40KB")
    folder = tmp_path / "in"
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "x"}}))
    assert "quantised weights cannot be trained on" in _error(config, folder)
    (folder / "config.json").write_text(json.dumps(said))
    first = sorted(folder.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    assert f"{first}: cannot be read as weights" in _error(config, folder)
    first.unlink()
    assert f"index.json names {first.name}, which is not there" in _error(config, folder)
    packed = tensors(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "in: no weights there; expected .safetensors files" in _error(config, folder)
    missing = {n: t for n, t in initialized(config).state_dict().items() if n not in packed}
    save_file({**missing, **{n: t.to(torch.int8) for n, t in packed.items()}}, folder / "m.safetensors")
    assert "is stored as int8; quantised" in _error(config, folder)


def test_settings_that_differ_without_harm_to_the_shapes_are_told(tmp_path):
    stored(_llama(rms_norm_eps=1e-6), tmp_path / "in")
    config = _llama(rms_norm_eps=1e-5)
    model = initialized(config)
    targets = {n: (t, t.detach()) for n, t in model.state_dict(keep_vars=True).items()}
    source = fill(targets, open_weights(tmp_path / "in"), config)
    assert source.config["rms_norm_eps"] == 1e-6


def test_the_digest_tells_weights_apart_and_not_where_they_lie(tmp_path):
    stored(_llama(), tmp_path / "in")
    stored(_llama(), tmp_path / "other", seed=3)
    here = open_weights(tmp_path / "in").digest()
    assert here != open_weights(tmp_path / "other").digest()
    (tmp_path / "in").rename(tmp_path / "moved")
    assert here == open_weights(tmp_path / "moved").digest()


# ------------------------------------------------------------------------------------ ranks


def fill_sharded(folder: Path, replicate: int) -> int:
    """Fills a sharded model, counts what is read, and compares with the whole."""
    world = join_world()
    config = folder_config(folder)
    family, model = family_of(config), build_on_meta(config)
    mesh = data_mesh(resolve_layout(ParallelConfig(replicate=replicate), world.size), "cpu")
    blocks = [block for _, block in family.blocks(model)]
    apply_parallelism(model, blocks, mesh, compute=torch.float32, compile_blocks=False)
    initialize(model, config, 5, "cpu")
    weights, read = open_weights(folder), 0
    original = type(weights).read

    def counting(self, name, part):
        nonlocal read
        value = original(self, name, part)
        read += value.numel()
        return value

    type(weights).read = counting
    held = model.state_dict(keep_vars=True)
    targets = {
        n: (t, t.to_local().detach() if hasattr(t, "to_local") else t.detach()) for n, t in held.items()
    }
    fill(targets, weights, config)
    mine = {id(t): into.numel() for t, into in targets.values()}
    assert read == sum(mine.values())
    whole = sum({id(t): t.numel() for t, _ in targets.values()}.values())
    assert read < 0.7 * whole, "each rank reads its part"
    expected = tensors(folder)
    for name, tensor in held.items():
        assert name not in expected or torch.equal(tensor.full_tensor(), expected[name].float()), name
    return 0


@pytest.mark.parametrize(("ranks", "replicate", "name"), [(3, 1, "llama-tied"), (4, 2, "gla-conv-mqa")])
def test_each_rank_reads_its_own_part_alone(tmp_path, ranks, replicate, name):
    stored(SMALL[name], tmp_path / "in", max_shard_size="40KB")
    assert Ranks(ranks, fill_sharded, tmp_path / "in", replicate).codes() == [0] * ranks


# -------------------------------------------------------------------------------- own models


def test_an_own_models_export_brings_its_code_and_arguments(tmp_path):
    config = own_config(OWN, {"vocabulary": 97, "width": 32, "depth": 2})
    model = initialized(config)
    export(dict(model.state_dict()), config, Path("bytes"), tmp_path / "e", torch.float32)
    again = folder_config(tmp_path / "e")
    assert again.to_dict()["arguments"] == config.arguments
    assert same_bits(dict(filled(again, tmp_path / "e").state_dict()), dict(model.state_dict()))
