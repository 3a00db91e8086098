"""Checkpoints in: what people have, turned into mlx-lm folders and stream weights."""
