"""A fast BLAS in the slow one's place: which is taken, that MLX then computes with it, and what is left alone."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_specstream.machine import REFERENCE_BLAS, blas

linux = pytest.mark.skipif(
    platform.system() != "Linux" or not blas.state.name, reason="for MLX's CPU build on Linux"
)
wheel = pytest.mark.skipif(
    importlib.util.find_spec("scipy_openblas32") is None, reason="needs the wheel of OpenBLAS"
)
pytestmark = linux

STATE = """
import json, numpy, mlx.core as mx
from mlx_specstream.machine import blas
a, b = numpy.random.default_rng(0).normal(size=(2, 64, 64)).astype("float32")
error = float(numpy.abs(numpy.array(mx.array(a) @ mx.array(b)) - a.astype("float64") @ b).max())
print(json.dumps({**vars(blas.state), "error": error}))
"""


def state(before: str = "", **environment: str) -> dict[str, str | float]:
    """Return what a new process computes with, and the error of a product."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", blas.VARIABLE)}
    words = [sys.executable, "-c", before + STATE]
    done = subprocess.run(
        words, env=kept | environment, capture_output=True, text=True, check=True, timeout=120
    )
    found: dict[str, str | float] = json.loads(done.stdout)
    return found


@wheel
@pytest.mark.parametrize("first", ["import mlx_specstream", "import mlx.core", "import mlx_lm"])
def test_whatever_is_imported_first_mlx_computes_with_a_fast_library(first: str) -> None:
    found = state(f"{first}\n")
    assert str(found["name"]).startswith(("OpenBLAS", "MKL", "BLIS"))
    assert found["error"] < 1e-4
    assert found["problem"] == ""


def test_mlx_calls_the_library_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since the slot stays as it is written."""
    found = state(
        """
import ctypes
from mlx_specstream.machine import blas, relink
import mlx.core as mx
mlx = ctypes.CDLL(mx.__file__.rpartition("/")[0] + "/lib/libmlx.so")
calls = []
kind = ctypes.CFUNCTYPE(None)
first = kind(lambda: calls.append("ours"))
address = ctypes.cast(first, ctypes.c_void_p).value
assert relink.relink(mlx, {"cblas_sgemm": address, "no_such_function": 1}) == ["cblas_sgemm"]
mx.eval(mx.ones((16, 16)) @ mx.ones((16, 16)))
assert calls == ["ours"]
blas.use([__import__("pathlib").Path(mx.__file__).parent])
if blas.state.name == blas.REFERENCE_BLAS:
    own = ctypes.cast(mlx.cblas_sgemm, ctypes.c_void_p).value
    relink.relink(mlx, {"cblas_sgemm": own})
