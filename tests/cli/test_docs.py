"""docs/cli.md shows what the commands print, and knows all commands and options."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.main import COMMANDS, cli

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def shown() -> list[tuple[str, list[str]]]:
    """Every command after a `$` with the lines below it; pipes and what one machine prints left out."""
    blocks = [b for b in re.findall(r"```\n(\$ [\s\S]*?)\n```", PAGE) if "doctor" not in b and "|" not in b]
    parts = [part.splitlines() for b in blocks for part in re.split(r"^\$ ", b, flags=re.MULTILINE)[1:]]
    return [(command, lines) for command, *lines in parts]


@pytest.mark.parametrize(("command", "lines"), shown(), ids=[c for c, _ in shown()])
def test_the_output_is_true(command: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()  # a folder without models
    monkeypatch.chdir(tmp_path)  # a checkout may have runs and data, which some messages name
    result = CliRunner().invoke(cli, shlex.split(command)[1:])
    said = (result.stdout or result.stderr).rstrip("\n")
    pattern = "(?:.|\n)*".join(re.escape(part) for part in re.split(r"^\.\.\.$", "\n".join(lines), flags=re.MULTILINE))
    assert re.fullmatch(pattern, said + "\n" if lines[-1] == "..." else said), said


def test_some_output_is_shown() -> None:
    assert len(shown()) >= 6


def test_the_page_knows_every_command_and_option() -> None:
    assert re.findall(r"^## fnlm (\w+)", PAGE, re.MULTILINE) == list(COMMANDS)
    for name in COMMANDS:
        command = importlib.import_module(f"cli.{name}").command
        for part in command.commands.values() if isinstance(command, click.Group) else [command]:
            missing = [o for p in part.params for o in p.opts if o.startswith("--") and o not in PAGE]
            assert not missing, f"docs/cli.md does not name {missing} of {name}"
