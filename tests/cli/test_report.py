"""`fnlm report`: a file is written whole, its path printed, and mistakes are one line."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import cli


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, loss in (("one", 2.125), ("two", 3.5)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(f'{{"step": 1, "val/loss": {loss}}}\n')
    return tmp_path


def fnlm(*words: str) -> Result:
    return CliRunner().invoke(cli, ["report", *words])


def test_the_page_is_written_and_its_path_printed(here: Path) -> None:
    result = fnlm("runs/one", "runs/two")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "report.html\n", "")
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "2.1250" in page
    assert "3.5000" in page
    assert fnlm("runs/two", "--out", "pages/two.html").stdout == "pages/two.html\n"
    assert "2.1250" not in (here / "pages" / "two.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in here.iterdir()) == ["pages", "report.html", "runs"]
    assert fnlm("runs/one").exit_code == 0  # replaced


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_cannot_be_written_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Path, page: bytes) -> None:
        with open("/dev/full", "wb", 0) as full:
            full.write(page)

    monkeypatch.setattr(Path, "write_bytes", write)
    result = fnlm("runs/one", "--out", "new/page.html")
    assert (result.exit_code, result.stderr) == (1, "error: new/page.html: No space left on device\n")
    assert not list(Path("new").iterdir())


def test_it_is_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: seen.append(address) or len(seen) == 1)
    assert fnlm("runs/one", "--open").stderr == ""
    assert seen == [(here / "report.html").as_uri()]
    result = fnlm("runs/one", "--open")
    assert result.exit_code == 0
    assert result.stderr == f"no browser was found; open {seen[0]}\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "error: name a run, such as runs/demo; see 'fnlm report --help'\n"),
        (("runs/on",), 4, "error: there is no runs/on; did you mean 'one'?\n"),
        (("runs",), 4, "error: runs is no run: it has no metrics.jsonl; name a folder such as runs/demo\n"),
        (
            ("runs/one", "--out", "runs"),
            2,
            "error: --out runs is a folder; name a file in it, such as runs/report.html\n",
        ),
    ],
)
def test_mistakes_are_one_line(here: Path, words: tuple[str, ...], code: int, says: str) -> None:
    result = fnlm(*words)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", says)
    assert not (here / "report.html").exists()
