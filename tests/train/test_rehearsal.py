"""The thinned model and the made-up batch on which kernels are prepared."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models.small_models import SMALL
from small_recipes import MODELS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flame.batch import IGNORED
from flame.models.build import build_on_meta
from flame.models.registry import family_of
from flame.train.rehearsal import forward_backward, made_up_batch, small_model, thin

CPU = torch.device("cpu")


def config_of(name: str, **changes: object):
    values = {**MODELS[name], **changes}
    return CONFIG_MAPPING[values.pop("model_type")].from_dict(values)


def test_one_layer_of_each_kind_is_left() -> None:
    attention = {"layers": [2, 4], "num_heads": 2, "num_kv_heads": 2, "window_size": None}
    config = config_of("gla", num_hidden_layers=6, attn=attention)
    family = family_of(config)
    model = thin(build_on_meta(config), family)
    kinds = [type(block.get_submodule("attn")).__name__ for _, block in family.blocks(model)]
    assert kinds == ["GatedLinearAttention", "Attention"]


def test_a_thinned_model_trains_on_a_made_up_batch() -> None:
    config = config_of("gla", num_hidden_layers=12)
    family = family_of(config)
    model, shards = small_model(config, family, torch.float32, CPU, compile_blocks=False)
    loss = forward_backward(model, made_up_batch(2, 64, 40, config.vocab_size, CPU))
    assert 0 < loss < 128 * 12
    assert all(piece.parameter.grad is None for piece in shards.pieces)


@pytest.mark.parametrize("name", ["gla", "mamba2", "hgrn2", "retnet", "rwkv7", "phi3", "gpt2", "llama-tied"])
def test_a_thinned_model_has_the_shapes_of_one_of_several_tensor_ranks(name: str) -> None:
    config = SMALL[name]
    family = family_of(config)
    _, undivided = small_model(config, family, torch.float32, CPU, compile_blocks=False)
    model, shards = small_model(config, family, torch.float32, CPU, compile_blocks=False, tensor_ranks=2)
    whole, part = (sum(piece.local.numel() for piece in s.pieces) for s in (undivided, shards))
    assert whole / 2 < part < 0.7 * whole
    assert 0 < forward_backward(model, made_up_batch(2, 64, 40, config.vocab_size, CPU)) < 128 * 12


def test_the_random_numbers_of_training_are_left_as_they_were() -> None:
    config = config_of("gla")
    before = torch.get_rng_state()
    small_model(config, family_of(config), torch.float32, CPU, compile_blocks=False)
    made_up_batch(2, 64, 40, 99, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_made_up_batch_is_packed_as_training_packs() -> None:
    for seed in range(9):
        batch = made_up_batch(3, 512, 300, 99, CPU, seed)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 3 * 512
        assert {512, 1024} <= set(bounds), "no document crosses a row's end"
        assert batch.longest_segment == max(b - a for a, b in pairwise(bounds)) == 300
        labels, positions = batch.labels.flatten(), batch.positions.flatten()
        assert [i + 1 for i in range(1536) if labels[i] == IGNORED] == bounds[1:]
        assert [i for i in range(1536) if positions[i] == 0] == bounds[:-1]
