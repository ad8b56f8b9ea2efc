"""The frame of the command line: what is imported when, the list of commands, errors as lines, exit codes, colour."""

from __future__ import annotations

import importlib
import os
import pty
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fnlm
from cli import main as cli_main
from cli.main import COMMANDS, cli
from fnlm.checkpoint import CheckpointError
from fnlm.data import DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """`fnlm inspect` raises what is put into the list."""
    todo: list[BaseException] = []

    @click.command()
    def command() -> None:
        raise todo[0]

    monkeypatch.setattr(importlib.import_module("cli.inspect"), "command", command)
    return todo


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["-h"], [], ["inspct"]])
def test_the_frame_imports_neither_torch_nor_fnlm(words: list[str]) -> None:
    program = (
        "import sys\nfrom cli.main import main\n"
        f"sys.argv[1:] = {words!r}\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(repr(sorted({'torch', 'numpy', 'pydantic', 'fnlm'} & set(sys.modules))))"
    )
    result = python("-c", program)
    assert result.stderr.endswith("[]"), result.stderr


def test_help_comes_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert python("-m", "cli", "--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.4


def test_help_lists_the_commands_in_the_order_of_the_work() -> None:
    out = CliRunner().invoke(cli, ["--help"]).stdout
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(COMMANDS)
    assert out == CliRunner().invoke(cli, []).stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_list_says_what_the_command_says(name: str) -> None:
    command = importlib.import_module(f"cli.{name}").command
    assert (command.help or "").splitlines()[0] == COMMANDS[name]
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert COMMANDS[name] in result.stdout
    assert all(p.help for p in command.params if isinstance(p, click.Option)), "an option without help"


def test_python_m_is_the_same_as_the_script() -> None:
    module, script = python("-m", "cli", "--version"), python("-c", "from cli.main import main; main()", "--version")
    assert module.stdout == script.stdout == f"fnlm {fnlm.__version__}\n"
    (entry,) = metadata.entry_points(group="console_scripts", name="fnlm")
    assert entry.load() is cli_main.main


def test_the_version_is_known_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert CliRunner().invoke(cli, ["--version"]).stdout == f"fnlm {fnlm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["inspct"], "error: there is no command 'inspct'; did you mean 'inspect'? See 'fnlm --help'"),
        (["zzz"], f"error: there is no command 'zzz'; choose from {', '.join(COMMANDS)}; see 'fnlm --help'"),
        (["bench", "stp"], "error: there is no command 'stp'; did you mean 'step'? See 'fnlm bench --help'"),
    ],
)
def test_an_unknown_command_gets_the_nearest(words: list[str], line: str) -> None:
    result = CliRunner().invoke(cli, words)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", line + "\n")


def test_an_unknown_option_is_a_usage_error() -> None:
    for words in (["--quik"], ["doctor", "--quik"], ["doctor", "more"], ["bench", "step", "--quik"]):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert "--help'" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (ValueError("n_heads=5 does not divide;\n  choose 4"), "n_heads=5 does not divide; choose 4", 2),
        (ValueError(), "ValueError", 2),
        (DataError("a.txt is empty"), "a.txt is empty", 4),
        (CheckpointError("00000010 is damaged:\n  all of it"), "00000010 is damaged: all of it", 4),
        (FileNotFoundError(2, "No such file or directory", "x.toml"), "x.toml: No such file or directory", 1),
        (OSError(28, "No space left on device"), "No space left on device", 1),
        (OSError("the server hung up"), "the server hung up", 1),
        (click.ClickException("nanogpt-best ended"), "nanogpt-best ended", 1),
        (click.UsageError("No such thing."), "No such thing; see 'fnlm inspect --help'", 2),
        (click.UsageError("No such thing?"), "No such thing? See 'fnlm inspect --help'", 2),
        (click.Abort(), "interrupted", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_an_error_is_one_line_and_a_code(
    failing: list[BaseException], error: BaseException, line: str, code: int
) -> None:
    failing.append(error)
    result = CliRunner().invoke(cli, ["inspect"])
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (code, "", f"error: {line}")


def test_a_table_stands_above_the_line(failing: list[BaseException]) -> None:
    failing.append(CheckpointError("10 does not fit: 2 rows\n  shape  head  8x8\n  extra  norm\nuse its own model"))
    result = CliRunner().invoke(cli, ["inspect"])
    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        "  shape  head  8x8",
        "  extra  norm",
        "error: 10 does not fit: 2 rows; use its own model",
    ]


@pytest.mark.parametrize("words", [["--debug", "inspect"], ["inspect", "--debug"]])
def test_debug_shows_where_an_error_arose(failing: list[BaseException], words: list[str]) -> None:
    failing.append(ValueError("wrong"))
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("ValueError: wrong\nerror: wrong\n")


def test_a_bug_keeps_its_traceback(failing: list[BaseException]) -> None:
    failing.append(KeyError("oops"))
    assert isinstance(CliRunner().invoke(cli, ["inspect"]).exception, KeyError)


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        result = subprocess.run(
            [sys.executable, "-m", "cli", "--help"], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "")


def test_colour_only_on_a_terminal_that_wants_it() -> None:
    escape = "\x1b["
    assert escape in on_a_terminal(NO_COLOR="")
    assert escape not in on_a_terminal(NO_COLOR="1")
    assert escape not in python("-m", "cli", "inspct").stderr


def on_a_terminal(**environment: str) -> str:
    """What `fnlm inspct` says on stderr to a terminal."""
    mine, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment | {"TERM": "xterm"}
    subprocess.run([sys.executable, "-m", "cli", "inspct"], cwd=ROOT, env=environment, stderr=theirs)
    os.close(theirs)
    with open(mine, "rb", buffering=0) as terminal:
        said = terminal.read(4096)
    assert b"inspct" in said
    return said.decode()
