"""A fast BLAS for MLX on Linux: found on the machine or in a wheel, and put in the slow one's place.

MLX's CPU wheel computes products of matrices with the reference BLAS, which is several times
slower than OpenBLAS and charges every row in full. Four functions are called; `install` redirects
them once `mlx.core` is imported, or at once if it is. Only MLX's own calls change: no other
library sees the one that is loaded here. SPECSTREAM_BLAS names a library, or is 0 to keep
MLX's. A Mac, MLX for CUDA, and an MLX that has a fast library already are left alone, and
whatever goes wrong, MLX is left as it was.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from . import relink

VARIABLE = "SPECSTREAM_BLAS"
REFERENCE_BLAS = "reference BLAS"
BLAS_ADVICE = (
    "pip install scipy-openblas32, or name an OpenBLAS: SPECSTREAM_BLAS=/path/libopenblas.so.0"
)
FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_zgemm")
_OFF = ("0", "off", "no", "none", "false")
_KINDS = (("openblas", "OpenBLAS"), ("mkl", "MKL"), ("blis", "BLIS"), ("flexiblas", "FlexiBLAS"))
# By the names that the system's loader knows, and that conda's packages have.
_SYSTEM = ("libopenblas.so.0", "libopenblas.so", "libblis.so.4", "libmkl_rt.so.2", "libmkl_rt.so.1")
_OF_CUDA = ("cudaGetDeviceCount", "cublasLtCreate")  # only MLX for CUDA brings them
_PREFIXES = ("", "scipy_")  # of the names in the wheels for SciPy
_LOOKS = 5  # where the first finds threads slow; most of them decide
_PAUSE_S = 0.005  # twice as long between any two of them
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "GOTO_NUM_THREADS")


@dataclass(frozen=True)
class Library:
    """A BLAS with functions of 32-bit sizes: its name and version, its file, its functions' addresses."""

    name: str
    path: str
    functions: dict[str, int]


@dataclass
class State:
    """What MLX computes with, "" while that is not known, and why it is not what was asked for."""

    name: str = ""
    path: str = ""
    problem: str = ""


state = State()


class _BeforeMlx:
    """Finds no module; sees that `mlx.core` is about to be imported, and where it is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "mlx.core":
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            _try_use([Path(folder) for folder in path or ()])
        return None


def install() -> None:
    """Have MLX compute with a fast BLAS where it would use the reference one."""
    if sys.platform != "linux" or not relink.supported():
        return
    if (core := sys.modules.get("mlx.core")) is not None:
        _try_use([Path(str(core.__file__)).parent])
    else:
        sys.meta_path.insert(0, _BeforeMlx())


def _try_use(folders: list[Path]) -> None:
    try:
        use(folders)
    except Exception as error:  # an odd machine keeps what it has
        state.problem = state.problem or f"{type(error).__name__}: {error}"


def use(folders: Sequence[Path]) -> None:
    """Redirect the MLX in one of these folders to a fast BLAS, and note in `state` what it uses.

    Raises:
        OSError: MLX's library cannot be loaded or written to.
    """
    found = [path for folder in folders if (path := folder / "lib" / "libmlx.so").is_file()]
    if not found:
        return
    mlx = ctypes.CDLL(str(found[0]))
    if any(_address(mlx, name) for name in _OF_CUDA) or (own := _own(mlx)) is None:
        return
    state.path, state.name = own, _kind(own) or REFERENCE_BLAS
    asked = os.environ.get(VARIABLE, "").strip()
    if asked.lower() in _OFF or (not asked and state.name != REFERENCE_BLAS):
        return
    library = load(asked) if asked else None
    if asked and library is None:
        state.problem = f"{VARIABLE}={asked} is no BLAS that can be loaded here"
    library = library or next(filter(None, map(load, candidates())), None)
    if library is not None and relink.relink(mlx, library.functions):
        state.name, state.path = library.name, library.path


def candidates() -> Iterator[str]:
    """Yield names and paths of libraries to try: the system's, the environment's, a wheel's."""
    yield from _SYSTEM
    for name in _SYSTEM:
        if (path := Path(sys.prefix) / "lib" / name).exists():
            yield str(path)
    for package, inside in (
        ("scipy_openblas32", "lib/libscipy_openblas.so"),
        ("scipy", "../scipy.libs/libscipy_openblas-*.so"),
    ):
        # Not importlib.util.find_spec: a name without a dot is looked for on the path alone.
        spec = PathFinder.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            base, pattern = Path(folder), inside
            if inside.startswith("../"):
                base, pattern = base.parent, inside[3:]
            yield from map(str, sorted(base.glob(pattern)))


