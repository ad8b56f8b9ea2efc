"""Imports go downwards only, and no room holds what it must not (docs/design.md). The source is read, not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a file may import what stands on lower floors. `|` parts siblings, which do not import each other;
# in `a < b`, b may import a. A package (optim, data, ...) is one room: inside it, files import each other freely.
FLOORS = (
    "types",
    "tree",
    "machine < clib | held | pages",
    "random < dropout | environment | fields < names < config < overrides | collectives | compiling | kernels",
    "attended < attention < blocked < rotary < places < ngrams < linear < mlp < norms < embedding < sublayers < "
    "forward < losses | optim | "
    "sharding | tokenizers | world | cleaning",
    "params < lora < trainable < presets | sampling | merging | data | quantize | "
    "cache < cached < native < prepared < lowered < decode",
    "links < step < sharded_optim < sharded < forecast < elastic | tokens < speculate < generate | evaluate | "
    "checkpoint < interop < trained < growing | lift | budget",
    "track < loop | report | evaluation | benchmark_peers < benchmark_strategies | "
    "benchmark_report < benchmark_contestants < benchmark_worker < benchmark",
    "fnlm",  # fnlm/__init__.py, the public names
    "cli | webui",
)
MAY_ALSO = {("cli/serve.py", "webui"), ("cli/chat.py", "webui")}  # to start it; its engine
DISTRIBUTED = {"fnlm/collectives.py", "fnlm/sharding/mesh.py", "fnlm/sharding/processes.py"}
PYTORCHS_OWN = {"fnlm/sharding/torch_ddp.py", "fnlm/benchmark_peers.py"}  # what ours is measured beside
READS_ENVIRONMENT = {
    "config",
    "machine",
    "clib",
    "environment",
    "sharding",
    "data",
    "interop",
    "evaluate",
    "loop",
    "track",
    "cli",
    "webui",
}
READS_ENVIRONMENT |= {"benchmark", "benchmark_contestants", "benchmark_worker"}
PICKLES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "torch.save", "torch.load"}


def table() -> dict[str, set[str]]:
    """For every room, the rooms that it may import."""
    allowed: dict[str, set[str]] = {}
    for floor in FLOORS:
        below = set(allowed)
        for stack in floor.split("|"):
            rooms = [room.strip() for room in stack.split("<")]
            allowed |= {room: below | set(rooms[:i]) for i, room in enumerate(rooms)}
    return allowed


ALLOWED = table()


def room_of(path: str) -> str:
    """`fnlm/optim/adam.py` is in `optim`, `fnlm/step.py` in `step`, `cli/train.py` in `cli`."""
    top, *rest = path.removesuffix(".py").split("/")
    return rest[0] if top == "fnlm" and rest != ["__init__"] else top


def room_named(module: str) -> str | None:
    """The room of an imported dotted name; None for what is not ours. A name that is no room is of `fnlm` itself."""
    top, *rest = module.split(".")
    if top != "fnlm":
        return top if top in {"cli", "webui"} else None
    return rest[0] if rest and (rest[0] in ALLOWED or len(rest) > 1) else "fnlm"


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Every imported name as (line, dotted name), relative ones made absolute, also those inside functions."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every dotted expression as (line, text): `torch.save`, `os.environ`, `os.environ.get`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and all(
            isinstance(n, (ast.Attribute, ast.Name, ast.Load)) for n in ast.walk(node)
        ):
            yield node.lineno, ast.unparse(node)


def is_below(name: str, banned: set[str]) -> bool:
    return any(name == b or name.startswith(b + ".") for b in banned)


def wrong_imports(path: str, tree: ast.AST) -> Iterator[str]:
    room = room_of(path)
    if room not in ALLOWED:
        yield f"{path}: {room!r} stands on no floor; add it to FLOORS in tests/test_layers.py, as low as it can stand"
        return
    may = ", ".join(sorted(ALLOWED[room])) or "nothing of ours"
    for line, name in imports(tree, path):
        target = room_named(name)
        if target is not None and target != room and target not in ALLOWED[room] and (path, target) not in MAY_ALSO:
            remedy = f"it may import: {may}. Move what both need to a lower floor, or pass it as an argument"
            yield f"{path}:{line}: {room} may not import {target}; {remedy}"


def wrong_names(path: str, tree: ast.AST) -> Iterator[str]:
    for line, name in [*imports(tree, path), *attributes(tree)]:
        at = f"{path}:{line}"
        if (
            path.startswith("fnlm/")
            and path not in DISTRIBUTED | PYTORCHS_OWN
            and is_below(name, {"torch.distributed"})
        ):
            yield f"{at}: only {' and '.join(sorted(DISTRIBUTED))} name torch.distributed; use the verbs there"
        if not path.startswith("fnlm/interop/") and is_below(name, PICKLES):
            yield f"{at}: {name} reads or writes pickles; use safetensors and JSON"
        if room_of(path) not in READS_ENVIRONMENT and is_below(name, {"os.environ", "os.getenv"}):
            yield f"{at}: the model reads no environment variable; make it an argument or a field of the config"


def wrong_statements(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield f"{path}:{node.lineno}: NotImplementedError: write it, or refuse it with ValueError and the remedy"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"{path}:{node.value.lineno}: allow_pickle: use safetensors, or a plain array"
        if isinstance(node, ast.ExceptHandler) and swallows(node):
            yield f"{path}:{node.lineno}: swallows every error; name the one that is expected"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything and does nothing: the body is `pass`, `...` or `continue`."""
    broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
    idle = all(isinstance(s, (ast.Pass, ast.Continue)) or ast.unparse(s) == "..." for s in handler.body)
    return broad and idle


