"""What would be published, installed into fresh environments and tried there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git")
def test_sdist_and_wheel_install_and_work() -> None:
    done = subprocess.run(
        [ROOT / ".ci" / "install"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("installed, and it works") == 2
