import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models.small_models import SMALL, initialized
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from flame.errors import ModelError
from flame.models.build import build_on_meta, initialize
from flame.models.registry import families, family_of
from flame.models.zoo import fla_models, quiet

# seven heads, odd sizes: nothing divides by two or three
UNEVEN = fla_models.GatedDeltaNetConfig(
    hidden_size=35,
    num_heads=7,
    head_dim=5,
    expand_v=1,
    intermediate_size=41,
    num_hidden_layers=2,
    vocab_size=53,
)


def _tensors(model):
    return {k: v.detach() for k, v in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("name", SMALL)
def test_a_model_on_meta_holds_nothing_and_leaves_the_config_alone(name):
    config = SMALL[name]
    before = config.to_dict()
    model = build_on_meta(config)
    assert {t.device.type for t in _tensors(model).values()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.config.use_cache
    assert config.to_dict() == before


@pytest.mark.parametrize("name", SMALL)
def test_initial_weights_follow_the_models_own_distribution(name):
    config = SMALL[name]
    torch.manual_seed(3)
    with quiet():
        plain = _tensors(AutoModelForCausalLM.from_config(config))
    ours = _tensors(initialized(config))
    assert plain.keys() == ours.keys()
    for key, wanted in plain.items():
        got, size = ours[key], wanted.numel()
        assert got.shape == wanted.shape
        if torch.equal(got, wanted):
            continue  # a constant, or a function of the layer's place
        assert wanted.std() > 0, key
        assert not key.endswith("inv_freq")
        if key.endswith("A_log"):
            assert bool(((got.exp() > 0) & (got.exp() < 16)).all())
            assert len(set(got.tolist())) == size
        elif key.endswith("dt_bias"):
            step = nn.functional.softplus(got)
            assert bool(((step > 0.9e-4) & (step < 0.11)).all())
            assert len(set(got.tolist())) == size
        else:
            assert float(got.std() / wanted.std()) == pytest.approx(1, abs=6 / math.sqrt(size)), key
            difference = float(got.mean()) - float(wanted.mean())
            assert abs(difference) < 9 * float(wanted.std()) / math.sqrt(size), key


def test_the_seed_decides_and_equal_layers_differ():
    config = SMALL["gla"]
    first, again, other = (_tensors(initialized(config, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    matrices = [key for key in first if first[key].ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in matrices)
    key = "model.layers.{}.attn.q_proj.weight"
    assert not torch.equal(first[key.format(0)], first[key.format(1)])


def test_weights_do_not_depend_on_the_callers_generator_and_leave_it_alone():
    torch.manual_seed(1)
    first = _tensors(initialized(SMALL["gated_deltanet"]))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = _tensors(initialized(SMALL["gated_deltanet"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_stage_that_holds_some_blocks_gets_the_whole_models_values():
    config = SMALL["transformer"]
    whole = _tensors(initialized(config))
    stage = build_on_meta(config)
    del stage.model.layers[0], stage.model.embeddings
    stage.model.layers = nn.ModuleDict({"1": stage.model.layers[0]})
    initialize(stage, config, 1, "cpu")
    part = _tensors(stage)
    assert "model.layers.1.attn.q_proj.weight" in part
    assert all(torch.equal(value, whole[key]) for key, value in part.items())


def test_tied_weights_stay_one_parameter():
    model = initialized(SMALL["llama-tied"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bool(model.lm_head.weight.isfinite().all())


def test_a_parameter_that_nothing_sets_is_named(monkeypatch):
    config = SMALL["gla"]
    norm = type(build_on_meta(config).model.norm)
    monkeypatch.setattr(norm, "reset_parameters", lambda self: None)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.attn_norm\.weight.*unset"):
        initialized(config)


def test_a_model_of_another_config_is_refused():
    model = build_on_meta(SMALL["gla"])
    model.extra = nn.Linear(2, 2, device="meta")
    with pytest.raises(ModelError, match=r"extra\.weight"):
        initialize(model, SMALL["gla"], 1, "cpu")


# -------------------------------------------------------------------------------- sharded on gloo


def _shard(config, world):
    """The model on meta, sharded over the ranks; over four, FSDP 2 x tensor parallel 2."""
    model = build_on_meta(config)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        for _, block in family_of(config).blocks(model):
            columns = ("mlp.gate_proj", "mlp.up_proj")
            plan = {**dict.fromkeys(columns, ColwiseParallel()), "mlp.down_proj": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
        mesh = mesh["shard"]
    else:
        mesh = init_device_mesh("cpu", (world,))
    for _, block in family_of(config).blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _rank(rank, world, folder, config):
    store = dist.FileStore(os.path.join(folder, "store"), world)  # noqa: PTH118 - torch takes a str
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = _shard(config, world)
    initialize(model, config, 1, "cpu")
    full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in _tensors(model).items()}
    sharded = sum(isinstance(v, DTensor) for v in _tensors(model).values())
    tokens = torch.arange(40)[None] % config.vocab_size
    logits = None
    if world < 4:
        logits = model(input_ids=tokens, use_cache=False).logits.detach()
    torch.save((full, sharded, logits), os.path.join(folder, f"rank-{rank}.pt"))  # noqa: PTH118
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "world"),
    [(name, world) for name in ("uneven", "gla", "llama-tied", "llama") for world in (1, 2, 3, 4)]
    + [(family.name, 3) for family in families() if family.name not in ("gla", "llama")],
)
def test_sharded_initial_weights_equal_unsharded_ones_bit_for_bit(tmp_path, name, world):
    config = UNEVEN if name == "uneven" else SMALL[name]
    whole = initialized(config)
    arguments = (world, str(tmp_path), config)
    mp.start_processes(_rank, args=arguments, nprocs=world, start_method="fork")
    with torch.no_grad():
        wanted = whole(input_ids=torch.arange(40)[None] % config.vocab_size, use_cache=False).logits.detach()
    for rank in range(world):
        full, sharded, logits = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False)
        assert sharded == len(list(whole.parameters()))
        for key, value in _tensors(whole).items():
            assert torch.equal(full[key], value), key
        if logits is not None:
            torch.testing.assert_close(logits, wanted)
