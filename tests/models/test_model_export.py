import json
import weakref
from collections.abc import Mapping

import pytest
import torch
from models.small_models import SMALL, VOCABULARY, initialized
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from flame.errors import ModelError
from flame.models.export import export, exported_step, load_exported
from flame.models.zoo import quiet

TOKENS = torch.arange(60)[None] % VOCABULARY


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not a tokenizer's")
    return folder


def _logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("name", SMALL)
def test_an_export_loads_with_equal_logits_and_the_users_settings(tmp_path, tokenizer, name, shard_bytes):
    model = initialized(SMALL[name])
    to = tmp_path / "export"
    export(dict(model.state_dict()), SMALL[name], tokenizer, to, torch.float32, shard_bytes)
    with quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(to, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(_logits(loaded.eval()), _logits(model.eval()))
    assert (to / "model.safetensors.index.json").exists() == (shard_bytes == 10_000)
    written = json.loads((to / "config.json").read_text())
    settings = ("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "use_cache", "tie_word_embeddings")
    assert {k: written[k] for k in settings if k in written} == {
        k: v for k, v in SMALL[name].to_dict().items() if k in settings
    }
    assert written["architectures"] == [type(model).__name__]
    assert (to / "generation_config.json").exists()
    copied = {path.name for path in to.iterdir()} & {path.name for path in tokenizer.iterdir()}
    assert copied == {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"export", "tokenizer"}


def test_the_type_of_the_weights_is_the_one_asked_for(tmp_path, tokenizer):
    model = initialized(SMALL["gla"])
    export(dict(model.state_dict()), SMALL["gla"], tokenizer, tmp_path / "e", torch.bfloat16)
    assert json.loads((tmp_path / "e" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_exported(tmp_path / "e")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not loaded.training
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.state_dict()[key], model.state_dict()[key].bfloat16())


def test_an_exported_model_generates(tmp_path, tokenizer):
    export(
        dict(initialized(SMALL["gated_deltanet"]).state_dict()),
        SMALL["gated_deltanet"],
        tokenizer / "tokenizer.json",
        tmp_path / "e",
        torch.float32,
    )
    model = load_exported(tmp_path / "e")
    out = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, pad_token_id=0)
    assert out.shape[1] > TOKENS.shape[1]


def test_an_earlier_export_is_replaced_and_any_other_folder_is_not(tmp_path, tokenizer):
    config = SMALL["gla"]
    states = [dict(initialized(config, seed).state_dict()) for seed in (1, 2)]
    for state in states:
        export(state, config, tokenizer, tmp_path / "e", torch.float32)
    key = "lm_head.weight"
    assert torch.equal(load_exported(tmp_path / "e").state_dict()[key], states[1][key])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "gla"}')
    with pytest.raises(ModelError, match="mine: exists and is not an export"):
        export(states[0], config, tokenizer, tmp_path / "mine", torch.float32)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


def test_a_failed_export_leaves_the_earlier_one_and_nothing_beside_it(tmp_path, tokenizer, monkeypatch):
    config = SMALL["gla"]
    state = dict(initialized(config).state_dict())
    export(state, config, tokenizer, tmp_path / "e", torch.float32)

    def full(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("flame.models.export.save_file", full)
    with pytest.raises(OSError, match="no space"):
        export(state, config, tokenizer, tmp_path / "e", torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"e", "tokenizer"}
    load_exported(tmp_path / "e")


def test_weights_that_are_not_the_models_are_named(tmp_path, tokenizer):
    config = SMALL["gla"]
    state = dict(initialized(config).state_dict())
    norm = state.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"missing: model\.norm\.weight; not in the model: other"):
        export({**state, "other": norm}, config, tokenizer, tmp_path / "e", torch.float32)
    with pytest.raises(ModelError, match=r"model\.norm\.weight: found a tensor of shape \(5,\)"):
        export({**state, "model.norm.weight": norm[:5]}, config, tokenizer, tmp_path / "e", torch.float32)


def test_a_folder_without_a_tokenizer_or_without_a_model_is_named(tmp_path, tokenizer):
    config = SMALL["gla"]
    state = dict(initialized(config).state_dict())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty: no tokenizer files"):
        export(state, config, tmp_path / "empty", tmp_path / "e", torch.float32)
    with pytest.raises(ModelError, match="empty: no exported model"):
        load_exported(tmp_path / "empty")


class Counting(Mapping):
    """Tensors that are made when they are asked for, and counted while somebody holds them."""

    def __init__(self, values):
        self.values_, self.alive, self.most, self.asked = values, 0, 0, []

    def __getitem__(self, name):
        tensor = self.values_[name].clone()
        size = tensor.nbytes
        self.asked.append(name)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, size)
        return tensor

    def _gone(self, size):
        self.alive -= size

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_file_and_a_tensor_are_held_at_a_time(tmp_path, tokenizer, dtype):
    values = dict(initialized(SMALL["gla"]).state_dict())
    whole, largest = sum(t.nbytes for t in values.values()), max(t.nbytes for t in values.values())
    file_bytes = whole // 5
    counting = Counting(values)
    export(counting, SMALL["gla"], tokenizer, tmp_path / "e", dtype, file_bytes)
    assert sorted(counting.asked) == sorted(values), "each is read once"
    # converted, a tensor goes at once; unconverted, it stays until its file is written
    assert counting.most <= (file_bytes + largest if dtype == torch.float32 else largest)
    assert counting.alive == 0
    files = sorted((tmp_path / "e").glob("*.safetensors"))
    assert len(files) >= 3
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(written[name], values[name].to(dtype)) for name in values)


def test_values_too_large_for_float16_are_refused(tmp_path, tokenizer):
    state = dict(initialized(SMALL["gla"]).state_dict())
    export(state, SMALL["gla"], tokenizer, tmp_path / "e", torch.float16)
    assert {p.dtype for p in load_exported(tmp_path / "e").parameters()} == {torch.float16}
    state["lm_head.weight"] = state["lm_head.weight"] * 1e7
    with pytest.raises(ModelError, match=r"lm_head\.weight: holds values too large for float16"):
        export(state, SMALL["gla"], tokenizer, tmp_path / "e", torch.float16)


def test_an_export_notes_its_step_and_takes_what_it_is_given(tmp_path, tokenizer):
    config, state = SMALL["gla"], dict(initialized(SMALL["gla"]).state_dict())
    (tmp_path / "own.jinja").write_text("mine")
    (tmp_path / "generation.json").write_text('{"top_k": 3}')
    given = {"generation_config": tmp_path / "generation.json", "chat_template": tmp_path / "own.jinja"}
    export(state, config, tokenizer, tmp_path / "e", torch.float32, step=7, **given)
    assert exported_step(tmp_path / "e") == 7
    assert (tmp_path / "e" / "chat_template.jinja").read_text() == "mine"
    assert json.loads((tmp_path / "e" / "generation_config.json").read_text()) == {"top_k": 3}
    export(state, config, tokenizer, tmp_path / "e", torch.float32)
    assert exported_step(tmp_path / "e") is None
    assert exported_step(tokenizer) is None
