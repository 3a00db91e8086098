"""The command line's first word, its exit statuses, and what it never does: import much, or show a traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from mlx_specstream import __version__, cli, exit_status
from mlx_specstream.commands import words as words_module
from mlx_specstream.errors import ModelError, OptionError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Puts a verb `try` in the table whose main is a function of the test."""

    def install(main: Callable[[list[str]], int]) -> None:
        module = ModuleType("tried")
        module.main = main  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tried", module)
        monkeypatch.setitem(cli.VERBS, "try", cli.Verb("tried", "a verb of the tests"))

    return install


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_is_there(name: str) -> None:
    module = importlib.import_module(cli.VERBS[name].module)
    parser = module.build_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert parser.prog == f"specstream {name}"
    assert callable(module.main)
    assert parser.format_help()


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"specstream {name}" in capsys.readouterr().out


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, row in cli.VERBS.items():
        assert any(line.split() == [name, *row.summary.split()] for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"specstream {__version__}\n"


def test_no_verb_and_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out
    assert cli.main(["explode"]) == 2
    assert "'explode'" in capsys.readouterr().err


def test_the_rest_is_the_verbs(verb) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 1

    verb(main)
    assert cli.main(["try", "--help", "-x", "--version"]) == 1
    assert seen == [["--help", "-x", "--version"]]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            ModelError("No model\nat /x; name another."),
            2,
            "specstream: No model at /x; name another.\n",
        ),
        (KeyboardInterrupt(), 130, "specstream: interrupted.\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/x/y"),
            2,
            "specstream: /x/y: No such file or directory.\n",
        ),
    ],
)
def test_errors_are_one_line(
    verb, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str
) -> None:
    def main(argv: list[str]) -> int:
        raise error

    verb(main)
    assert cli.main(["try"]) == status
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden(verb) -> None:
    def main(argv: list[str]) -> int:
        raise ZeroDivisionError

    verb(main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **options)


def test_the_command_ends_without_taking_python_apart() -> None:
    code = (
        "import atexit, sys, types\nfrom mlx_specstream import cli\n"
        "class Slow:\n"
        "    def __del__(self): sys.stderr.write('taken apart')\n"
        "slow = sys.slow = Slow()\n"
        "def main(argv):\n"
        "    atexit.register(print, 'tidied up')\n"
        "    print('done', end=' ')\n"
        "    return 7\n"
        "sys.modules['slow_verb'] = types.SimpleNamespace(main=main)\n"
        "cli.VERBS['slow'] = cli.Verb('slow_verb', '')\n"
        "sys.argv = ['specstream', 'slow']\n"
        "cli.run()\n"
    )
    ended = python(code, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "done tidied up\n", "")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mlx_specstream import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlx', 'mlx_lm', 'numpy', 'transformers', 'torch', 'rich', 'tqdm', 'tokenizers'}\n"
        "sys.exit(repr(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = python(code, capture_output=True)
    assert done.stderr.strip() == "set()"


def test_a_reader_that_goes_away() -> None:
    """`specstream ... | head -1`: quiet, with the status shells give a broken pipe."""
    code = (
        "import sys, types\nfrom mlx_specstream import cli\n"
        "tried = types.ModuleType('tried')\n"
        "tried.main = lambda argv: print('x' * 10**6) or 0\n"
        "sys.modules['tried'] = tried\n"
        "cli.VERBS['try'] = cli.Verb('tried', '')\n"
        "sys.exit(cli.main(['try']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = python(code, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == exit_status.EXIT_BROKEN_PIPE
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["genrate"], "did you mean 'generate'?"),
        (["Chat"], "did you mean 'chat'?"),
        (["lora", "--train"], "specstream train"),
        (["fuse"], "mlx_lm.fuse"),
        (["generate", "--promt", "Hi"], "did you mean --prompt?"),
        (["generate", "--max_tokens=5"], "did you mean --max-tokens?"),
        (["serve", "--prot", "80"], "did you mean --port?"),
        (["server", "--prot", "80"], "did you mean --port?"),
        (["serve", "--allowed-origins", "*"], "--allowed-origin"),
        (["serve", "--use-default-chat-template"], "leave it out"),
        (["convert", "-d"], "mlx_lm.convert"),
        (["convert", "--hf-path", "x", "--trust-remote-code"], "never runs code"),
        (["benchmark", "-g", "8"], "--max-tokens"),
        (["train", "--optimizer", "adam"], "--preset"),
        (["plan", "--xyzzyx"], "specstream plan --help"),
    ],
)
def test_a_word_that_is_wrong_is_answered_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_flags_that_argparse_takes_pass() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-tokens", "-m", type=int)
    parser.add_argument("rest", nargs="*")
    for words in (["--max-tok", "3"], ["--max-tokens=3"], ["-m3"], ["-m", "-1"], ["--", "--odd"]):
        words_module.check_flags("try", words, parser)
    with pytest.raises(OptionError, match="did you mean --max-tokens"):
        words_module.check_flags("try", ["--max-tokns", "3"], parser)


@pytest.mark.parametrize("name", cli.VERBS)
def test_no_flag_of_ours_is_called_mlx_lms(name: str) -> None:
    """What a parser knows is never answered with a sentence."""
    parser = importlib.import_module(cli.VERBS[name].module).build_parser()
    for flag, action in parser._option_string_actions.items():
        if not isinstance(action, argparse._HelpAction):
            words_module.check_flags(name, [flag], parser)


@pytest.mark.parametrize("sentence", words_module.MLX_LM_FLAGS.values())
def test_an_answer_names_flags_that_exist(sentence: str) -> None:
    known = {
        flag
        for verb in cli.VERBS.values()
        for flag in importlib.import_module(verb.module).build_parser()._option_string_actions
    }
    named = re.findall(r"(?<!\S)--[a-z-]+", sentence)
    assert set(named) <= known
