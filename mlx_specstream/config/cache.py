"""How a new KV cache holds its rows: how many, and in how many bits."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from .bounds import whole

MAX_ROWS = 2**31 - 1  # rows are counted in int32
_ONLY = {"kv_bits": (2, 3, 4, 5, 6, 8), "kv_group_size": (32, 64, 128)}


@dataclass(frozen=True)
class CacheConfig:
    """How a new KV cache holds its rows, with mlx-lm's names and meanings.

    max_kv_size: layers without a sliding window hold the last so many rows, the first four
    always among them; None for all. kv_bits: store rows in so many bits, a scale and a bias per
    `kv_group_size` channels, from `quantized_kv_start` rows on; None for unquantised.

    Raises:
        OptionError: a value is out of range, or both are asked for.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        for name, low, high, sentence in (
            ("max_kv_size", 5, MAX_ROWS, "max_kv_size must be above 4, for the first 4 rows stay"),
            ("kv_bits", 2, 8, "kv_bits must be 2, 3, 4, 5, 6 or 8"),
            ("kv_group_size", 32, 128, "kv_group_size must be 32, 64 or 128"),
            ("quantized_kv_start", 0, None, "quantized_kv_start must be at least 0"),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_kv_size", "kv_bits"):
                continue
            value = whole(value, low, high, sentence)
            if value not in _ONLY.get(name, (value,)):
                raise OptionError(f"{sentence}, got {value}.")
            object.__setattr__(self, name, value)
        if self.max_kv_size is not None and self.kv_bits is not None:
            raise OptionError(
                "max_kv_size and kv_bits cannot be used together: mlx-lm does not quantise "
                "rotating caches; leave one of them out."
            )

    @property
    def keeps_all(self) -> bool:
        """Tell whether layers without a sliding window hold every row, as it was computed."""
        return self.max_kv_size is None and self.kv_bits is None
