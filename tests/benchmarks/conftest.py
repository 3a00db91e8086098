"""The studies' tests use the benchmark's model."""

from __future__ import annotations

from tests.bench.conftest import bench_model

__all__ = ["bench_model"]
