"""Tiny models, and the recipe that the tests train them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MODELS = {
    "gla": {
        "model_type": "gla",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "expand_k": 0.5,
        "expand_v": 1,
        "vocab_size": 384,
        "tie_word_embeddings": False,
        "fuse_cross_entropy": False,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "max_position_embeddings": 512,
    },
}

RECIPE = """
[run]
directory = "{run}"
seed = 7
steps = {steps}
[model]
config = "{model}"
[tokenizer]
path = "{tokenizer}"
[data]
sequence_length = 64
[[data.sources]]
name = "python"
files = "{text}"
[batch]
tokens_per_step = 768
[optimizer]
learning_rate = 3e-3
[schedule]
warmup = "5 steps"
[checkpoint]
every = "4 steps"
[logging]
tensorboard = false
"""

WriteRecipe = Callable[..., Path]
