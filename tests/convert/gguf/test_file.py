"""The container: what a good file holds, and one clear sentence for every bad one."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_specstream.convert.gguf import open_gguf
from mlx_specstream.convert.gguf.folder import write_model_folder
from mlx_specstream.errors import CheckpointError
from tests.convert.gguf import made

ARRAYS = {
    "one": np.arange(6, dtype=np.float32).reshape(2, 3),
    "two": np.linspace(-1, 1, 32, dtype=np.float32),
}
METADATA = {
    "general.architecture": made.text("llama"),
    "a.flag": made.flag(True),
    "a.number": made.u32(7),
    "a.float": made.f32(0.5),
    "a.long": made.Typed(10, 1 << 40),
    "a.double": made.Typed(12, -2.25),
    "some.words": made.texts(["x", "", "ünï 😀"]),
    "some.numbers": made.i32s([-1, 2, 3]),
}
GOOD = made.gguf_bytes(METADATA, {name: made.stored(array) for name, array in ARRAYS.items()})


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def complaint(tmp_path: Path, data: bytes) -> str:
    """Open a bad file and return what is said; one line, with the file's name."""
    path = written(tmp_path, data)
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "model.gguf" in message
    return message


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_file_is_read(tmp_path: Path, version: int) -> None:
    data = GOOD[:4] + struct.pack("<I", version) + GOOD[8:]
    gguf = open_gguf(written(tmp_path, data))
    assert gguf.version == version
    assert gguf.metadata == {
        "general.architecture": "llama",
        "a.flag": True,
        "a.number": 7,
        "a.float": 0.5,
        "a.long": 1 << 40,
        "a.double": -2.25,
        "some.words": ["x", "", "ünï 😀"],
        "some.numbers": [-1, 2, 3],
    }
    for name, array in ARRAYS.items():
        assert gguf.tensors[name].shape == array.shape
        np.testing.assert_array_equal(gguf.read(name), array)


def test_another_alignment(tmp_path: Path) -> None:
    tensors = {name: made.stored(array) for name, array in ARRAYS.items()}
    data = made.gguf_bytes({"general.alignment": made.u32(256)}, tensors, alignment=256)
    gguf = open_gguf(written(tmp_path, data))
    np.testing.assert_array_equal(gguf.read("two"), ARRAYS["two"])


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    path = made.write_tiny_gguf(tmp_path / "tiny.gguf")
    ours, theirs = open_gguf(path), package.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        np.testing.assert_array_equal(ours.read(tensor.name).reshape(-1), tensor.data.reshape(-1))
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 8, 15, 16, 23, *range(24, len(GOOD), 13)])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    complaint(tmp_path, GOOD[:length])