def load(name: str) -> Library | None:
    """Load a library and return its functions; None if it is not there or not fit."""
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    for prefix in _PREFIXES:
        functions = {f: address for f in FUNCTIONS if (address := _address(library, prefix + f))}
        if len(functions) == len(FUNCTIONS):
            break
    else:
        return None
    settings = _settings(library, prefix)
    if "USE64BITINT" in settings or not _multiplies(functions["cblas_sgemm"]):
        return None
    path = _file_of(functions["cblas_sgemm"]) or name
    version = re.match(r"OpenBLAS\s+(\d+\.\d+\.\d+)", settings)
    shown = f"OpenBLAS {version[1]}" if version else _kind(path) or Path(path).name
    if threads := _set_threads(library, prefix, functions["cblas_sgemm"]):
        shown += f" ({threads} thread{'s' * (threads > 1)})"
    return Library(shown, path, functions)


def _settings(library: ctypes.CDLL, prefix: str) -> str:
    """Return how OpenBLAS was built, "" for another library."""
    get_config = getattr(library, f"{prefix}openblas_get_config", None)
    if get_config is None:
        return ""
    get_config.restype = ctypes.c_char_p
    return str((get_config() or b"").decode(errors="replace"))


def _set_threads(library: ctypes.CDLL, prefix: str, sgemm: int) -> int:
    """Set how many threads OpenBLAS computes with, and return it; 0 for another library.

    It takes a thread for every core of the machine, and they wait for each other by spinning. In a
    container that may use fewer cores, or beside other programs, a product then takes ten times as
    long as with one thread; so the cores that a container may use are counted, and what is twice as
    slow with all of them as with one gets one. A moment's delay is not to halve the machine for
    hours, so most of several looks decide. A number in the environment stands.
    """
    set_threads = getattr(library, f"{prefix}openblas_set_num_threads", None)
    get_threads = getattr(library, f"{prefix}openblas_get_num_threads", None)
    if set_threads is None or get_threads is None:
        return 0
    threads = int(get_threads())
    if threads == 1 or any(map(os.environ.get, _THREADS)):
        return threads
    threads = min(threads, _cores_of_container() or threads)
    slow = 0
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S * 2**look)
        set_threads(1)
        alone = _seconds(sgemm)
        set_threads(threads)
        slow += _seconds(sgemm) > 2 * alone
        if not slow:
            return threads
    if 2 * slow > _LOOKS:
        threads = 1
    set_threads(threads)
    return threads


def _cores_of_container() -> int:
    """Return how many cores a control group may use, 0 if it does not say."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # another kind of container, or "max"
        return 0


def _seconds(sgemm: int, rows: int = 16, width: int = 512, repeats: int = 8) -> float:
    """Return how long some products as large as a decoding step's take; the first one warms up."""
    row_major, as_it_is, real = 101, 111, ctypes.c_float
    a, b, c = (real * (rows * width))(), (real * (width * width))(), (real * (rows * width))()
    multiply = _function(sgemm)
    shape = (row_major, as_it_is, as_it_is, rows, width, width)
    started = 0.0
    for repeat in range(repeats + 1):
        started = time.perf_counter() if repeat == 1 else started
        multiply(*shape, 1.0, a, width, b, width, 0.0, c, width)
    return time.perf_counter() - started


def _function(sgemm: int) -> Callable[..., None]:
    real, pointer, size = ctypes.c_float, ctypes.POINTER(ctypes.c_float), ctypes.c_int
    order_and_shape = (size, size, size, size, size, size)
    kinds = (*order_and_shape, real, pointer, size, pointer, size, real, pointer, size)
    return ctypes.CFUNCTYPE(None, *kinds)(sgemm)


def _multiplies(sgemm: int) -> bool:
    """Tell whether a `cblas_sgemm` gives [[1, 2], [3, 4]] times [[5], [6]]."""
    row_major, as_it_is, real = 101, 111, ctypes.c_float
    a, b, c = (real * 4)(1, 2, 3, 4), (real * 2)(5, 6), (real * 2)()
    shape = (row_major, as_it_is, as_it_is, 2, 1, 2)
    _function(sgemm)(*shape, 1.0, a, 2, b, 1, 0.0, c, 1)
    return list(c) == [17.0, 39.0]


def _own(mlx: ctypes.CDLL) -> str | None:
    """Return the file of the BLAS that MLX is linked to or that was preloaded; None if it has none."""
    for library in (ctypes.CDLL(None), mlx):
        if address := _address(library, "cblas_sgemm"):
            return os.path.realpath(_file_of(address) or "")
    return None


def _address(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


class _Place(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(address: int) -> str:
    """Return the file that an address was loaded from."""
    place = _Place()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(place))
    return os.fsdecode(place.file) if found and place.file else ""


def _kind(path: str) -> str:
    """Return the name of the library that a path tells, "" if it tells none."""
    # The folder as well: Debian's OpenBLAS is openblas-pthread/libblas.so.3.
    words = "/".join(Path(path).parts[-2:]).lower()
    return next((shown for part, shown in _KINDS if part in words), "")
