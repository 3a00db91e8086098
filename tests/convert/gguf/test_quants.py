"""Every number format against the format's own package, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_specstream.convert.gguf.quants import FORMATS, UNREAD_FORMATS, Format, dequantize

ROWS = [pytest.param(row, id=row.name) for row in FORMATS.values()]


def q8_k_reference(raw: np.ndarray) -> np.ndarray:
    """A block at a time, a value at a time: the one format the package does not dequantise."""
    values = []
    for block in raw.reshape(-1, 292):
        scale = np.frombuffer(block[:4].tobytes(), "<f4")[0]
        values.extend(scale * np.float32(value) for value in block[4:260].view(np.int8))
    return np.array(values, np.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("row", ROWS)
def test_random_bytes_agree_with_the_gguf_package(row: Format) -> None:
    gguf = pytest.importorskip("gguf")
    raw = np.random.default_rng(row.code).integers(0, 256, row.block_bytes * 64, dtype=np.uint8)
    kind = gguf.GGMLQuantizationType(row.code)
    assert gguf.GGML_QUANT_SIZES[kind] == (row.block_values, row.block_bytes)
    assert kind.name == row.name
    ours = dequantize(raw, row, (4, -1))
    if row.name == "Q8_K":
        theirs = q8_k_reference(raw)
    else:
        theirs = gguf.quants.dequantize(raw.reshape(4, -1), kind)
    np.testing.assert_array_equal(ours.reshape(-1), theirs.reshape(-1))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_numbers_come_back(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    row = next(row for row in FORMATS.values() if row.name == name)
    values = np.random.default_rng(1).normal(size=(48, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType(row.code))
    raw = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    back = dequantize(raw, row, values.shape)
    tolerance = {"Q4_0": 0.5, "Q4_1": 0.25, "Q5_0": 0.25, "Q5_1": 0.12}.get(name, 0.03)
    np.testing.assert_allclose(back, values, atol=tolerance)
    np.testing.assert_array_equal(
        back, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(row.code))
    )


def test_a_block_of_q4_1_by_hand() -> None:
    row = next(row for row in FORMATS.values() if row.name == "Q4_1")
    block = np.concatenate(
        [np.array([0.5, -2], "<f2").view(np.uint8), np.arange(16, dtype=np.uint8) * 16 + 3]
    )
    values = dequantize(block, row, (32,))
    np.testing.assert_array_equal(values[:16], np.full(16, 3 * 0.5 - 2))
    np.testing.assert_array_equal(values[16:], np.arange(16) * 0.5 - 2)


def test_large_tensors_are_decoded_in_chunks() -> None:
    row = next(row for row in FORMATS.values() if row.name == "F32")
    values = np.arange((1 << 20) + 7, dtype=np.float32)
    np.testing.assert_array_equal(dequantize(values.view(np.uint8), row, values.shape), values)


def test_every_name_is_known_once() -> None:
    assert not set(FORMATS) & set(UNREAD_FORMATS)
    gguf = pytest.importorskip("gguf")
    codes = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for code, name in UNREAD_FORMATS.items():
        assert codes.get(code, name) == name
