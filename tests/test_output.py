"""What commands print: tables that fit 80 columns, bars that leave pipes alone, names without folders."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from mlx_specstream import cli
from mlx_specstream.machine.describe import names_of
from mlx_specstream.weights.files import without_folders

ROOT = Path(__file__).parents[1]
TABLE = "│┃━─"


@pytest.mark.parametrize(
    "words",
    [
        "doctor",
        "doctor --chips",
        "doctor --chips --chip M4 --bits 4",
        "plan --model FOLDER --budget 0.5",
        "demo --model FOLDER --num-prompts 2 --max-tokens 8",
        "verify --model FOLDER --num-prompts 2 --max-tokens 8 --tree chain --tree 16",
        "bench --model FOLDER --categories chat --num-prompts 2 -m 6 --no-plots --output OUT "
        "--tree 16 --drafts streams,lookup",
        "bench --from OUT --no-plots",
        "convert --hf-path FOLDER --dry-run",
    ],
)
def test_what_is_printed_fits_80_columns(
    words: str,
    folder: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path_factory.getbasetemp() / "fits-80"
    given = [{"FOLDER": folder, "OUT": str(out)}.get(word, word) for word in words.split()]
    status = cli.main(given)
    lines = capsys.readouterr().out.splitlines()
    prose = ("[", "=", "note", "Written", "Note", "Every")  # a pipe breaks no sentence
    if words.startswith(("plan", "bench", "demo", "doctor")):
        lines = [line for line in lines if any(sign in line for sign in TABLE)]
        assert lines
    assert status in (0, 2)
    assert not [line for line in lines if len(line) > 80 and not line.startswith(prose)]


def test_no_cell_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table that fits only with cells cut short says nothing."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor", "--chips"]) == 0
    assert "…" not in capsys.readouterr().out


def test_bars_are_for_terminals() -> None:
    """In a pipe a bar runs into the lines of text beside it: every one is told to see where it is."""
    bars = 0
    for folder in ("mlx_specstream", "convert", "apps", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                if node.func.id in ("tqdm", "Progress") and node.keywords:
                    told = [word.value for word in node.keywords if word.arg == "disable"]
                    if node.func.id == "Progress" and not any(
                        word.arg == "transient" for word in node.keywords
                    ):
                        continue  # another class
                    assert told, f"{path.relative_to(ROOT)}:{node.lineno}"
                    text = ast.unparse(told[0])
                    assert "None" in text or "is_terminal" in text, f"{path}:{node.lineno}: {text}"
                    bars += 1
    assert bars > 10


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("generate --model FOLDER --prompt Hi -m 4 --json", ["model", "streams"]),
        (
            "verify --model FOLDER --num-prompts 1 --max-tokens 4 --tree 2 --json",
            ["model", "streams"],
        ),
        ("plan --model FOLDER --budget 0.5 --json", []),
        ("doctor --json", []),
        ("doctor --json --model FOLDER", []),
        ("doctor --chips --json --streams demo-chat", []),
    ],
)
def test_json_names_no_folder_of_the_machine(
    words: str,
    keys: list[str],
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([word.replace("FOLDER", folder) for word in words.split()]) in (0, 1)
    out = capsys.readouterr().out
    record = json.loads(out)
    assert str(Path(folder).parent) not in out
    assert str(Path.home()) not in out or str(Path.home()) == "/"
    assert all(record[key] == Path(folder).name for key in keys)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for given, name in (
        ("/home/me/models/tiny", "tiny"),
        ("./tiny", "tiny"),
        (str(tmp_path / "here"), "here"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
        ("demo", "demo"),
        ("", ""),
    ):
        assert without_folders(given) == name
    for given, name in (
        ("SPECSTREAM_BLAS=/home/me/lib/x.so is no BLAS", "SPECSTREAM_BLAS=x.so is no BLAS"),
        ("dlopen('/Users/me/a b/core.so', 2)", "dlopen('a b/core.so', 2)"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("and/or", "and/or"),
    ):
        assert names_of(given) == name