"""
    )
    assert found["error"] < 1e-4


@pytest.mark.parametrize("off", ["0", "off"])
def test_it_can_be_turned_off(off: str) -> None:
    found = state(SPECSTREAM_BLAS=off)
    assert (found["name"], found["problem"]) == (
        str(blas._kind(str(found["path"])) or REFERENCE_BLAS),
        "",
    )


@wheel
def test_a_library_can_be_named() -> None:
    package = importlib.util.find_spec("scipy_openblas32")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "lib" / "libscipy_openblas.so"
    found = state(SPECSTREAM_BLAS=str(path))
    assert Path(str(found["path"])).samefile(path)
    assert str(found["name"]).startswith("OpenBLAS 0.3.")
    one = state(SPECSTREAM_BLAS=str(path), OPENBLAS_NUM_THREADS="1")
    assert str(one["name"]).endswith("(1 thread)")


@pytest.mark.parametrize("name", ["/no/such/library.so", "libm.so.6", __file__])
def test_what_is_no_blas_is_told_and_not_used(name: str) -> None:
    found = state(SPECSTREAM_BLAS=name)
    assert name in str(found["problem"])
    assert found["path"] != name
    assert found["error"] < 1e-4


def test_without_any_library_mlx_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = mx.ones((8, 8)) @ mx.ones((8, 8))
    monkeypatch.setattr(blas, "candidates", lambda: iter(["/no/such/library.so"]))
    monkeypatch.setattr(blas, "state", blas.State())
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    blas.use([tmp_path, Path(str(mx.__file__)).parent])
    assert blas.state.name == (blas._kind(blas.state.path) or REFERENCE_BLAS)
    assert mx.array_equal(before, mx.ones((8, 8)) @ mx.ones((8, 8)))


@pytest.mark.parametrize("platform_name", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, platform_name: str) -> None:
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(blas, "use", _fails)
    before = list(sys.meta_path)
    blas.install()
    assert sys.meta_path == before


def test_mlx_for_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = blas._address
    monkeypatch.setattr(
        blas,
        "_address",
        lambda library, name: 1 if name == "cublasLtCreate" else real(library, name),
    )
    monkeypatch.setattr(blas, "state", blas.State())
    monkeypatch.setattr(blas, "load", _fails)
    blas.use([Path(str(mx.__file__)).parent])
    assert blas.state == blas.State()


def test_an_import_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "state", blas.State())
    monkeypatch.setattr(blas.relink, "relink", _fails)
    monkeypatch.setattr(blas, "_own", _fails)
    blas.install()
    assert blas.state.problem == "OSError: cannot be done here"


@wheel
def test_a_library_with_64_bit_sizes_or_wrong_results_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path,) = (name for name in blas.candidates() if "scipy_openblas32" in name)
    assert blas.load(path) is not None
    monkeypatch.setattr(blas, "_settings", lambda *_: "OpenBLAS 0.3.30 USE64BITINT DYNAMIC_ARCH")
    assert blas.load(path) is None
    monkeypatch.undo()
    monkeypatch.setattr(blas, "_multiplies", lambda _: False)
    assert blas.load(path) is None


@pytest.mark.parametrize(
    ("slowness", "threads"),
    [([1.5], 4), ([3.0], 1), ([9.0, 5.0, 1.5, 1.5, 1.5], 4), ([9.0, 1.5, 9.0, 1.5, 9.0], 1)],
)
def test_threads_that_stall_each_other_are_given_up(
    monkeypatch: pytest.MonkeyPatch, slowness: list[float], threads: int
) -> None:
    """In most looks, that is: something that passes is not to cost a long run its other cores."""
    for name in blas._THREADS:
        monkeypatch.delenv(name, raising=False)
    library = _Threaded(4)
    monkeypatch.setattr(blas, "_cores_of_container", lambda: 0)
    together = itertools.cycle(slowness)
    monkeypatch.setattr(blas, "_seconds", lambda _: 1.0 if library.threads == 1 else next(together))
    assert blas._set_threads(library, "", 0) == threads  # type: ignore[arg-type]
    assert library.threads == threads
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    library.threads = 3
    assert blas._set_threads(library, "", 0) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "cores"), [("150000 100000\n", 2), ("20000 100000", 1), ("max 100000", 0)]
)
def test_the_cores_of_a_container(
    monkeypatch: pytest.MonkeyPatch, content: str, cores: int
) -> None:
    monkeypatch.setattr(blas.Path, "read_text", lambda *_, **__: content)
    assert blas._cores_of_container() == cores


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3", "OpenBLAS"),
        ("/opt/intel/lib/libmkl_rt.so.2", "MKL"),
        ("/usr/lib/libblis.so.4", "BLIS"),
        ("/home/openblas/site-packages/mlx_cpu.libs/libblas-bd8a282c.so.3", ""),
    ],
)
def test_a_path_tells_the_library(path: str, name: str) -> None:
    assert blas._kind(path) == name


def test_a_slot_in_a_closed_page_is_written_and_closed_again() -> None:
    import mmap

    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    blas.relink._protect(address, mmap.PROT_READ)
    blas.relink._write(address + 8, 42)
    assert ctypes.c_uint64.from_address(address + 8).value == 42
    assert not blas.relink._writable(address)
    blas.relink._protect(address, mmap.PROT_READ | mmap.PROT_WRITE)


class _Threaded:
    """What OpenBLAS has to say about threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    def openblas_set_num_threads(self) -> Callable[[int], None]:
        return lambda count: setattr(self, "threads", count)

    @property
    def openblas_get_num_threads(self) -> Callable[[], int]:
        return lambda: self.threads


def _fails(*_: object) -> None:
    raise OSError("cannot be done here")
