"""torch.save's files are read without torch's unpickler, and never run."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_specstream.convert.torchfile import read_torch_file  # noqa: E402
from mlx_specstream.errors import CheckpointError  # noqa: E402


def example():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 6, generator=generator)
    state = OrderedDict(
        a=a,
        tied=a,
        transposed=torch.randn(4, 6, generator=generator).T,
        strided=torch.randn(100, generator=generator)[10:40:3],
        bf16=torch.randn(3, 3, generator=generator).bfloat16(),
        f16=torch.randn(3, generator=generator).half(),
        f64=torch.randn(2, generator=generator, dtype=torch.float64),
        i64=torch.arange(5),
        u8=torch.arange(4, dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        empty=torch.zeros(0, 4),
        scalar=torch.tensor(3.5),
        parameter=torch.nn.Parameter(torch.randn(3, generator=generator)),
    )
    state._metadata = {"": {"version": 1}}
    return state


def bits(tensor):
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_is_read_bit_for_bit(tmp_path, new, protocol):
    state, path = example(), tmp_path / "x.bin"
    torch.save(state, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    found = read_torch_file(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        value = found[name].read()
        assert value.shape == found[name].shape == tuple(tensor.shape)
        tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
        assert value.dtype == bits(tensor).dtype
        assert np.array_equal(value, bits(tensor))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_wrappers_of_trainers_are_opened(tmp_path, new):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    for key in ("state_dict", "model_state_dict", "model", "module"):
        wrapped = {key: module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
        torch.save(wrapped, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        assert set(read_torch_file(tmp_path / "x.pt")) == {"weight", "bias"}


class Payload:
    """Pickles as a call of something else."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(marker):
    return [
        Payload(os.system, f"touch {marker}"),
        Payload(subprocess.check_call, ["touch", str(marker)]),
        Payload(eval, f"open({str(marker)!r}, 'w')"),
        Payload(exec, f"open({str(marker)!r}, 'w')"),
        Payload(Path.touch, Path(marker)),
        Payload(getattr, "x", "upper"),
    ]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("index", range(6))
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, new, index):
    marker, path = tmp_path / "ran", tmp_path / "x.bin"
    for state in (
        {"a": torch.ones(2), "b": payloads(marker)[index]},
        {payloads(marker)[index].call[0].__name__: torch.ones(2), "x": [payloads(marker)[index]]},
    ):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        with pytest.raises(CheckpointError, match=r"is refused: it mentions '[\w.]+'"):
            read_torch_file(path)
    assert not marker.exists()


def test_a_malicious_pickle_does_not_run_where_torch_is_missing(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.bin"
    torch.save({"a": torch.ones(2), "b": Payload(os.system, f"touch {marker}")}, path)
    torch.save({"a": torch.ones(2)}, tmp_path / "good.bin")
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from mlx_specstream.convert.torchfile import read_torch_file
from mlx_specstream.errors import CheckpointError
assert read_torch_file(Path({str(tmp_path / "good.bin")!r}))["a"].read().tolist() == [1.0, 1.0]
try:
    read_torch_file(Path({str(path)!r}))
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "system" in result.stdout, result.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"a": np.ones(2)}, "numpy"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"a": {"b": torch.ones(2)}, "c": torch.ones(1)}, "'a' holds tensors in a container"),
        ({"x": 1}, "holds no tensors"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "TensorInfo"),
    ],
)
def test_what_is_not_a_state_dict_is_named(tmp_path, value, named):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """Write a torch zip again with its members changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize(
    ("change", "compression", "message"),
    [
        (lambda n, c: c, zipfile.ZIP_DEFLATED, "compressed"),
        (lambda n, c: None if n.endswith("data/0") else c, zipfile.ZIP_STORED, "missing"),
        (lambda n, c: c[:-4] if n.endswith("data/0") else c, zipfile.ZIP_STORED, "too short"),
        (lambda n, c: b"big" if n.endswith("byteorder") else c, zipfile.ZIP_STORED, "big-endian"),
        (lambda n, c: None if n.endswith("data.pkl") else c, zipfile.ZIP_STORED, "data.pkl"),
        (lambda n, c: bytes(65 << 20) if n.endswith("data.pkl") else c, 0, "more than any"),
    ],
)
def test_odd_archives_are_refused(tmp_path, change, compression, message):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(8)}, path)
    rezipped(path, change, compression)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


def program(*instructions):
    """Return a data.pkl for {'a': tensor} with the given size tuples spliced in."""
    return b"\x80\x02" + b"".join(instructions) + b"."


def tensor_program(numel, offset, shape, strides):
    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def sizes(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    storage += number(numel) + b"tQ"
    arguments = b"(" + storage + number(offset) + sizes(shape) + sizes(strides)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    return program(b"}X\x01\0\0\0a", b"ctorch._utils\n_rebuild_tensor_v2\n", arguments, b"Rs")


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides", "message"),
    [
        (8, 0, (8,), (1,), None),
        (8, 1, (8,), (1,), "leaves its storage"),
        (8, 0, (1 << 40,), (0,), "repeats 8 values"),
        (8, 0, (3,), (4,), "leaves its storage"),
        (8, 0, (2, 2), (1,), "is described|has the shape"),
        (8, 0, (-1,), (1,), "has the shape"),
        (8, -1, (1,), (1,), "without a storage"),
        (8, 0, (1,) * 9, (1,) * 9, "dimensions"),
        (1 << 61, 0, (8,), (1,), "too short"),
        (8, 0, (1 << 61, 1 << 61), (1, 1), "leaves its storage"),
    ],
)
def test_absurd_shapes_and_strides_are_refused(tmp_path, numel, offset, shape, strides, message):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(8)}, path)
    data = tensor_program(numel, offset, shape, strides)
    rezipped(path, lambda name, content: data if name.endswith("data.pkl") else content)
    if message is None:
        assert read_torch_file(path)["a"].read().tolist() == [1.0] * 8
        return
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(path)


@pytest.mark.parametrize(
    "data",
    [
        program(b"}" + b"(" * 1000),
        program(b"]q\x00h\x00a"),  # a list in itself
        program(b")q\x00" + b"h\x00\x86q\x00" * 5 + b"}h\x00h\x00s"),  # a tuple as a key
        program(b"r\xff\xff\xff\xff"),
        program(b"\x8b\xff\xff\xff\x7f" + b"1" * 100),
        program(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),
        program(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f"),
        program(b"I" + b"9" * 100_000 + b"\n"),
        program(b"cos\nsystem\n"),
        program(b"\x82\x01"),
        b"",
        b"\x80\x02",
        b".",
    ],
)
def test_hostile_programs_end_at_once(tmp_path, data):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(8)}, path)
    rezipped(path, lambda name, content: data if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError):
        read_torch_file(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + data)
    with pytest.raises(CheckpointError):
        read_torch_file(path)
