"""What the framework has to know of a kind of model. A family is a record; `families/` holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from flame.models.flops import FlopCount
from flame.models.tensor_plan import TensorPlan

Block = tuple[str, nn.Module]


class Hidden(Protocol):
    """The final-normed hidden states before the head, [b, L, d], of tokens int64 [b, L].

    positions: int64 [b, L], restarting in each segment; cu_seqlens: int32 [segments + 1] over the
    flattened b * L; longest_segment: in tokens.
    """

    def __call__(
        self, model: nn.Module, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, longest_segment: int
    ) -> Tensor: ...


@dataclass(frozen=True)
class Carried:
    """What blocks read beside the hidden states, and so travels from stage to stage with them."""

    name: str  # a keyword of the blocks, which return it as well; or a parameter, by its full name
    shape: Callable[[Any, int, int], tuple[int, ...]]  # of a config, rows and tokens a row
    parameter: bool = False  # the first stage holds it


@dataclass(frozen=True)
class StagePlan:
    """How a model runs in stages of blocks: each stage runs the whole model's own code, in which others'
    blocks pass their input on and others' modules are empty."""

    norm: str  # the final norm's name
    passed: Callable[[Tensor, dict[str, Any]], Any]  # what a block returns that only passes its input on
    added: tuple[str, ...] = ()  # modules whose results are added to the embedding: the first stage's
    carried: Carried | None = None


Initialize = Callable[[Any, str, nn.Module], None]  # (model, module's full name, module)


def own_rule(model: Any, name: str, module: nn.Module) -> None:
    """The initialisation that transformers would run."""
    model._init_weights(module)


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """How rows of a family can lie on several ranks (`parallel/context.py`).

    Each layer that mixes tokens either exchanges them for heads, where the ranks divide these, or hands its
    state on (attention: keys and values).
    """

    heads: Callable[[Any], dict[str, int]]  # of a config: the settings that count heads, and how many
    hands_on: bool = True  # False: its own mixer cannot, and the first of `heads` has to divide
    refuses: Callable[[Any], str | None] = lambda config: None  # why a config's rows have to stay whole


@dataclass(frozen=True)
class Family:
    """One kind of model. Functions of a model work on meta, sharded and materialised ones alike.

    The tests run every check on every registered family, with `cached` and `gpu` telling which of two
    they expect; `flame models` prints the same records.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json
    packing: Literal["flat", "rows"]  # the model runs on [1, b * L] with cu_seqlens, or on [b, L]
    hidden: Hidden
    count: Callable[[nn.Module], FlopCount]  # FLOPs of a built model
    compiles: bool  # torch.compile of each block is known to help
    refuses: Callable[[Any], str | None]  # why this config cannot be trained truly, or None
    initialize: Initialize = own_rule
    layers: str = "model.layers"
    embedding_name: str = "model.embeddings"
    head_name: str = "lm_head"
    undecayed: tuple[str, ...] = ()  # last names of matrices that are no weights of a product
    settings: tuple[tuple[str, Any], ...] = ()  # of the config, in training
    attention: str | None = None  # the attention implementation, for models that take it from transformers
    source: Literal["fla", "transformers", "a file"] = "fla"
    make: Callable[[Any], nn.Module] | None = None  # builds on meta; None: through transformers
    cached: bool = True  # token by token with a cache it gives what it gives in parallel
    tensor: TensorPlan | None = None  # how its blocks' matrices can lie on several ranks
    context: ContextPlan | None = None  # how its rows can lie on several ranks, if they can
    pipeline: StagePlan | None = None  # how its blocks lie on several ranks; None: they cannot
    gpu: bool = False  # has been run on a GPU, with its kernels, against the same checks

    def build(self, config: PretrainedConfig) -> nn.Module:
        """The model of `config` on the meta device, in float32; `config` stays as it is."""
        # here: this file says what a family is, and is read by processes that may not touch a GPU (fla does)
        from flame.models import cpu
        from flame.models.zoo import quiet

        if not torch.cuda.is_available():
            cpu.install()
        if self.make is not None:
            return self.make(config)
        config = copy.deepcopy(config)
        for name, value in self.settings:
            setattr(config, name, value)
        make: Any = AutoModelForCausalLM.from_config
        options = {"attn_implementation": self.attention} if self.attention else {}
        with torch.device("meta"), quiet():
            return make(config, dtype=torch.float32, **options)

    def flops(self, config: PretrainedConfig) -> FlopCount:
        """FLOPs of training the model of `config`."""
        return self.count(self.build(config))

    def blocks(self, model: nn.Module) -> list[Block]:
        """The repeated layers, in order, by fully qualified name."""
        if self.make is not None and not isinstance(getattr(model, self.layers, None), nn.ModuleList):
            return []  # an own model need not say what its blocks are
        stack = cast("nn.ModuleList", model.get_submodule(self.layers))
        return [(f"{self.layers}.{name}", block) for name, block in stack.named_children()]

    def embedding(self, model: nn.Module) -> nn.Embedding:
        """The token embedding."""
        return cast("nn.Embedding", model.get_submodule(self.embedding_name))

    def head(self, model: nn.Module) -> nn.Linear:
        """The layer from hidden states to logits."""
        return cast("nn.Linear", model.get_submodule(self.head_name))

    def no_weight_decay(self, model: nn.Module) -> set[str]:
        """Names of the parameters without weight decay: biases, norms and all others that are vectors
        ([1, 1, D] too), those marked `_no_weight_decay`, and those named in `undecayed`. Embeddings decay."""
        return {
            name
            for name, p in model.named_parameters()
            if sum(size > 1 for size in p.shape) < 2
            or getattr(p, "_no_weight_decay", False)
            or name.rpartition(".")[2] in self.undecayed
        }

    def embeddings(self, model: nn.Module) -> set[str]:
        """Names of the parameters of embeddings, of tokens or positions; a tied head is one."""
        found = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return {name for name, p in model.named_parameters() if id(p) in found}

    def matrices(self, model: nn.Module) -> set[str]:
        """Names of the blocks' matrices, whose products with the states they are for. What a layer keeps in
        one parameter, such as queries, keys and values, is one matrix."""
        inside = tuple(f"{name}." for name, _ in self.blocks(model))
        others = self.no_weight_decay(model) | self.embeddings(model)
        found = {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(inside)}
        return found - others
