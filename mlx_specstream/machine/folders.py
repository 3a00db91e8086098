"""Where a user's own things are kept: conversations, streams made here.

SPECSTREAM_STATE, else ~/Library/Application Support/mlx-specstream (macOS)
                  or $XDG_STATE_HOME/mlx-specstream (~/.local/state)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def state_folder() -> Path:
    """Return the folder of this package's state, absolute; it need not exist."""
    if named := os.environ.get("SPECSTREAM_STATE"):
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-specstream"
    base = os.environ.get("XDG_STATE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return root / "mlx-specstream"
