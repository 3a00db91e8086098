"""Speculative Streaming on MLX: the same words in fewer passes of the model."""

__version__ = "0.1.0"
