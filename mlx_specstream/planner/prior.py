"""What steps should cost on Apple's chips, from published figures: predictions, never measurements.

A pass over T rows reads the weights once and more, by how MLX's kernels share a read among rows.
The tables hold cost(T) / cost(1) of a whole-weight product; between their points costs run
straight, beyond the last one they stay flat up to 64 rows. Sources, as `owner/project#issue`:

* 4 bits, M3/M4: MLX's `qmv_wide` reads weights once per five rows (ml-explore/mlx#3764). M4 Pro,
  4096 x 24576: 1.03, 1.22, 1.47, 2.07, 2.69 at 2, 3, 4, 6, 8 rows (#3839); 5120 x 17408: 1.75 at 5
  (#3852); 12 and 16 rows from the table in mlx-dspark's `skinny_qmm`, 17408 x 5120.
* 4 bits, M5: a 70B model's whole pass on M5 Max: 1.11, 1.42, 2.20, 3.16, 3.87 at 3, 5, 8, 12, 16
  rows (#3791).
* 4 bits, Ultra: M3 Ultra 5120 x 17408: 1.83, 3.26, 6.12, 6.32 at 2, 4, 8, 16 rows (#4265).
* 4 and 8 bits, M1/M2: each row reads all weights anew up to five rows (eleven on Ultra), from there
  one matrix product, flat to 32 rows (`get_qmv_batch_limit`, mlx/backend/metal/quantized.cpp at
  846d176). The height of the flat part is assumed to be M4 Pro's.
* 8 bits, M3 and later: mlx-dspark's 8-bit figures at 6, 8 and 16 rows, over one row at the M4 Pro's
  bandwidth.
* 16 bits, M3 and later (MLX 0.32.1 and newer): `gemv_wide` reads weights once per five rows up to 15
  (#3888). M1/M2: a padded matrix product of 64 rows at a third of the bandwidth, 161 to 56 GB/s
  (#3661).
* 32 bits: no published figure. No kernel of MLX shares a read of float32 weights among a few rows, so
  two rows and more are a padded matrix product. Taken to be the one of #3661, which passes over as
  many weights a second: 56e9 / 2, beside 161e9 / 4 for one row.

Memory bandwidths are Apple's own; those of M5 Max with fewer GPU cores and of M6 are from reports.
A plain token is taken to reach 0.8 of them, and the host's share of a step, which plain decoding
hides behind the device, to be 2 ms and 50 us a layer: both assumed.
Attention is left out, so predictions are for short contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..machine import Machine
from .curve import CostCurve, StepCost
from .settings import StepSetting

EFFICIENCY = 0.8
HOST_S = 2e-3
HOST_LAYER_S = 5e-5

_ROWS_4BIT_M3 = {1: 1.0, 2: 1.03, 3: 1.22, 4: 1.47, 5: 1.75, 6: 2.07, 8: 2.69, 12: 3.98, 16: 4.33}
_ROWS_4BIT_M5 = {1: 1.0, 3: 1.11, 5: 1.42, 8: 2.20, 12: 3.16, 16: 3.87}
_ROWS_4BIT_ULTRA = {1: 1.0, 2: 1.83, 4: 3.26, 8: 6.12, 16: 6.32}
_ROWS_4BIT_M1 = {1: 1.0, 5: 5.0, 6: 4.33}
_ROWS_8BIT_M1 = {1: 1.0, 5: 5.0, 6: 2.32}
_ROWS_4BIT_M1_ULTRA = {1: 1.0, 11: 11.0, 12: 4.33}
_ROWS_8BIT_M1_ULTRA = {1: 1.0, 11: 11.0, 12: 2.32}
_ROWS_8BIT_M3 = {1: 1.0, 5: 1.2, 6: 1.35, 8: 1.62, 12: 2.1, 16: 2.32}
_ROWS_16BIT_M3 = {1: 1.0, 5: 1.05, 6: 1.3, 10: 1.5, 11: 1.8, 15: 2.0, 16: 2.5}
_ROWS_16BIT_M1 = {1: 1.0, 2: 2.9, 16: 2.9}
_ROWS_32BIT = {1: 1.0, 2: 1.44, 16: 1.44}


@dataclass(frozen=True)
class Chip:
    """An Apple chip. arch: as Metal names its GPU. bandwidth: bytes per second.

    cores, memory_gb: chips of this name with so many CPU cores, or no more memory than this, are
    the ones meant; 0 for any.
    """

    name: str
    arch: str
    bandwidth: float
    cores: int = 0
    memory_gb: int = 0

    @property
    def generation(self) -> int:
        """Return 13 for M1, 14 for M2 and so on."""
        return Machine(gpu=self.arch).gpu_generation

    def rows(self, bits: int) -> Mapping[int, float]:
        """Return cost(T) / cost(1) of a product with weights of so many bits."""
        if bits >= 32:
            return _ROWS_32BIT
        if bits >= 16:
            return _ROWS_16BIT_M3 if self.generation >= 15 else _ROWS_16BIT_M1
        ultra = self.arch.endswith("d")
        if self.generation < 15 and bits >= 8:
            return _ROWS_8BIT_M1_ULTRA if ultra else _ROWS_8BIT_M1
        if self.generation < 15:
            return _ROWS_4BIT_M1_ULTRA if ultra else _ROWS_4BIT_M1
        if bits >= 8:
            return _ROWS_8BIT_M3
        if ultra:
            return _ROWS_4BIT_ULTRA
        return _ROWS_4BIT_M5 if Machine(gpu=self.arch).has_neural_accelerators else _ROWS_4BIT_M3


CHIPS = (
    Chip("M1", "applegpu_g13g", 68e9),
    Chip("M1 Pro", "applegpu_g13s", 200e9),
    Chip("M1 Max", "applegpu_g13s", 400e9),
    Chip("M1 Ultra", "applegpu_g13d", 800e9),
    Chip("M2", "applegpu_g14g", 100e9),
    Chip("M2 Pro", "applegpu_g14s", 200e9),
    Chip("M2 Max", "applegpu_g14s", 400e9),
    Chip("M2 Ultra", "applegpu_g14d", 800e9),
    Chip("M3", "applegpu_g15g", 100e9),
    Chip("M3 Pro", "applegpu_g15s", 150e9),
    Chip("M3 Max", "applegpu_g15s", 400e9),
    Chip("M3 Max 14-core", "applegpu_g15s", 300e9, cores=14),
    Chip("M3 Ultra", "applegpu_g15d", 819e9),
    Chip("A18 Pro", "applegpu_g17p", 60e9),  # of the MacBook Neo; M4's kind of GPU
    Chip("M4", "applegpu_g16g", 120e9),
    Chip("M4 Pro", "applegpu_g16s", 273e9),
    Chip("M4 Max", "applegpu_g16s", 546e9),
    Chip("M4 Max 14-core", "applegpu_g16s", 410e9, cores=14),
    Chip("M5", "applegpu_g17g", 153e9),
    Chip("M5 Pro", "applegpu_g17s", 307e9),
    Chip("M5 Max", "applegpu_g17s", 614e9),
    # Its CPU is the larger one's; it is sold with 36 GB alone, the larger with 48 and more.
    Chip("M5 Max 36GB", "applegpu_g17s", 460e9, memory_gb=36),
    Chip("M6", "applegpu_g18g", 170e9),
)


@dataclass(frozen=True)
class ModelSize:
    """What of a model its cost depends on. layer_params and head_params: weights in all layers, in
    the head. msa_layers: N_s.
    """

    name: str
    layers: int
    layer_params: float
    head_params: float
    msa_layers: int

    def seconds(self, chip: Chip, bits: int) -> float:
        """Return the seconds of one plain token."""
        # A quantised weight brings a 16-bit scale and bias for 64 of them.
        per_weight = bits / 8 + (0.0625 if bits < 16 else 0.0)
        params = self.layer_params + self.head_params
        return params * per_weight / (EFFICIENCY * chip.bandwidth)


# Llama's shapes; a quarter of the layers are MSA layers.
SIZES = (
    ModelSize("1B", 16, 0.97e9, 0.26e9, 4),
    ModelSize("3B", 28, 2.82e9, 0.39e9, 7),
    ModelSize("8B", 32, 6.98e9, 0.53e9, 8),
)


def chip_named(name: str) -> Chip | None:
    """Return the chip Apple calls so, as `M4 Pro` or `Apple M4 Pro`; None if it is not known."""
    wanted = name.lower().replace("apple", "").strip()
    return next((chip for chip in CHIPS if chip.name.lower() == wanted), None)


def chip_of(machine: Machine) -> Chip | None:
    """Return a machine's chip, of the kinds of one name the one it has; None if it is not known."""
    named = chip_named(machine.chip)
    if named is None or named.cores or named.memory_gb:
        return named
    memory_gb = round(machine.memory_bytes / 2**30)
    for chip in CHIPS:
        fits = chip.cores == machine.cores if chip.cores else 0 < memory_gb <= chip.memory_gb
        if chip.name.rpartition(" ")[0] == named.name and fits:
            return chip
    return named


