"""`specstream doctor --families`: what each model family of the installed mlx-lm can expect here.

Only names are looked at, so it answers at once. That a family decodes exactly was tried on tiny
random models (docs/families.md); a model of your own is compared with mlx-lm when it is loaded.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from ..model.families.refused import REFUSED

_HAS_MODEL = re.compile(r"^(?:class |from .* import .*\b)Model\b", re.MULTILINE)
_HAS_SIZES = re.compile(r"^(?:class |from .* import .*\b)ModelArgs\b", re.MULTILINE)


def family_names() -> list[str]:
    """Return the names of mlx-lm's modules that define a model, sorted; none of them is imported."""
    spec = find_spec("mlx_lm.models")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    sources = [path for folder in folders for path in folder.glob("*.py")]
    return sorted(p.stem for p in sources if _defines_model(p.read_text(encoding="utf-8")))


def _defines_model(source: str) -> bool:
    return bool(_HAS_MODEL.search(source) and _HAS_SIZES.search(source))


def show_families(*, as_json: bool) -> int:
    """Print every family with the reason for which it is refused, if it is; return 0."""
    names = family_names()
    if as_json:
        print(json.dumps({"families": {name: REFUSED.get(name) for name in names}}, indent=1))
        return 0
    tried = [name for name in names if name not in REFUSED]
    print("Decoded, or compared with mlx-lm on loading and refused if that shows a difference:")
    print(*(f"  {name}" for name in tried), sep="\n")
    print("\nRefused; mlx-lm itself decodes them:")
    print(*(f"  {name}: {REFUSED[name]}" for name in names if name in REFUSED), sep="\n")
    print(f"\n{len(tried)} of {len(names)} families. How they were tried: docs/families.md")
    return 0
