"""flame: a light training framework for language models, on PyTorch's own distributed engine."""

__version__ = "0.1.0"
