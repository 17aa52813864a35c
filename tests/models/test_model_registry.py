import json
from pathlib import Path

import pytest
import torch
from models.small_models import SMALL
from torch import nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    Olmo3Config,
    StableLmConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from flame.errors import ModelError
from flame.models.build import build_on_meta
from flame.models.registry import families, family_of, load_config, refused
from flame.models.zoo import fla_models

CONFIGS = Path(__file__).parents[2] / "configs" / "models"

# mistral_7B, qwen3_0.6B, rwkv7_450M and rwkv7_1.5B have as many as their published weights
PARAMETERS = {
    "delta_net_1.3B": 1_365_677_056,
    "delta_net_340M": 374_362_112,
    "gated_deltanet_1.3B": 1_387_348_732,
    "gated_deltanet_410M": 413_047_292,
    "gated_deltanet_510M": 512_272_124,
    "gla_1.3B": 1_365_514_240,
    "gla_340M": 374_475_776,
    "gla_7B": 6_741_635_072,
    "gsa_1.3B": 1_376_880_640,
    "gsa_340M": 380_158_976,
    "hgrn2_1.3B": 1_364_396_032,
    "hgrn2_340M": 373_916_672,
    "llama_130M": 134_105_856,
    "llama_60M": 58_073_600,
    "mamba2_1.3B": 1_371_839_488,
    "mamba2_340M": 382_387_712,
    "mistral_7B": 7_241_732_096,
    "qwen3_0.6B": 596_049_920,
    "rwkv7_1.5B": 1_527_404_544,
    "rwkv7_450M": 450_767_872,
    "transformer_1.3B": 1_364_297_728,
    "transformer_340M": 373_867_520,
    "transformer_7B": 7_241_732_096,
}


def test_every_config_file_has_its_number_of_parameters_asserted_here():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_file_builds_a_model_of_the_size_expected(name):
    model = build_on_meta(load_config(str(CONFIGS / f"{name}.json")))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SMALL)
def test_a_family_knows_where_its_models_parts_are(name):
    config = SMALL[name]
    family = family_of(config)
    model = build_on_meta(config)
    blocks = family.blocks(model)
    assert [fqn for fqn, _ in blocks] == [f"{family.layers}.{number}" for number in range(2)]
    assert all(model.get_submodule(fqn) is block for fqn, block in blocks)
    assert family.embedding(model) is model.get_input_embeddings()
    assert family.head(model) is model.get_output_embeddings()


UNDECAYED = {"bias", "dt_bias", "A_log", "D", "decay", "lower_bounds", "mu", "x_bias", "bonus"}
UNDECAYED |= {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k"}


@pytest.mark.parametrize("name", SMALL)
def test_norms_and_biases_do_not_decay_and_matrices_do(name):
    config = SMALL[name]
    model = build_on_meta(config)
    still = family_of(config).no_weight_decay(model)
    names = {key for key, _ in model.named_parameters()}
    last = {key: key.rpartition(".")[2] for key in names}
    assert {key for key in names if "norm" in key or ".ln_" in key or last[key] in UNDECAYED} == still
    assert any("embed" in key or "wte" in key for key in names - still)


def test_an_infinite_number_is_read_as_transformers_writes_it(tmp_path):
    config = SMALL["mamba2"]
    assert config.dt_limit == (0.0, float("inf"))
    for use_diff in (True, False):
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=use_diff))
        assert tuple(load_config(str(tmp_path)).dt_limit) == config.dt_limit


def test_a_directory_and_a_file_give_the_same_config(tmp_path):
    text = json.dumps({"model_type": "gla", "hidden_size": 64})
    (tmp_path / "config.json").write_text(text)
    assert load_config(str(tmp_path)).to_dict() == load_config(str(tmp_path / "config.json")).to_dict()
    assert load_config(str(tmp_path)).hidden_size == 64


def test_a_missing_file_is_named():
    with pytest.raises(ModelError, match=r"configs/none\.json: no such model config"):
        load_config("configs/none.json")
    with pytest.raises(ModelError, match=r"/nowhere/at/all: no such model config"):
        load_config("/nowhere/at/all")


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}', '{"model_type": 7}'])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ModelError, match=r"a\.json"):
        load_config(str(tmp_path / "a.json"))


