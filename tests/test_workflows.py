"""The workflows name what is there: commands, the Python that was set up, the files that are kept."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
# The first of each that runs on a Node which hosted machines still have.
NODE_24 = {"actions/checkout": 5, "actions/setup-python": 6, "actions/upload-artifact": 6}


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    return loaded


def steps() -> list[tuple[str, dict[str, Any]]]:
    names = sorted(path.name for path in FOLDER.glob("*.yml"))
    jobs = [(name, job) for name in names for job in workflow(name)["jobs"].values()]
    assert all(job["timeout-minutes"] for _, job in jobs)
    return [(name, step) for name, job in jobs for step in job["steps"]]


def test_every_command_is_there() -> None:
    ran = [step["run"] for _, step in steps() if "run" in step]
    assert len(ran) >= 6
    for command in ran:
        program = command.split()[0]
        if program.startswith(".ci/"):
            assert os.access(ROOT / program, os.X_OK), program
        else:
            assert program in (".venv/bin/python", ".venv/bin/specstream", "cat"), program


def test_actions_run_on_a_node_that_is_there() -> None:
    used = [step["uses"] for _, step in steps() if "uses" in step]
    for name, number in (action.split("@v") for action in used):
        assert int(number) >= NODE_24[name]


def test_the_report_is_what_is_kept() -> None:
    found = workflow("macos.yml")["jobs"]["tests"]["steps"]
    (command,) = [s["run"] for s in found if "--report" in s.get("run", "")]
    path = Path(command.split("--report ")[1])
    (kept,) = [s["with"]["path"].split() for s in found if "upload-artifact" in s.get("uses", "")]
    assert kept == [str(path), f"{path.with_suffix('')}/"]
    # What failed before does not keep these from running.
    first = [s.get("run") for s in found].index(".ci/run")
    assert all(step["if"] == "${{ !cancelled() }}" for step in found[first + 1 :])


@pytest.mark.parametrize("name", ["linux.yml", "macos.yml"])
def test_the_python_that_was_set_up_is_the_one_that_is_used(name: str, tmp_path: Path) -> None:
    """A hosted machine has newer ones, which make would find first."""
    chosen = workflow(name)["env"]["PYTHON"]
    done = subprocess.run(
        ["make", "-n", "demo", f"VENV={tmp_path / 'new'}"],
        env={**os.environ, "PYTHON": chosen},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(rf"^{chosen} -m venv ", done.stdout, re.MULTILINE)
    assert "${PYTHON:-" in (ROOT / ".ci" / "install").read_text("utf-8")
