import json
from pathlib import Path

import pytest
from models.small_models import SMALL
from transformers import GPT2Config

from flame.errors import ModelError
from flame.models.build import build_on_meta
from flame.models.registry import families, family_of, load_config, refused
from flame.models.zoo import fla_models

CONFIGS = Path(__file__).parents[2] / "configs" / "models"

# the figure for the transformer is fla-org/flame's own
PARAMETERS = {
    "transformer_340M": 373_867_520,
    "gla_340M": 374_475_776,
    "gated_deltanet_340M": 413_047_292,
    "llama_60M": 58_073_600,
    "llama_130M": 134_105_856,
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
    assert {key for key in names if "norm" in key or last[key] in UNDECAYED} == still
    assert any("embed" in key for key in names - still)


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


def test_a_model_without_a_family_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r'"gpt2".*families: gla, gated_deltanet, .*transformer, llama'):
        family_of(GPT2Config())


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("gla", "attn_mode", "fused_chunk"),
        ("gated_deltanet", "attn_mode", "fused_recurrent"),
        ("transformer", "attnres_block_size", 2),
        ("gla", "hidden_act", "powlu"),
        ("llama", "attention_dropout", 0.1),
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
