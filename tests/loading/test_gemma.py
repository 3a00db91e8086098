"""Gemma 3 270M: nothing is fetched before its terms are agreed to; four parts become one model."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import mlx_lm
import pytest

from mlx_specstream.errors import ModelError, OptionError
from mlx_specstream.loading import gemma, wheel
from mlx_specstream.loading.folders import model_folder
from tests.convert.gguf import made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECSTREAM_CACHE", str(folder))
    monkeypatch.setenv("SPECSTREAM_GEMMA", "accept")
    monkeypatch.delenv("SPECSTREAM_GEMMA_WHEELS", raising=False)
    monkeypatch.setattr(gemma, "_NEEDED_BYTES", 1 << 20)
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny Gemma's wheels, taken for the real ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    whole = made.write_tiny_gemma(tmp_path / "x.gguf").read_bytes()
    cut = len(whole) // 4
    write(folder / gemma.TERMS_WHEEL.filename, gemma.TERMS_IN_WHEEL, b"<p>terms</p>")
    for number, part in enumerate(gemma.PART_WHEELS):
        package = part.filename.partition("-")[0]
        member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
        end = len(whole) if number == 3 else cut * (number + 1)
        write(folder / part.filename, member, whole[cut * number : end])
    monkeypatch.setattr(gemma, "TERMS_WHEEL", known(folder, gemma.TERMS_WHEEL))
    parts = tuple(known(folder, part) for part in gemma.PART_WHEELS)
    monkeypatch.setattr(gemma, "PART_WHEELS", parts)
    return folder


def write(path: Path, member: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)


def known(folder: Path, like: wheel.Wheel) -> wheel.Wheel:
    data = (folder / like.filename).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return wheel.Wheel(like.requirement, like.filename, digest, len(data), like.by_hand)


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, index: Path) -> Path:
    """Put a copier in pip's place; returns a file with a line per call."""
    script, calls = tmp_path / "pip.py", tmp_path / "calls"
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"with open({str(calls)!r}, 'a') as log: log.write(sys.argv[-1] + '\\n')\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1]); folder.mkdir()\n"
        "name = sys.argv[-1].replace('==', '-').replace('gguf-part', 'gguf_part')\n"
        "name = name.replace('-q4-k-m-', '_q4_k_m_').replace('gemma3-270m', 'gemma3_270m')\n"
        f"shutil.copy(pathlib.Path({str(index)!r}, name + '-py3-none-any.whl'), folder)\n"
    )
    monkeypatch.setattr(wheel, "_pip_command", lambda _: [sys.executable, str(script)])
    return calls


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_terms_come_first(
    tmp_path: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, index)
    for said in (None, "", "yes"):
        monkeypatch.setenv("SPECSTREAM_GEMMA", said or "")
        if said is None:
            monkeypatch.delenv("SPECSTREAM_GEMMA")
        with pytest.raises(ModelError, match=r"Gemma Terms of Use.*SPECSTREAM_GEMMA=accept"):
            model_folder("gemma3-270m")
    assert not calls.exists()
    assert not cache.exists()


def test_from_the_index(
    tmp_path: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, index)
    folder = model_folder("gemma3-270m")
    assert len(calls.read_text().splitlines()) == 5
    assert left_behind(cache) == [folder.name]
    assert capfd.readouterr().out == ""
    model, tokenizer = mlx_lm.load(str(folder))
    assert len(model.layers) == 6
    assert tokenizer.encode("ab")[0] == 2
    assert (folder / "GEMMA_TERMS.html").read_text() == "<p>terms</p>"
    assert "subject to the Gemma Terms of Use" in (folder / "NOTICE").read_text()
    assert not list(folder.glob("*.gguf"))

    monkeypatch.delenv("SPECSTREAM_GEMMA")  # what is there was agreed to
    assert model_folder("gemma3-270m") == folder
    assert len(calls.read_text().splitlines()) == 5


def test_from_a_folder(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSTREAM_GEMMA_WHEELS", str(index))
    assert (gemma.resolve_gemma() / "config.json").exists()
    assert len(list(index.iterdir())) == 5


def test_one_part_is_missing_or_another(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECSTREAM_GEMMA_WHEELS", str(index))
    part = index / gemma.PART_WHEELS[2].filename
    part.write_bytes(part.read_bytes() + b"!")
    with pytest.raises(ModelError, match=r"part3.*SHA-256"):
        gemma.resolve_gemma()
    part.unlink()
    with pytest.raises(ModelError, match=r"part3.*cannot be read"):
        gemma.resolve_gemma()
    assert left_behind(cache) == []


def test_what_was_fetched_is_kept_when_a_later_part_fails(
    tmp_path: Path, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, tmp_path, index)
    last = index / gemma.PART_WHEELS[3].filename
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(ModelError, match=r"part4.*SPECSTREAM_GEMMA_WHEELS"):
        gemma.resolve_gemma()
    assert len(left_behind(cache)) == 4
    last.write_bytes(data)
    calls.unlink()
    gemma.resolve_gemma()
    assert calls.read_text() == f"{gemma.PART_WHEELS[3].requirement}\n"


def test_a_folder_here_of_that_name_comes_first(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3-270m").symlink_to(tiny_folder)
    assert model_folder("gemma3-270m") == Path("gemma3-270m")


def test_it_has_no_revisions() -> None:
    with pytest.raises(OptionError, match="revision"):
        model_folder("gemma3-270m", "main")
