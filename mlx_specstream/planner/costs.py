"""A planner for a loaded model: costs from the cache of earlier measurements, or measured now.

Costs are measured once for a machine, a model and its streams, and kept as JSON in the cache
folder under a name made of all they hold for (`identity.py`). A file that cannot be read is
measured again; a folder that cannot be written is no reason to stop. Costs of a busy machine are
kept and used, and measured again once it is quiet.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.nn as nn
from mlx_lm.utils import get_total_parameters

from ..config import DecodeConfig
from ..errors import OptionError, OutputError
from ..loading.model_cache import cache_folder
from ..machine import ranks
from ..machine.load import Watch, is_quiet
from ..model.attention import FusedAttention
from ..speculation.streams import Streams
from ..weights.files import atomic_file, without_folders
from .acceptance import AcceptanceProfile, assumed_profile, profile_of
from .choose import forecasts
from .curve import BUDGET_S, CostCurve
from .identity import identity, this_machine, weight_bits
from .measure import measure
from .messages import has_changed, message_s, messages_per_pass
from .planner import Planner
from .prior import ModelSize, chip_of, prior_curve
from .settings import StepSetting, candidates

if TYPE_CHECKING:
    from ..loading.load import StreamModel

log = logging.getLogger("mlx_specstream")

VERSION = 1
AGAIN_S = 600.0  # costs of a busy machine are not measured again before
BUDGET = "SPECSTREAM_PLAN_SECONDS"
"""Environment variable: seconds that measuring may take; 0 for none."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_COMPUTING = ("blas", "threads")  # of a key: they change from run to run, by themselves even

# The first measured tell most of the others; then small before large.
_FIRST = ("4", "8", "chain", "16", "chain2", "5", "4 inline")

PROMISING = 4  # plans that are measured before these, where published figures tell which

_planners: weakref.WeakKeyDictionary[Streams, dict[tuple[str, bool], Planner]]
_planners = weakref.WeakKeyDictionary()


def planner_for(model: StreamModel, config: DecodeConfig | None = None) -> Planner | None:
    """Return the planner of a loaded model, made at the first call; it lives as long as the model.

    Where measuring is turned off, its costs are those published for the chip. None if there are
    none, `config` leaves nothing to plan, the model has no streams, or it computes NaN.
    """
    config = config or DecodeConfig()
    streams = model.streams
    if streams is None or config.tree.kind != "auto":
        return None
    if config.prune is not None or config.stream_nodes:
        return None
    known = _planners.setdefault(streams, {})
    key = (config.schedule, config.use_conditioner)
    if key not in known:
        curve = step_costs(model) if _budget(BUDGET_S) else _told(published_costs(model))
        if curve is None:
            return None
        allowed = set(model_plans(model, config))
        plans = [plan for plan in curve.steps if plan in allowed]
        if not plans:
            return None
        # Times differ between processes, and all must decide alike: there the curve is trusted.
        clock = None if ranks.group() else time.perf_counter
        known[key] = Planner(curve, acceptance(model), plans, clock=clock)
    return known[key]


def is_planned(config: DecodeConfig | None) -> bool:
    """Tell whether what pays is to be found out by timing, as a batch does while it works.

    Not where a tree was named or measuring is turned off, nor among processes: they must decide
    alike, and their times differ.
    """
    asked = config is None or config.tree.kind == "auto"
    return ranks.group() is None and asked and _budget(BUDGET_S) > 0


def acceptance(model: StreamModel) -> AcceptanceProfile:
    """Return what was recorded with the model's streams, or what is assumed of any streams."""
    assert model.streams is not None
    G = model.streams.num_streams
    found = profile_of(model.streams_name)
    return found if found is not None and found.num_streams == G else assumed_profile(G)


