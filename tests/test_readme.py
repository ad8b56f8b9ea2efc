"""README is true: its script is the example and runs, its table is the presets, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

import fnlm
from cli.main import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.S)
    assert found is not None
    return found.group(1)


def test_the_script_is_the_example() -> None:
    example = (ROOT / "examples/z_loss.py").read_text(encoding="utf-8")
    assert block("python") == example.split('"""', 2)[2].lstrip("\n")


def test_the_script_has_25_lines_of_experiment() -> None:
    script = [line for line in block("python").splitlines() if line and not line.startswith(("import", "from"))]
    assert len(script) <= 25, f"{len(script)} lines"


def test_the_script_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(block("python").replace("range(200)", "range(20)"))
    command = [sys.executable, "-W", "error", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("held-out loss") == 2


def test_the_table_is_the_presets() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| (\d+), (\d+), (\d+) \| (\d+) \| (\d+) \|", README, re.M)
    told = {name: tuple(int(x.replace(",", "")) for x in numbers) for name, *numbers in rows}
    true = {
        name: (fnlm.count(c), c.n_layers, c.n_heads, c.d_model, c.seq_len, c.vocab_size)
        for name, c in fnlm.PRESETS.items()
    }
    assert told == true


def test_every_command_of_the_table_exists() -> None:
    commands = re.findall(r"^\| `fnlm ([a-z]+(?: [a-z]+)?)", README, re.M)
    assert commands
    for command in commands:
        done = CliRunner().invoke(cli, [*command.split(), "--help"])
        assert done.exit_code == 0, (command, done.output)


def test_every_linked_page_exists() -> None:
    pages = re.findall(r"\]\(([^)#:]+)[^):]*\)", README)
    missing = [page for page in pages if not (ROOT / page).exists()]
    assert not missing
