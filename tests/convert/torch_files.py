"""PyTorch's files, written without PyTorch: what `torch.save` writes for tensors and what is beside them."""

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage"}


class Call:
    """Pickles as the call of a name, which need not exist here; `state` as its BUILD."""

    def __init__(self, name, arguments=(), state=None):
        self.name, self.arguments, self.state = name, tuple(arguments), state


class _Pickler(pickle._Pickler):
    """Write arrays as torch does, calls by their names; keeps the storages."""

    def __init__(self, out):
        super().__init__(out, 2)
        self.storages = []

    def save(self, value, save_persistent_id=True):
        if isinstance(value, np.ndarray):
            self.storages.append(np.array(value, order="C"))
            kind, key = Call("torch." + STORAGES[value.dtype.str[1:]]), str(len(self.storages) - 1)
            strides = tuple(step // value.itemsize for step in self.storages[-1].strides)
            storage = Call("", ("storage", kind, key, "cpu", value.size))
            rest = (0, value.shape, strides, False, OrderedDict())
            value = Call("torch._utils._rebuild_tensor_v2", (storage, *rest))
        if not isinstance(value, Call):
            super().save(value, save_persistent_id)
            return
        if value.name:
            module, _, name = value.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        if value.arguments or value.state is not None:
            super().save(value.arguments)
            self.write(pickle.REDUCE if value.name else pickle.BINPERSID)
        if value.state is not None:
            super().save(value.state)
            self.write(pickle.BUILD)


def save(value, path: Path, *, legacy: bool = False) -> Path:
    """Write `value`, a dict with arrays in it, in the zip or the legacy format."""
    with path.with_suffix(".pkl").open("w+b") as out:
        pickler = _Pickler(out)
        pickler.dump(value)
        out.seek(0)
        program = out.read()
    path.with_suffix(".pkl").unlink()
    arrays = pickler.storages
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/byteorder", b"little")
            for key, array in enumerate(arrays):
                archive.writestr(f"archive/data/{key}", array.tobytes())
        return path
    system = {"protocol_version": VERSION, "little_endian": True}
    parts = [pickle.dumps(each, 2) for each in (MAGIC, VERSION, system)]
    parts += [program, pickle.dumps([str(key) for key in range(len(arrays))], 2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in arrays]
    path.write_bytes(b"".join(parts))
    return path
