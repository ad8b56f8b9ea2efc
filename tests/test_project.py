"""The files around the code agree with it and with each other: sizes, docstrings, paths, versions, targets, pins."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LINES_IN_FILE, LINES_IN_FUNCTION = 300, 60
# The optional parts of torch's CUDA build: torch requires them at exact versions.
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|tmp|work)(?=[/\s\"'`:)]|$)", re.MULTILINE)
REGISTRY = re.compile(
    r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|pypi\.nvidia\.com|anaconda\.org|npmjs\.(?:org|com)"
    r"|(?:deb|security)\.debian\.org)\b"
)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


def code(*tops: str) -> Iterator[tuple[str, str]]:
    """Every source file below these folders as (path, text)."""
    for top in tops:
        for p in sorted((ROOT / top).rglob("*")):
            if p.suffix in {".py", ".js", ".css", ".html"}:
                yield p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    return [f for f in listing.stdout.split("\0") if f and (ROOT / f).is_file()]


# Code


def undocumented(path: str, source: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in ast.parse(source).body if isinstance(n, kinds) and not n.name.startswith("_")]
    return [f"{path}:{n.lineno}: {n.name} has no docstring" for n in public if not ast.get_docstring(n)]


def oversized(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    found = [f"{path} has {lines} lines: is it one concept?"] if lines > LINES_IN_FILE else []
    for node in ast.walk(ast.parse(source)) if path.endswith(".py") else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{path}:{node.lineno}: {node.name} has {length} lines"] if length > LINES_IN_FUNCTION else []
    return found


def test_what_is_public_has_a_docstring() -> None:
    assert not [c for path, text in code("fnlm") if path.endswith(".py") for c in undocumented(path, text)]
    assert undocumented("x.py", "def f(): ...\nclass C:\n    'said'\ndef _g(): ...") == ["x.py:1: f has no docstring"]


def test_files_and_functions_are_small() -> None:
    assert not [c for path, text in code("fnlm", "cli", "webui") for c in oversized(path, text)]
    assert oversized("x.py", "def f():\n" + "    1\n" * 60) == ["x.py:1: f has 61 lines"]
    assert oversized("x.css", "\n" * 301) == ["x.css has 301 lines: is it one concept?"]


def test_no_file_knows_one_machine() -> None:
    found = []
    for path in tracked():
        text = (ROOT / path).read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path}: registry {hit}" for hit in REGISTRY.findall(text)]
        if not path.startswith("tests/"):
            found += [f"{path}: machine path {hit}" for hit in MACHINE_PATH.findall(text)]
    assert not found
    assert MACHINE_PATH.findall("see /tmp/x, '/home/me' and /work") == ["/tmp", "/home", "/work"]
    assert not MACHINE_PATH.findall("opt/work/x ./tmp $HOME/work https://host/home /workers")
    assert REGISTRY.findall("--index-url https://download.py" + "torch.org/whl/cpu")


# Dependencies


def requirements(*extras: str) -> list[Requirement]:
    optional = project()["optional-dependencies"]
    return [Requirement(r) for group in (project()["dependencies"], *(optional[e] for e in extras)) for r in group]


def pins() -> dict[str, list[Requirement]]:
    """The constraints by canonical name; more than one where the version of Python decides."""
    found: dict[str, list[Requirement]] = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def pinned_version(pin: Requirement) -> str:
    (spec,) = pin.specifier
    assert spec.operator == "==", f"constraints.txt: {pin} is not exact"
    return spec.version


def closure(todo: list[Requirement]) -> set[str]:
    """The names of all installed distributions that these requirements bring, directly or not."""
    seen: set[tuple[str, str]] = set()
    while todo:
        req = todo.pop()
        name = canonicalize_name(req.name)
        for extra in {"", *req.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            listed = [Requirement(r) for r in importlib.metadata.requires(name) or ()]
            todo += [r for r in listed if r.marker is None or r.marker.evaluate({"extra": extra})]
        todo = [r for r in todo if not canonicalize_name(r.name).startswith(PINNED_BY_TORCH)]
    return {name for name, _ in seen}


def test_constraints_pin_every_dependency() -> None:
    pinned = pins()
    for req in requirements(*project()["optional-dependencies"]):
        versions = [pinned_version(p) for p in pinned.get(canonicalize_name(req.name), [])]
        assert versions, f"{req} is in pyproject.toml and has no pin in constraints.txt"
        assert all(v in req.specifier for v in versions), f"constraints.txt has {versions}, pyproject.toml wants {req}"
    assert [str(p) for p in pinned["torch"]] == ["torch==2.13.0"]


def test_constraints_pin_what_the_dependencies_bring() -> None:
    missing = closure([r for r in requirements("dev") if r.marker is None or r.marker.evaluate()]) - set(pins())
    assert not missing, f"constraints.txt has no pin for {sorted(missing)}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_one_pin_for_every_python(python: str) -> None:
    environment = {"python_version": python, "python_full_version": python + ".0"}
    for name, choices in pins().items():
        fitting = [p for p in choices if p.marker is None or p.marker.evaluate(environment)]
        assert len(fitting) <= 1, f"constraints.txt has {[str(p) for p in fitting]} for Python {python}"
        assert fitting or python == "3.10" or name in {"exceptiongroup", "tomli"}, f"no {name} for Python {python}"


def test_every_dependency_is_explained() -> None:
    explained = set(re.findall(r"^\| `([\w.-]+)`", read("docs/dependencies.md"), re.MULTILINE))
    listed = {r.name for r in requirements(*project()["optional-dependencies"])}
    assert explained == listed, f"docs/dependencies.md and pyproject.toml differ in {sorted(explained ^ listed)}"


# The frame


def test_every_file_names_the_same_python() -> None:
    floor = project()["requires-python"].removeprefix(">=")
    major, minor = floor.split(".")
    assert f"python>={floor}" in read("environment.yml")
    assert f"Python >= {floor}" in read("requirements.txt")
    assert f'target-version = "py{major}{minor}"' in read("pyproject.toml")
    assert f">= ({major}, {minor})" in read("Makefile")
    assert f"Python :: {floor}" in " ".join(project()["classifiers"])
    image = re.search(r"^FROM python:(\d+)\.(\d+)-slim$", read("Dockerfile"), re.MULTILINE)
    assert image is not None
    assert (int(image[1]), int(image[2])) >= (int(major), int(minor))


def test_every_install_is_constrained() -> None:
    installs = [
        f"{path}: {line}"
        for path in ("Makefile", "Dockerfile", "README.md", "CONTRIBUTING.md")
        if (ROOT / path).exists()
        for line in read(path).splitlines()
        if re.search(r"pip install\b.*(?:[\s\"']\.|\btorch\b|fnlm\b)", line) and "-c constraints.txt" not in line
    ]
    assert not installs
    assert "-c constraints.txt" in read("requirements.txt")


def test_the_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## .*$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0].startswith("## [Unreleased]")
    numbers = re.findall(r"\d+\.\d+\.\d+", " ".join(headings))
    assert numbers[:1] == [project()["version"]]


def test_pages_name_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.MULTILINE))
    assert {"demo", "test", "test-all", "check", "bench", "serve", "help"} <= targets
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run"):
        text = read(page) if (ROOT / page).exists() else ""
        shown = re.findall(r"```[\s\S]*?```|`[^`\n]+`|^ {4}.*$|^make .*$", text, re.MULTILINE)
        named = {m for part in shown for m in re.findall(r"\bmake ([a-z][\w-]*)", part)}
        assert named <= targets, f"{page} names {sorted(named - targets)}, which Makefile does not have"


def test_ci_runs_what_the_pages_promise() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run is not executable"
    lines = read(".ci/run").splitlines()
    assert "make test" in lines
    assert lines.index("make test") < lines.index("make check") < lines.index("make test-slow")
