"""The device of a test: the GPU for those marked `mac`, the CPU for the same test as a smoke."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.mac), "cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on this device; on the CPU it shows only that the test itself works."""
    name: str = request.param
    if name == "gpu" and not mx.metal.is_available():
        pytest.skip("needs a Mac with Apple silicon")
    before = mx.default_device()
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
    try:
        yield name
    finally:
        mx.set_default_device(before)
