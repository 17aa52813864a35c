import shutil
from pathlib import Path

import pytest
import torch
from models.small_models import packed

from flame.errors import ModelError, RecipeError
from flame.models.build import build_on_meta, initialize
from flame.models.export import export, load_exported
from flame.models.families.own import CHECKED_PARAMETERS
from flame.models.registry import family_of, load_config
from flame.recipe import read_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"

SHORT = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, vocabulary=61, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids, position_ids, cu_seqlens):
        x = self.embedding(input_ids)
        return {states}
"""


def _written(tmp_path, states, old="", new=""):
    path = tmp_path / "mine.py"
    path.write_text(SHORT.format(states=states).replace(old, new))
    return path


def _config(path, arguments=""):
    return load_config(str(arguments), str(path))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "small.json").write_text('{"vocabulary": 97, "width": 32, "depth": 2}')
    return _config(EXAMPLE, tmp_path / "small.json")


def test_the_example_is_built_initialised_and_kept_apart(config):
    family = family_of(config)
    assert config.vocab_size == 97
    model = build_on_meta(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    initialize(model, config, 1, "cpu")
    assert [name for name, _ in family.blocks(model)] == ["layers.0", "layers.1"]
    assert float(model.layers[0].qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    tokens, *packing = packed([[5, 43, 1, 71], [120]])
    hidden = family.hidden(model, tokens, *packing).flatten(0, 1)
    alone = family.hidden(model, tokens[:1, 5:48], *packed([[43]])[1:])[0]
    torch.testing.assert_close(hidden[5:48], alone, atol=2e-5, rtol=1e-4)
    count = family.flops(config)
    assert (count.per_token, count.per_pair) == (6 * (2 * 12 * 32 * 32 + 97 * 32), 12 * 2 * 32)


def test_a_model_without_rules_of_its_own_gets_torchs_and_its_matrices_counted(tmp_path):
    config = _config(_written(tmp_path, "self.mix(x)"))
    model = build_on_meta(config)
    initialize(model, config, 1, "cpu")
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1, rel=0.1)
    assert family_of(config).blocks(model) == []
    assert family_of(config).flops(config).per_token == 6 * (16 * 16 + 16 * 61)
    assert {"mix.bias", "head.bias"} == family_of(config).no_weight_decay(model)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ("x.cumsum(1)", "a packed document gets other states than alone"),
        ("x + 1e-7 * x.flip(1)", "a document's loss has a gradient in its neighbours"),
        ("x.flatten(0, 1)", r"states of shape \(36, 16\) for tokens of shape \(1, 36\)"),
        ("self.embedding.weight[input_ids]", "a document's loss has no gradient in its own embeddings"),
        ("self.nothing(x)", "AttributeError: 'Model' object has no attribute 'nothing'"),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused_with_the_reason(tmp_path, states, reason):
    config = _config(_written(tmp_path, states))
    with pytest.raises(ModelError, match=rf"mine\.py: cannot be trained truly: ({reason})"):
        family_of(config)


def test_a_token_that_reads_what_comes_after_it_is_refused(tmp_path):
    # the next position of its own document, whose number is the smaller one at a document's end
    ahead = "x + (torch.roll(x, -1, 1) - x) * (torch.roll(position_ids, -1, 1) > position_ids)[..., None]"
    with pytest.raises(ModelError, match="a token's loss has a gradient in the tokens after it"):
        family_of(_config(_written(tmp_path, ahead)))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("class Model", "class Other", "defines no class Model"),
        ("import torch\n", "import torchh\n", "cannot be imported: ModuleNotFoundError"),
        ("vocabulary=61, width=16", "vocabulary, width", "Model cannot be made: TypeError"),
        ("self.head = nn.Linear(width, vocabulary)", "pass", r"Model\.head: found NoneType"),
    ],
)
def test_a_file_that_is_no_model_is_named_with_what_is_wrong(tmp_path, old, new, reason):
    with pytest.raises(ModelError, match=rf"mine\.py: {reason}"):
        _config(_written(tmp_path, "x", old, new))


def test_a_missing_file_and_arguments_that_are_none_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.py: cannot be read"):
        _config(tmp_path / "none.py")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ModelError, match=r"list\.json: expected a JSON object"):
        _config(_written(tmp_path, "x"), tmp_path / "list.json")


def test_a_large_model_needs_a_small_instance_to_be_checked(tmp_path):
    wide = f"width={CHECKED_PARAMETERS // 61}"
    path = _written(tmp_path, "x", "width=16", wide)
    path.write_text(path.read_text().replace("self.mix = nn.Linear(width, width)", "pass"))
    with pytest.raises(ModelError, match=r"too many to check it .*; give it a class method small\(\)"):
        family_of(_config(path))
    path.write_text(
        path.read_text() + "\n    @classmethod\n    def small(cls):\n        return cls(width=8)\n"
    )
    assert family_of(_config(path)).name == "own"


def test_a_buffer_that_nothing_sets_is_named(tmp_path):
    text = "self.mix = nn.Linear(width, width); self.register_buffer('table', torch.ones(3))"
    path = _written(tmp_path, "x", "self.mix = nn.Linear(width, width)", text)
    config = _config(path)
    with pytest.raises(ModelError, match=r"table: .* leaves it unset"):
        initialize(build_on_meta(config), config, 1, "cpu")


def test_a_moved_file_is_the_same_model_and_a_changed_one_is_not(tmp_path, config):
    moved = tmp_path / "moved.py"
    shutil.copy(EXAMPLE, moved)
    again = _config(moved, tmp_path / "small.json")
    assert again.to_dict() == config.to_dict()
    moved.write_text(moved.read_text() + "\n# changed\n")
    assert _config(moved, tmp_path / "small.json").digest != config.digest


def test_a_recipe_without_a_model_says_what_to_give(write_recipe, tmp_path):
    recipe = write_recipe(replaced={f'config = "{tmp_path / "gla.json"}"': "compile = false"})
    with pytest.raises(RecipeError, match="model: give config, or module"):
        read_recipe(recipe)


def test_an_own_models_export_carries_its_code_and_loads_again(tmp_path, config):
    model = build_on_meta(config)
    initialize(model, config, 1, "cpu")
    export(dict(model.state_dict()), config, Path("bytes"), tmp_path / "e", torch.float32)
    assert (tmp_path / "e" / "model.py").read_text() == EXAMPLE.read_text()
    loaded = load_exported(tmp_path / "e")
    tokens, positions, cu_seqlens, _ = packed([[40]])
    assert torch.equal(loaded(tokens, positions, cu_seqlens), model(tokens, positions, cu_seqlens))


def test_an_own_model_with_a_tie_and_buffers_comes_back_as_it_was(tmp_path):
    text = """self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def init_weights(self, module):
        if isinstance(module, Model):
            module.steps.fill_(5)
            module.table.fill_(2.0)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()"""
    config = _config(_written(tmp_path, "x", "self.head = nn.Linear(width, vocabulary)", text))
    model = build_on_meta(config)
    initialize(model, config, 1, "cpu")
    export(dict(model.state_dict()), config, Path("bytes"), tmp_path / "e", torch.bfloat16)
    loaded = load_exported(tmp_path / "e")
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16())
    assert (loaded.steps.tolist(), loaded.steps.dtype) == ([5, 5, 5], torch.int64)
    assert loaded.table.tolist() == [2.0, 2.0, 2.0]