def complaints(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return sorted({*wrong_imports(path, tree), *wrong_names(path, tree), *wrong_statements(path, tree)})


def sources() -> list[Path]:
    return sorted(p for top in ("fnlm", "cli", "webui") for p in (ROOT / top).rglob("*.py"))


def test_layers_hold() -> None:
    found = [c for p in sources() for c in complaints(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("fnlm/forward.py", "from fnlm.losses import lm_loss", "forward may not import losses"),
        ("fnlm/optim/adam.py", "def f():\n    from fnlm.sharding import plan", "2: optim may not import sharding"),
        ("fnlm/optim/adam.py", "from ..tokenizers import bpe", "optim may not import tokenizers"),
        ("fnlm/optim/adam.py", "from .. import step", "optim may not import step"),
        ("fnlm/sharding/mesh.py", "import fnlm.forward", "sharding may not import forward"),
        ("fnlm/step.py", "from fnlm import loop", "step may not import loop"),
        ("fnlm/tree.py", "from fnlm import Params", "tree may not import fnlm"),
        ("fnlm/loop.py", "import webui.app", "loop may not import webui"),
        ("webui/app.py", "from cli.main import main", "webui may not import cli"),
        ("cli/train.py", "from webui import app", "cli may not import webui"),
        ("fnlm/novelty.py", "", "'novelty' stands on no floor"),
        ("fnlm/novelty/deep.py", "", "'novelty' stands on no floor"),
        ("fnlm/step.py", "import torch.distributed as dist", "name torch.distributed"),
        ("fnlm/step.py", "from torch import distributed", "name torch.distributed"),
        ("fnlm/step.py", "import torch\ntorch.distributed.barrier()", "2: only"),
        ("fnlm/checkpoint.py", "import pickle", "pickles"),
        ("fnlm/checkpoint.py", "torch.save({}, 'x')", "torch.save reads or writes pickles"),
        ("webui/app.py", "from torch import load", "torch.load reads or writes pickles"),
        ("fnlm/data/pack.py", "np.load(p, allow_pickle=True)", "allow_pickle"),
        ("fnlm/forward.py", "import os\nx = os.environ.get('X')", "no environment variable"),
        ("fnlm/optim/sgd.py", "from os import getenv", "no environment variable"),
        ("cli/main.py", "raise NotImplementedError('later')", "NotImplementedError"),
        ("cli/main.py", "try:\n    f()\nexcept Exception:\n    pass", "swallows every error"),
        ("cli/main.py", "for x in y:\n    try:\n        f()\n    except:\n        continue", "swallows every error"),
    ],
)
def test_a_breach_is_found(path: str, source: str, says: str) -> None:
    assert any(says in c for c in complaints(path, source)), complaints(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fnlm/losses.py", "from fnlm.forward import hidden\nfrom fnlm.types import Batch"),
        (
            "fnlm/optim/adam.py",
            "from . import base\nfrom .base import chain\nfrom fnlm import tree\nimport torch, math",
        ),
        ("fnlm/collectives.py", "import torch.distributed as dist"),
        ("fnlm/interop/nanogpt.py", "import torch\ntorch.load('ckpt.pt', weights_only=True)"),
        ("fnlm/config.py", "import os\nos.environ.get('FNLM_SEED')"),
        ("fnlm/__init__.py", "from fnlm.loop import fit"),
        ("cli/serve.py", "from webui.app import create_app\nimport fnlm"),
        ("cli/main.py", "try:\n    f()\nexcept OSError:\n    pass"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert complaints(path, source) == []


def test_a_room_stands_on_one_floor() -> None:
    named = [room.strip() for floor in FLOORS for stack in floor.split("|") for room in stack.split("<")]
    assert len(named) == len(set(named))
    assert set(named) >= READS_ENVIRONMENT
