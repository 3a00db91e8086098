"""Small files that ask for much: refused in a sentence within seconds and a fixed address space."""

import json
import resource
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.convert import torch_files

SECONDS, EXTRA_BYTES = 300, 1 << 30  # by the clock, on a busy machine; of the CPU's time see below
READ = f"""
import resource, sys, time
from pathlib import Path
from mlx_specstream.convert.reader import open_checkpoint
from mlx_specstream.convert.gguf import open_gguf
from mlx_specstream.errors import CheckpointError
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {EXTRA_BYTES},) * 2)
try:
    open_checkpoint(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
else:
    print("read")
"""
MIB = 1 << 20


def sizes(what):
    """A list of 100,000 that every four bytes turn into a new tuple or dict, 2 MB in all."""
    items = (
        b"]q\x00("
        + (b"]q\x01(K\x01K\x01eh\x01" if "Ordered" in what else b"K\x01") * 100_000
        + b"e"
    )
    name = b"c" + what.encode().replace(b".", b"\n") + b"\nq\x02"
    return b"\x80\x02" + name + items + b"h\x00\x85q\x03" + b"h\x02h\x03R" * 350_000 + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def twice(inner):
    """Two wrappers with weights of two names, and something alike before each."""
    storage = (
        b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\2tQ"
    )
    weight = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\2\x85K\1\x85\x89NtR"

    def one(name):
        return b"}(" + text(b"beside") + inner + text(name) + weight + b"u"

    return b"\x80\2}(" + text(b"model") + one(b"v") + text(b"state_dict") + one(b"w") + b"u."


def reference(place):
    return b"j" + struct.pack("<I", place)


def kept(place):
    return b"r" + struct.pack("<I", place)


def name(value):
    module, _, last = value.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


STORAGE = (
    b"(" + text(b"storage") + name("torch.FloatStorage") + text(b"0") + text(b"cpu") + b"K\2tQ"
)
TENSOR = name("torch._utils._rebuild_tensor_v2") + b"(" + STORAGE + b"K\0K\2\x85K\1\x85\x89NtR"
WRAPPERS = (b"state_dict", b"model_state_dict", b"model", b"module", b"net")


def alike(count):
    """Numbers that all have the hash 0, or would if they were compared by it."""
    prime = (1 << 61) - 1
    numbers = [(k * prime).to_bytes(11, "little") for k in range(1, count)]
    return b"".join(b"\x8a\x0b" + number + b"N" for number in numbers)


def entries(count, value):
    return b"}(" + b"".join(b"\x8c\6%06d" % k + value for k in range(count)) + b"u"


def nested(inner):
    """Each dictionary under five names in the next: 625 ways to the innermost."""
    parts = [b"\x80\4", inner, kept(10)]
    for level in range(10, 14):
        rows = (b"\x8c" + bytes([len(each)]) + each + reference(level) for each in WRAPPERS)
        parts += [b"}(", *rows, b"u", kept(level + 1)]
    return b"".join([*parts, b"."])


def called(function, arguments, count):
    """One call with the same arguments again and again."""
    call = reference(1) + reference(2) + b"R"
    return b"\x80\4" + function + kept(1) + arguments + kept(2) + b"(" + call * count + b"t."


LONG_KEY = b"(" + text(b"storage") + name("torch.FloatStorage") + b"\x8a\xff" + b"\x7f" * 255
LONG_NAME = (
    b"\x80\4(" + text(b"transformers") + b"r\1\0\0\0" + text(b"A" * (8 * MIB)) + b"r\2\0\0\0"
)
PROGRAMS = {
    "a number of megabytes as a key": b"\x80\2(\x8b" + struct.pack("<i", 8 * MIB)
    + b"\x7f" * (8 * MIB) + b"r\1\0\0\0}(" + b"j\1\0\0\0N" * 300_000 + b"ut.",
    "a name of megabytes": LONG_NAME + b"j\1\0\0\0j\2\0\0\0\x93" * 300_000 + b"t.",
    "objects of a name of megabytes": LONG_NAME + b"j\1\0\0\0j\2\0\0\0\x93r\3\0\0\0"
    + b"j\3\0\0\0)R" * 300_000 + b"t.",
    "tuples of pairs, compared": twice(b"N" + b"q\5h\5\x86" * 60),
    "deep tuples, compared": twice(b")" + b"\x85" * 500_000),
    "tuples of a memoised list": sizes("torch.Size"),
    "dictionaries of a memoised list": sizes("collections.OrderedDict"),
    "counters of a dictionary": b"\x80\x02}q\x00("
    + b"".join(struct.pack("<ci", b"J", i) + b"N" for i in range(200_000)) + b"u"
    + b"ccollections\nCounter\nq\x02h\x00\x85q\x03" + b"h\x02h\x03R" * 100_000 + b".",
    "a flood of dictionaries": b"\x80\x02" + b"}" * (40 * MIB) + b".",
    "a flood of lists": b"\x80\x02" + b"]" * (40 * MIB) + b".",
    "a flood of marks": b"\x80\x02" + b"(" * (40 * MIB) + b".",
    "a flood of memo entries": b"\x80\x04" + b"N\x94" * (10 * MIB) + b".",
    "a list in lists, told in an error": b"\x80\x02]q\x00K\x01a" + b"]h\x00ah\x00aq\x00" * 200 + b"h\x00Q.",
    "a name made of lists": b"\x80\x04]q\x00K\x01a" + b"]h\x00ah\x00aq\x00" * 200 + b"h\x00h\x00\x93.",
    "numbers of one hash as keys": b"\x80\2}(" + alike(130_000) + b"u.",
    "wrappers in wrappers": nested(entries(200_000, b"N")),
    "wrappers in wrappers, with weights": nested(TENSOR + kept(1) + entries(150_000, reference(1))),
    "a list in every entry": b"\x80\4" + TENSOR + kept(1) + b"](" + b"N" * 900_000 + b"e" + kept(2)
    + b"}(" + b"".join(b"\x8c\6%06d" % k + reference(2) for k in range(90_000))
    + b"\x8c\1w" + reference(1) + b"u.",
    "a list in every entry, no weights": b"\x80\4](" + b"N" * 900_000 + b"e" + kept(2)
    + b"}(" + b"".join(b"\x8c\6%06d" % k + reference(2) for k in range(90_000)) + b"u.",
    "calls of a million arguments": called(name("argparse.Namespace"), b"(" + b"N" * 900_000 + b"t", 90_000),
    "calls of a long name": called(name("transformers." + "A" * 980), b")", 180_000),
    "storages of a long number": b"\x80\2(" + LONG_KEY + text(b"cpu") + b"K\2t" + kept(1)
    + (reference(1) + b"Q") * 330_000 + b"t.",
    "a string longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x",
}  # fmt: skip


