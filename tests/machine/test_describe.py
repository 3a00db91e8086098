"""Describing the machine: what is read here, and that an odd machine is described all the same."""

from __future__ import annotations

import json
import platform

import mlx.core as mx
import pytest

from mlx_specstream.machine import Machine
from mlx_specstream.machine import describe as machine


def test_this_machine() -> None:
    found = Machine.read()
    assert found.mlx == mx.__version__
    assert found.backend in ("cpu", "cuda", "metal")
    assert found.memory_bytes > 1 << 28
    assert found.cores >= 1
    assert found.mlx_error == ""
    assert bool(found.blas) == (found.backend == "cpu")
    assert Machine.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise OSError("nothing here")

    monkeypatch.setattr(platform, "system", lambda: "")
    monkeypatch.setattr(machine.os, "sysconf", fails)
    monkeypatch.setattr(machine.Path, "read_text", fails)
    monkeypatch.setattr(mx, "default_device", fails)
    found = Machine.read()
    assert (found.backend, found.memory_bytes, found.blas) == ("", 0, "")
    assert found.mlx_error == "nothing here"
    assert "unknown" in found.summary


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"machdep.cpu.brand_string": "Apple M4 Pro", "sysctl.proc_translated": "0"}
    info = {"architecture": "applegpu_g16s", "max_recommended_working_set_size": 17 << 30}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(machine, "_sysctl", values.get)
    monkeypatch.setattr(mx, "default_device", lambda: "Device(gpu, 0)")
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    found = Machine.read()
    assert (found.backend, found.gpu, found.gpu_generation) == ("metal", "applegpu_g16s", 16)
    assert found.working_set_bytes == 17 << 30
    assert found.summary == "macOS, Apple M4 Pro"


def test_unknown_fields_are_left_out() -> None:
    assert Machine.from_dict({"chip": "X", "cores": "many", "later": 1}) == Machine(chip="X")