@given(st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    complaint(tmp_path_factory.mktemp("noise"), b"GGUF\x03\0\0\0" + noise[:1] + noise)


_SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "head_dim": 2}
_TENSORS = made.tiny_tensors("llama", **_SMALL)
_TINY = made.gguf_bytes(made.tiny_metadata("llama", **_SMALL), _TENSORS)
_NUM_DATA_BYTES = sum(-(-len(tensor.raw) // 32) * 32 for tensor in _TENSORS.values())
TINY_HEAD, TINY_DATA = _TINY[:-_NUM_DATA_BYTES], _TINY[-_NUM_DATA_BYTES:]


@given(st.data())
def test_flipped_bytes_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A flipped byte may still make a valid file; what counts is that nothing else than our error comes out."""
    broken = bytearray(TINY_HEAD + TINY_DATA)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(TINY_HEAD) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("flipped")
    with suppress(CheckpointError):
        write_model_folder(open_gguf(written(folder, bytes(broken))), folder)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="is not a file"):
        open_gguf(tmp_path / "absent.gguf")


def test_another_kind_of_file(tmp_path: Path) -> None:
    assert "not a GGUF file" in complaint(tmp_path, b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize(
    ("version", "said"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_other_versions(tmp_path: Path, version: int, said: str) -> None:
    assert said in complaint(tmp_path, GOOD[:4] + struct.pack("<I", version) + GOOD[8:])


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [10_000, 1 << 32, 1 << 62, (1 << 64) - 1])
def test_absurd_counts_cost_nothing(tmp_path: Path, at: int, count: int) -> None:
    tracemalloc.start()
    said = complaint(tmp_path, GOOD[:at] + struct.pack("<Q", count) + GOOD[at + 8 :])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(count) in said
    assert peak < 1 << 20


@pytest.mark.parametrize("length", [1 << 17, 1 << 40, (1 << 64) - 1])
def test_absurd_string_lengths(tmp_path: Path, length: int) -> None:
    assert "claims" in complaint(tmp_path, GOOD[:24] + struct.pack("<Q", length) + GOOD[32:])


def one_pair(kind: int, raw: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", kind) + raw


@pytest.mark.parametrize("item_kind", [0, 4, 7, 8, 9, 12])
def test_absurd_lists(tmp_path: Path, item_kind: int) -> None:
    raw = struct.pack("<IQ", item_kind, 1 << 60) + bytes(100)
    assert str(1 << 60) in complaint(tmp_path, one_pair(9, raw))


def test_lists_in_lists_end(tmp_path: Path) -> None:
    raw = struct.pack("<IQ", 9, 1) * 50 + bytes(50)
    assert "nests too deep" in complaint(tmp_path, one_pair(9, raw))


def test_unknown_type(tmp_path: Path) -> None:
    assert "unknown type 13" in complaint(tmp_path, one_pair(13, bytes(50)))


def test_text_that_is_none(tmp_path: Path) -> None:
    raw = struct.pack("<Q", 2) + b"\xff\xfe" + bytes(20)
    assert "not UTF-8" in complaint(tmp_path, one_pair(8, raw))


@pytest.mark.parametrize("alignment", [0, 3, 48, 1 << 30])
def test_bad_alignment(tmp_path: Path, alignment: int) -> None:
    data = made.gguf_bytes({"general.alignment": made.u32(alignment)}, {})
    assert "power of two" in complaint(tmp_path, data)


def test_part_of_a_split(tmp_path: Path) -> None:
    data = made.gguf_bytes({"split.count": made.u32(3)}, {})
    assert "merge them first" in complaint(tmp_path, data)


def tensor_row(shape: tuple[int, ...], code: int = 0, offset: int = 0, count: int = 1) -> bytes:
    row = struct.pack("<Q", 1) + b"t" + struct.pack("<I", len(shape))
    row += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", code, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, count, 0) + row * count + bytes(256)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tensor_row(()), "0 dimensions"),
        (tensor_row((1,) * 9), "9 dimensions"),
        (tensor_row((0,)), "impossible shape"),
        (tensor_row((1 << 63, 1 << 63)), "impossible shape"),
        (tensor_row((33,), code=8), "impossible shape"),
        (tensor_row((1 << 40,)), "behind the end"),
        (tensor_row((4,), offset=1 << 62), "behind the end"),
        (tensor_row((4,), offset=5), "not a multiple"),
        (tensor_row((4,), code=20), "IQ4_NL"),
        (tensor_row((4,), code=777), "777"),
        (tensor_row((4,), count=2), "comes twice"),
    ],
)
def test_bad_tensors(tmp_path: Path, data: bytes, said: str) -> None:
    assert said in complaint(tmp_path, data)


def test_overlapping_tensors(tmp_path: Path) -> None:
    data = made.gguf_bytes(
        {}, {"a": made.Stored(0, (16,), bytes(32)), "b": made.Stored(0, (4,), bytes(16))}
    )
    assert "overlap" in complaint(tmp_path, data)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda gguf: gguf.integer("a.float"), "should be a whole number"),
        (lambda gguf: gguf.integer("a.flag"), "should be a whole number"),
        (lambda gguf: gguf.text("a.number"), "should be a string"),
        (lambda gguf: gguf.number("nowhere"), "no nowhere"),
        (lambda gguf: gguf.flag("a.number", False), "true or false"),
        (lambda gguf: gguf.items("some.numbers", str), "list of str"),
    ],
)
def test_metadata_of_another_type(tmp_path: Path, call, said: str) -> None:
    gguf = open_gguf(written(tmp_path, GOOD))
    with pytest.raises(CheckpointError, match=said):
        call(gguf)