def model_plans(model: StreamModel, config: DecodeConfig | None = None) -> list[StepSetting]:
    """Return the plans worth a look for a model, in the order in which to measure them."""
    assert model.streams is not None
    trained, schedule = model.streams.config, (config or DecodeConfig()).schedule
    if schedule == "auto" and model.streams.know_next_token:
        schedule = "deferred"
    recorded = profile_of(model.streams_name)
    plans = candidates(
        trained.num_streams,
        trained.mode,
        schedule,
        prunable=bool(trained.pruner_rank and recorded and recorded.has_pruned),
        ends_known=bool(recorded and recorded.has_ends),
        attention=fused_attention(model),
    )
    first = [f"chain{trained.num_streams}" if name == "chain" else name for name in _FIRST]
    if (prior := published_costs(model, plans)) is not None:
        promising = forecasts(prior, acceptance(model))[:PROMISING]
        first = [*(f.name for f in promising), *first]
    plans.sort(key=lambda p: first.index(p.name) if p.name in first else len(first))
    # Chips of different kinds would each have their own order.
    names = ranks.told(json.dumps([plan.name for plan in plans]).encode())
    return [StepSetting.parse(name) for name in json.loads(names)]


def published_costs(
    model: StreamModel, plans: Sequence[StepSetting] | None = None
) -> CostCurve | None:
    """Return what `plans` (None: all) should cost on this chip, None if no figures are published.

    They are of dense models: experts are read by as many rows as ask for them.
    """
    assert model.streams is not None
    plans = model_plans(model) if plans is None else plans
    machine = this_machine()
    chip = chip_of(machine) if machine.backend == "metal" else None
    if chip is None or has_experts(model.model):
        return None
    trained, backbone = model.streams.config, model.backbone
    size = ModelSize(
        model.name,
        backbone.num_layers,
        float(sum(map(get_total_parameters, backbone.layers))),
        float(backbone.vocab_size * backbone.hidden_size),
        trained.num_msa_layers,
    )
    return prior_curve(chip, weight_bits(model.model), size, trained.num_streams, plans)


def step_costs(
    model: StreamModel,
    *,
    budget_s: float | None = None,
    refresh: bool = False,
    announce: Callable[[str], None] | None = None,
) -> CostCurve | None:
    """Return the cost curve of a model with streams: cached, else measured now and cached.

    None if measuring is turned off (a budget of 0), or the model computes NaN.

    Args:
        budget_s: seconds that measuring may take; None for SPECSTREAM_PLAN_SECONDS, else `BUDGET_S`.
        refresh: measure even if the cache has it.
        announce: told in a sentence that measuring begins; None logs it.

    Raises:
        OptionError: SPECSTREAM_PLAN_SECONDS is no number of seconds.
    """
    assert model.streams is not None
    budget_s = _budget(BUDGET_S) if budget_s is None else budget_s
    key = identity(model)
    path = cached_at(key)
    earlier = None if refresh else read_curve(path, key)
    message = message_s(model.backbone)
    again = ""  # why, if earlier costs do not hold
    if earlier is not None and has_changed(earlier, message, messages_per_pass(model.backbone)):
        again = "with faster or slower messages"
    elif earlier is not None and earlier.busy and _may_be_measured_again(path):
        again = "while other programs ran"
    known = _told(None if again and budget_s > 0 else earlier)
    if known is not None or budget_s <= 0:
        return known
    profile = acceptance(model)
    (announce or log.warning)(f"note: {_why(_called(model), again, path, key, budget_s)}")
    watch = Watch()
    from mlx_lm.generate import wired_limit

    # Wired as when it generates: weights that macOS pages out cost many times as much.
    with wired_limit(model.model):
        curve = measure(
            model.streams,
            model_plans(model),
            budget_s=budget_s,
            tokens_per_step=profile.tokens_per_step,
            clock=ranks.clock,
        )
    if curve is None:
        return None
    curve = replace(curve, key=key, busy=watch.is_busy, message_s=message)
    if curve.busy:
        (announce or log.warning)(
            f"note: {watch.sentence().rstrip('.')}; these costs are used, and measured again when it "
            "is quiet."
        )
    if not ranks.is_follower():
        write_curve(path, curve)
    return curve


def _told(curve: CostCurve | None) -> CostCurve | None:
    """Return the curve that the leading process knows; among several, all use that."""
    if ranks.group() is None:
        return curve
    text = ranks.told(json.dumps(curve.to_dict()).encode() if curve else b"")
    return CostCurve.from_dict(json.loads(text)) if text else None