def zipped(program):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", program)
            archive.writestr("a/data/0", bytes(8))

    return write


def directory(path):
    """400,000 entries of a zip directory and nothing else."""
    entry = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, *[0] * 7, 90, *[0] * 6)
    entries = b"".join(entry + b"%090d" % number for number in range(400_000))
    end = b"PK\x06\x06" + struct.pack(
        "<QHHIIQQQQ", 44, 45, 45, 0, 0, 400_000, 400_000, len(entries), 0
    )
    end += b"PK\x06\x07" + struct.pack("<IQI", 0, len(entries), 1)
    path.write_bytes(
        entries
        + end
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, *[0xFFFF] * 2, *[(1 << 32) - 1] * 2, 0)
    )


def header(path):
    text = b'{"a":[' + b"{}," * (10 * MIB) + b"{}]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def config(path):
    torch_files.save({"a": np.ones(2)}, path)
    (path.parent / "config.json").write_bytes(b'{"a":[' + b"[]," * (20 * MIB) + b"[]]}")


def metadata(path):
    """A list of 100 million numbers, two bytes each in the file and 36 in memory."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a")
        file.write(struct.pack("<IIQ", 9, 3, 100_000_000))
        file.write(b"\x39\x30" * 100_000_000)


BOMBS = {
    **{name: ("x.bin", zipped(program)) for name, program in PROGRAMS.items()},
    **{f"{name}, legacy": ("x.bin", lambda path, p=p: path.write_bytes(p)) for name, p in PROGRAMS.items()},
    "a zip directory": ("x.bin", directory),
    "a safetensors header": ("x.safetensors", header),
    "a config": ("x.bin", config),
    "GGUF metadata": ("x.gguf", metadata),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="measures its address space in /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_what_it_costs_to_refuse_is_bounded(tmp_path, name):
    file, write = BOMBS[name]
    write(tmp_path / file)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / file)],
        capture_output=True, text=True, timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (30, 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert len(done.stdout.strip().splitlines()) == 1
    if name.endswith("compared"):
        assert "different weights" in done.stdout
    if "flood" in name or "memoised" in name or "counters" in name:
        assert "damaged" not in done.stdout, done.stdout


def test_a_shortage_of_memory_is_not_called_damage(tmp_path, monkeypatch):
    from mlx_specstream.convert import torchfile
    from mlx_specstream.errors import CheckpointError

    zipped(b"\x80\x02}.")(tmp_path / "x.bin")

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(torchfile, "unpickle", exhausted)
    with pytest.raises(CheckpointError, match="not enough memory"):
        torchfile.read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "name", ["config.json", "x.bin", "x.safetensors", "model.safetensors.index.json"]
)
def test_pipes_are_refused_instead_of_waited_for(tmp_path, name):
    import os

    from mlx_specstream.convert.reader import open_checkpoint
    from mlx_specstream.errors import CheckpointError

    torch_files.save({"a": np.ones(2)}, tmp_path / "y.bin")
    os.mkfifo(tmp_path / name)
    path = tmp_path if name.endswith(".json") else tmp_path / name
    with pytest.raises(CheckpointError, match="not a file but a pipe"):
        open_checkpoint(path)


def test_a_large_state_dict_is_within_the_budget(tmp_path):
    """50,000 tensors of one storage: what is legitimate stays far from the bounds."""
    from mlx_specstream.convert.torchfile import read_torch_file

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQq\x01"
    parts = [b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00" + storage + b"}q\x02("]
    for number in range(50_000):
        key = f"model.layers.{number}.self_attn.q_proj.weight".encode()
        parts.append(b"X" + struct.pack("<I", len(key)) + key)
        parts.append(b"h\x00(h\x01K\x00(K\x01t(K\x01t\x89ccollections\nOrderedDict\n)RtR")
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"".join([*parts, b"u."]))
        archive.writestr("a/data/0", b"\0\0\x80\x3f")
    assert len(read_torch_file(tmp_path / "x.bin")) == 50_000


def test_json_may_hold_as_much_as_a_large_index(tmp_path):
    from mlx_specstream.convert.reader import read_json

    names = {
        f"model.layers.{n}.mlp.experts.{n}.up_proj.weight": "model.safetensors"
        for n in range(100_000)
    }
    (tmp_path / "x.json").write_text(json.dumps({"weight_map": names}))
    assert len(read_json(tmp_path / "x.json")["weight_map"]) == 100_000