def test_an_unknown_model_type_gets_the_nearest_and_the_list(tmp_path):
    (tmp_path / "a.json").write_text('{"model_type": "gated_deltnet"}')
    with pytest.raises(ModelError, match=r"did you mean gated_deltanet\? families: gla, gated_delta"):
        load_config(str(tmp_path / "a.json"))


def test_a_model_without_a_family_is_trained_where_the_rules_are_proven_to_hold():
    config = Olmo3Config(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=4)
    family = family_of(config)
    assert (family.name, family.layers) == ("olmo3", "model.layers")
    assert family_of(config) is family  # proven once
    model = build_on_meta(config)
    assert len(family.blocks(model)) == 4
    assert family.embedding(model) is model.get_input_embeddings()


SMALL_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(head_dim=16, num_key_value_heads=2, **SMALL_SIZES), "softcap is not supported"),
        (CohereConfig(**SMALL_SIZES), "its logits are not its head's output"),
        (StableLmConfig(num_key_value_heads=2, **SMALL_SIZES), "gets other states than alone"),
        (MixtralConfig(), "mixtures of experts are not supported"),
        (T5Config(dropout_rate=0), "no causal language model of type t5"),
        (GPT2Config(), "attn_pdrop: found 0.1"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_a_model_for_which_the_rules_do_not_hold_is_refused_with_the_reason(config, reason):
    with pytest.raises(ModelError, match=rf"{config.model_type} .*{reason}|{reason}"):
        family_of(config)


def test_proving_a_model_leaves_the_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    family_of(Olmo3Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("gla", "attn_mode", "fused_chunk"),
        ("gated_deltanet", "attn_mode", "fused_recurrent"),
        ("transformer", "attnres_block_size", 2),
        ("gla", "hidden_act", "powlu"),
        ("llama", "attention_dropout", 0.1),
        ("hgrn", "attn_mode", "chunk"),
        ("rwkv7", "attn", {"layers": [1], "num_heads": 2}),
        ("mamba2", "hidden_act", "gelu"),
        ("comba", "num_v_heads", 4),
    ],
)
def test_a_setting_that_could_not_be_trained_truly_is_refused(name, setting, value):
    config = type(SMALL[name])(**{**SMALL[name].to_dict(), setting: value})
    with pytest.raises(ModelError, match=setting):
        family_of(config)


def test_every_family_has_a_small_model_that_all_checks_run_on():
    assert {family_of(config).name for config in SMALL.values()} == {f.name for f in families()}


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")  # fla's MLA
def test_a_model_of_flas_that_is_not_trained_is_refused_with_what_to_use():
    configs = [getattr(fla_models, name) for name in fla_models.__all__ if name.endswith("Config")]
    types = {config.model_type for config in configs}
    trained = {t for family in families() for t in family.model_types}
    assert types == (trained & types) | set(refused())
    assert not trained & set(refused())
    for config in configs:
        if config.model_type in refused():
            with pytest.raises(ModelError, match=rf"a {config.model_type} model is not trained.*; use "):
                family_of(config())


def test_family_names_are_unique():
    assert len({t for family in families() for t in family.model_types}) == len(families())


@pytest.mark.parametrize("name", SMALL)
def test_muon_gets_the_linear_weights_of_blocks_and_nothing_else(name):
    config = SMALL[name]
    model, family = build_on_meta(config), family_of(config)
    parameters, found = dict(model.named_parameters()), family.matrices(model)
    blocks = dict(family.blocks(model))
    linear = {
        f"{at}.{inner}.weight"
        for at, block in blocks.items()
        for inner, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and min(module.weight.shape) > 1
    }
    assert found == linear
    assert all(parameters[n].ndim == 2 and n.startswith(tuple(blocks)) for n in found)
    assert not found & (family.no_weight_decay(model) | family.embeddings(model))
    assert f"{family.embedding_name}.weight" in family.embeddings(model)
    assert f"{family.head_name}.weight" not in found
