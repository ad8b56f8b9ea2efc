"""How the C library comes about: where it is kept, and what happens where it cannot be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fnlm
from fnlm.clib import build
from fnlm.decode import decode, init_cache, prepare
from tests.reference import random_tokens

COPIES = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
test "$1" = --version && { echo cc 1; exit; }
while test "$1" != -o; do shift; done
echo library > "$2"
"""


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    build._version.cache_clear()
    yield
    build.library.cache_clear()
    build._version.cache_clear()


def program(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "cc").write_text(text)
    (folder / "cc").chmod(0o755)
    return str(folder / "cc")


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    cc = program(tmp_path / "bin", COPIES)
    first, again = build.built("step", cc), build.built("step", cc)
    assert first == again
    assert (first.read_text(), first.parent) == ("library\n", tmp_path / "cache" / "fnlm")
    compiled = [line for line in (tmp_path / "bin" / "calls").read_text().splitlines() if line != "--version"]
    assert len(compiled) == 1
    assert "-march=native" in compiled[0]
    assert list(first.parent.iterdir()) == [first]  # no drafts
    program(tmp_path / "bin", COPIES.replace("cc 1", "cc 2"))
    build._version.cache_clear()
    assert build.built("step", cc) != first  # another compiler
    assert build.built("step", cc, options=["-DFNLM_PORTABLE"]) != build.built("step", cc)


def test_a_compiler_that_does_not_know_the_processor(tmp_path: Path) -> None:
    cc = program(tmp_path / "bin", COPIES.replace("while", 'case "$*" in *=native*) exit 1;; esac\nwhile'))
    assert build.built("step", cc).is_file()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cc = program(tmp_path / "bin", COPIES)
    path = build.built("step", cc)
    assert (path.is_file(), path.parent.parent, build.built("step", cc)) == (True, tmp_path, path)
    path.parent.chmod(0o777)  # others could have put something there
    assert build.built("step", cc).parent != path.parent


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no C compiler (cc, gcc, clang)"),
        ("#!/bin/sh\ntest $1 = --version && exit\necho step.c:1: error: no such thing >&2\nexit 1\n", "no such thing"),
        (COPIES, "invalid ELF header"),
        ("#!/bin/sh\nexit 3\n", "failed: without a word"),
    ],
)
def test_without_a_library_torch_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, says: str
) -> None:
    if text is not None:
        program(tmp_path / "bin", text)
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / "bin" / name) if text and name == "cc" else None)
    status = build.library("step")
    assert status.library is None
    assert says in status.says or (says.startswith("invalid ELF") and "step-" in status.says)
    assert "\n" not in status.says
    cfg = fnlm.PRESETS["shakespeare-char-cpu"]
    cfg = fnlm.override(cfg, n_layers=1, d_model=16, n_heads=2)
    params = fnlm.init_params(cfg, fnlm.key(0))
    ready = prepare(params, cfg)
    assert ready.native is None
    tokens = random_tokens(cfg.vocab_size, 1, 3)
    cache = init_cache(cfg, 1)
    for t in range(3):
        logits, cache = decode(ready, tokens[:, t : t + 1], cfg, cache)
    torch.testing.assert_close(logits, fnlm.forward(params, tokens, cfg)[:, -1], rtol=1e-4, atol=1e-4)