def _called(model: StreamModel) -> str:
    """Name a model and its streams, as `demo with demo-sql`."""
    streams = without_folders(model.streams_name)
    return without_folders(model.name) + (f" with {streams}" if streams else "")


def _why(name: str, again: str, path: Path, key: dict[str, object], budget_s: float) -> str:
    """Return the sentence that says what is measured now, and why if that was done before."""
    limit = f"for up to {budget_s:g} seconds"
    if again:
        return f"what decoding steps of {name} cost was measured {again}; it is measured again, {limit}."
    if (other := _known_otherwise(path, key)) is not None:
        return (
            f"what decoding steps of {name} cost is known with {_computes(other)}, and kept; "
            f"measuring once, {limit}, with {_computes(key)}."
        )
    return f"measuring once, {limit}, what decoding steps of {name} cost on this machine."


def _computes(key: Mapping[str, object]) -> str:
    """Return the matrix library and cores of a key, as `identity` wrote them."""
    cores, _, limits = str(key["threads"]).partition(" Device(")
    limits = limits.partition(") ")[2]
    return f"{key['blas'] or 'this back end'} on {cores} cores{f' ({limits})' if limits else ''}"


def _known_otherwise(path: Path, key: dict[str, object]) -> Mapping[str, object] | None:
    """Return the key of kept costs that differ in the matrix library or its threads alone."""
    for other in sorted(path.parent.glob("*.json")):
        try:
            found = CostCurve.from_dict(json.loads(other.read_text(encoding="utf-8"))).key
        except UNREADABLE:
            continue
        if {**found, **{name: key[name] for name in _COMPUTING}} == json.loads(json.dumps(key)):
            return found
    return None


def _may_be_measured_again(path: Path) -> bool:
    """Tell whether the last measurement is a while ago, and nothing else runs now."""
    try:
        return time.time() - path.stat().st_mtime > AGAIN_S and is_quiet()
    except OSError:
        return False


def cached_at(key: dict[str, object]) -> Path:
    """Return the file that costs with this key are kept in."""
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    return cache_folder() / "costs" / f"{sha256(text.encode()).hexdigest()[:20]}.json"


def read_curve(path: Path, key: dict[str, object]) -> CostCurve | None:
    """Return the curve in a file; None if there is none for this key, or it is damaged."""
    try:
        curve = CostCurve.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except UNREADABLE:
        return None
    return curve if dict(curve.key) == json.loads(json.dumps(key)) and curve.steps else None


def write_curve(path: Path, curve: CostCurve) -> None:
    """Keep a curve; one that cannot be kept is measured again next time."""
    try:
        with atomic_file(path, if_exists="replace") as partial:
            partial.write_text(json.dumps(curve.to_dict(), indent=1), encoding="utf-8")
    except (OutputError, OSError) as error:
        log.debug("costs are not kept: %s", error)


def _budget(otherwise: float) -> float:
    text = os.environ.get(BUDGET)
    if ranks.group() is not None:  # other machines may not know the variable
        text = ranks.told((text or "").encode()).decode() or None
    if text is None:
        return otherwise
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise OptionError(f"{BUDGET} must be a number of seconds from 0 to 3600, got {text!r}.")
    return seconds


def has_experts(model: nn.Module) -> bool:
    """Tell whether a row goes through some of a layer's weights only."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return any(isinstance(m, QuantizedSwitchLinear | SwitchLinear) for m in model.modules())


def fused_attention(model: StreamModel) -> FusedAttention | None:
    """Return what Metal's fused attention takes of this model; None on other back ends."""
    if this_machine().backend != "metal":
        return None
    arguments = getattr(model.model, "args", None)
    inner = getattr(arguments, "text_config", None)

    def number(name: str) -> int:
        value = inner.get(name) if isinstance(inner, dict) else None
        value = value or getattr(arguments, name, None)
        return value if isinstance(value, int) else 0

    heads = number("num_attention_heads") or 1
    return FusedAttention(
        heads,
        number("num_key_value_heads") or heads,
        number("head_dim") or model.backbone.hidden_size // heads,
    )
