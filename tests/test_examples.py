"""Every example runs, small, and what it prints is what it claims."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fnlm

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NUMBER = r"-?\d+\.?\d*(?:e[-+]\d+)?"


class Run:
    """Runs an example in this process, where warnings are errors; the names it defined, and the text it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, steps: int | None = None) -> tuple[dict[str, Any], str]:
        path = str(EXAMPLES / f"{name}.py")
        self.monkeypatch.setattr(sys, "argv", [path] + ([] if steps is None else ["--steps", str(steps)]))
        with torch.random.fork_rng(devices=[]):
            names = runpy.run_path(path, run_name="__main__")
        return names, self.capsys.readouterr().out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers that `#` stands for, wherever the pattern occurs."""
    found = re.findall(pattern.replace("#", f"({NUMBER})"), text)
    return [float(x) for hit in found for x in ([hit] if isinstance(hit, str) else hit)]


def test_a_z_loss_holds_the_normaliser_near_one(run: Run) -> None:
    _, out = run("z_loss")
    plain, plain_z, ours, ours_z = numbers(r"held-out loss #\s+mean \|log Z\| #", out)
    assert max(plain, ours) < 1.2, "neither has learnt: knowing nothing costs 3.47"
    assert ours < plain + 0.1
    assert ours_z < 0.3 * plain_z


def test_the_shuffled_row_has_the_largest_gradient(run: Run) -> None:
    names, out = run("per_sample_gradients", steps=20)
    (planted, found, times) = numbers(r"shuffled row is #; .* row #, # times", out)
    assert found == planted == names["ODD"]
    assert times > 5
    assert numbers(r"differ by #", out)[0] < 1e-6


def test_a_new_optimizer_learns(run: Run) -> None:
    _, out = run("new_optimizer", steps=60)
    ours, adamw, nothing = numbers(r"held-out loss #", out)
    assert abs(nothing - torch.tensor(32).log().item()) < 1e-3
    assert max(ours, adamw) < 2.5
    tree = ast.parse((EXAMPLES / "new_optimizer.py").read_text(encoding="utf-8"))
    (new,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "scale_by_unit_rms")
    assert new.end_lineno is not None and new.end_lineno - new.lineno + 1 <= 10


def test_a_lifted_module_trains_as_under_torch(run: Run) -> None:
    _, out = run("lift_a_module", steps=30)
    assert "5 entries for 6 names" in out
    (ours, theirs) = numbers(r"ours #, torch's own #", out)
    assert ours < 2.5 and ours == pytest.approx(theirs, abs=1e-3)
    assert numbers(r"differ by at most #", out)[0] < 1e-4


def test_an_ensemble_beats_its_members_and_each_is_as_trained_alone(run: Run) -> None:
    e, out = run("ensemble_by_vmap", steps=8)
    members = numbers("#", out.splitlines()[0])
    (mean, spread, together) = numbers(r"mean #, spread \(standard deviation\) #, averaged together #", out)
    assert len(members) == 8 and mean == pytest.approx(sum(members) / 8, abs=1e-3)
    assert together < mean and spread > 0
    params = fnlm.init_params(e["cfg"], fnlm.split(fnlm.key(0), 8)[3])
    opt_state = e["optimizer"].init(params)
    for i in range(8):
        params, opt_state, _ = e["step"](params, opt_state, e["make_batch"](fnlm.fold_in(fnlm.key(1), i)))
    for name, p in params.items():
        torch.testing.assert_close(e["params"][name][3], p, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, at its first jvp
def test_the_largest_eigenvalue(run: Run) -> None:
    h, out = run("hessian_vector", steps=25)
    (eigenvalue, differences) = numbers(r"lambda = #, by differences of gradients #", out)
    assert eigenvalue > 1 and eigenvalue == pytest.approx(differences, rel=1e-5)
    assert numbers(r"/ lambda = #", out)[0] < 1e-2
    for i in range(3):  # no direction is curved more
        v = fnlm.init_params(h["cfg"], fnlm.key(50 + i), dtype=torch.float64)
        curved = h["jvp"](h["grad"](h["loss"]), (h["state"].params,), (v,))[1]
        assert abs(h["dot"](v, curved)) < eigenvalue * h["dot"](v, v)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_short_page(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert len(text.splitlines()) <= 60
    imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body[1:]]
    assert imports == sorted(imports, reverse=True), "imports stand at the top"
    assert not any(
        isinstance(n, (ast.Import, ast.ImportFrom)) for top in tree.body for n in ast.walk(top) if n is not top
    )


def test_the_z_loss_is_a_script_of_25_lines() -> None:
    lines = (EXAMPLES / "z_loss.py").read_text(encoding="utf-8").splitlines()
    last_import = max(i for i, line in enumerate(lines) if line.startswith(("import", "from")))
    code = [line for line in lines[last_import + 1 :] if line.strip() and not line.strip().startswith("print(")]
    assert len(code) <= 25


def test_the_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", page, re.MULTILINE)) == NAMES


def test_every_example_is_tested() -> None:
    assert set(re.findall(r' run\("(\w+)"', Path(__file__).read_text(encoding="utf-8"))) == set(NAMES)