def prior_curve(
    chip: Chip, bits: int, size: ModelSize, num_streams: int, plans: Sequence[StepSetting]
) -> CostCurve:
    """Return what steps with `plans` should cost on a chip, from the tables above."""
    token, rows = size.seconds(chip, bits), chip.rows(bits)
    head = size.head_params / (size.head_params + size.layer_params)
    upper = (1 - head) * size.msa_layers / size.layers
    lower = 1 - head - upper
    host = HOST_S + HOST_LAYER_S * size.layers

    def cost(plan: StepSetting) -> float:
        T, kept, G = plan.rows(num_streams), plan.upper_rows(num_streams), num_streams
        share = lower * at(rows, T) + head * (at(rows, kept) + at(rows, G))
        if plan.prune is not None:
            share += head * at(rows, T)  # the early exit's
        if plan.schedule == "inline":
            share += upper * at(rows, kept + G * min(plan.stream_nodes or kept, kept))
        else:
            share += upper * (at(rows, kept) + at(rows, G))
        return share * token + host

    return CostCurve(
        num_streams=num_streams,
        context=0,
        plain=StepCost(token),
        steps={plan: StepCost(cost(plan)) for plan in plans},
        source=f"prior for {chip.name}, {bits} bits",
    )


def at(table: Mapping[int, float], rows: int) -> float:
    """Return the cost of a product with `rows` rows: between the table's points, then flat, and
    from 64 rows on in proportion.
    """
    points = sorted(table.items())
    if rows >= points[-1][0]:
        return points[-1][1] * max(1.0, rows / 64)
    for (low, cheap), (high, dear) in pairwise(points):
        if low <= rows <= high:
            return cheap + (dear - cheap) * (rows - low) / (high - low)
    return points[0][1]
