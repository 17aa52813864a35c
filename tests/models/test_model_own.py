import json
import shutil
from pathlib import Path

import pytest
import torch
from models.small_models import packed
from transformers import AutoModelForCausalLM

from flame import cli
from flame.data.tokens import load_tokenizer
from flame.errors import ModelError, RecipeError
from flame.models.build import build_on_meta, initialize
from flame.models.export import export, exported_step, load_exported
from flame.models.families.own import CHECKED_PARAMETERS, continued
from flame.models.pretrained import folder_config
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


HUGGINGFACE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class Config(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=61, width=16, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.width = vocab_size, width

class Model(PreTrainedModel):
    config_class = Config
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def hidden_states(self, input_ids, position_ids=None, cu_seqlens=None):
        return torch.tanh(self.mix(self.embedding(input_ids)))

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.head(self.hidden_states(input_ids)))
"""


@pytest.mark.parametrize("tie", [True, False])
def test_an_own_pretrained_model_is_exported_for_the_auto_classes(tmp_path, monkeypatch, tie):
    (tmp_path / "mine.py").write_text(HUGGINGFACE)
    (tmp_path / "mine.json").write_text(json.dumps({"width": 24, "tie_word_embeddings": tie}))
    config = _config(tmp_path / "mine.py", tmp_path / "mine.json")
    assert (family_of(config).name, config.vocab_size) == ("own", 61)
    model = build_on_meta(config)
    initialize(model, config, 1, "cpu")
    assert (model.head.weight is model.embedding.weight) == tie
    assert float(model.mix.weight.detach().std()) == pytest.approx(0.3, rel=0.1)
    export(dict(model.state_dict()), config, Path("bytes"), tmp_path / "e", torch.float32, step=3)
    tokens = torch.arange(20)[None]
    expected = model(tokens).logits
    assert torch.equal(load_exported(tmp_path / "e")(tokens).logits, expected)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "e", trust_remote_code=True)
    assert type(loaded).__name__ == "Model"
    assert torch.equal(loaded(tokens).logits, expected)
    assert exported_step(tmp_path / "e") == 3
    again = folder_config(tmp_path / "e")
    assert again.to_dict()["arguments"] == {"width": 24, "tie_word_embeddings": tie}


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_an_own_models_export_generates(tmp_path, text_folder, config, capsys, tokenizer):
    (tmp_path / "large.json").write_text('{"vocabulary": 384, "width": 32, "depth": 1}')
    config = _config(EXAMPLE, tmp_path / "large.json")
    model = build_on_meta(config)
    initialize(model, config, 1, "cpu")
    given = Path("bytes") if tokenizer == "bytes" else text_folder / "tokenizer"
    export(dict(model.state_dict()), config, given, tmp_path / "e", torch.float32)
    said = []
    for options in ([], [], ["--temperature", "1"], ["--temperature", "1", "--seed", "5"]):
        assert cli.run(["generate", str(tmp_path / "e"), "-p", "def f", "--tokens", "12", *options]) == 0
        said.append(capsys.readouterr().out)
    assert all(text.startswith("def f") for text in said)
    assert said[0] == said[1]
    assert len({*said[1:]}) == 3
    ids = load_tokenizer(given, False).encode(["def f"])[0][:-1]
    _tokens, positions, cu_seqlens, _ = packed([[len(ids)]])
    likeliest = model.head(model(torch.from_numpy(ids).long()[None], positions, cu_seqlens))[0, -1].argmax()
    assert int(continued(model, torch.from_numpy(ids).long(), 1, 0.0, 0, -1)[-1]) == int(likeliest)
