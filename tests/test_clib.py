"""What the C libraries do is what the Python they stand for does; without them everything goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fnlm
from fnlm import clib, optim
from fnlm.clib import build
from fnlm.optim.fused import in_place

LIBRARIES = sorted(path.stem for path in Path(clib.__file__).parent.glob("*.c"))
needs = pytest.mark.skipif(clib.library("adam").library is None, reason=clib.library("adam").says)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a compiler."""
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@needs
@pytest.mark.parametrize("n", [0, 1, 3, 5, 255, 256, 257, 1 << 14, (1 << 15) + 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_normal_numbers(n: int, threads: int) -> None:
    key, before = fnlm.key(2**40 + n), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine = fnlm.random.normal(key, (n,))
    finally:
        torch.set_num_threads(before)
    plain = torch.vmap(lambda k: fnlm.random.normal(k, (n,)))(key[None])[0]  # traced: in torch's own operations
    assert torch.equal(mine, plain)


@needs
def test_a_million_normal_numbers_far_into_a_draw() -> None:
    x = fnlm.random.normal(fnlm.key(3), (1 << 20,))
    assert x.isfinite().all()
    assert abs(float(x.mean())) < 4e-3
    assert abs(float(x.var()) - 1) < 6e-3
    assert 4.2 < float(x.abs().max()) <= 6.8


@needs
def test_every_way_of_drawing_agrees(no_library: None) -> None:
    plain = fnlm.random.normal(fnlm.key(5), (40_000,))
    assert clib.library("normal").library is None
    build.library.cache_clear()
    build.shutil.which = shutil.which
    assert torch.equal(fnlm.random.normal(fnlm.key(5), (40_000,)), plain)


def leaves(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"a": (70, 33), "b": (5,), "c": (40_000,), "d": ()}
    return {k: fnlm.random.normal(fnlm.fold_in(fnlm.key(1), i), s).to(dtype) for i, (k, s) in enumerate(shapes.items())}


@needs
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [None, torch.bfloat16])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_is_the_pure_chain(grads: torch.dtype, moments: torch.dtype | None, clip: float | None) -> None:
    links = {"adam": optim.scale_by_adam(0.9, 0.95, moments_dtype=moments), "decay": optim.add_decayed_weights(0.1)}
    links |= {"rate": optim.scale(1e-2)}
    chain = optim.chain(**({} if clip is None else {"clip": optim.clip_by_global_norm(clip)}), **links)
    params = leaves(torch.float32)
    pure, donated = dict(params), {k: p.clone() for k, p in params.items()}
    pure_state, state, update = chain.init(pure), chain.init(donated), in_place(chain)
    for _ in range(4):
        g = {k: (p * 0.3 + 0.01).to(grads) for k, p in pure.items()}
        wide = {k: x.float() for k, x in g.items()}
        updates, pure_state = chain.update(wide, pure_state, pure)
        pure = optim.apply_updates(pure, updates)
        state = update({k: x.clone() for k, x in g.items()}, state, donated)
    for k in params:
        flips = 2e-4 if moments else 2e-7  # a moment at a tie of bfloat16 may go the other way
        torch.testing.assert_close(donated[k], pure[k], rtol=2e-6, atol=flips)
        assert float((donated[k] - pure[k]).abs().mean()) <= 1e-6
        torch.testing.assert_close(state["adam"].nu[k].float(), pure_state["adam"].nu[k].float(), rtol=1e-2, atol=1e-9)


@needs
def test_the_library_is_taken_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(clib, "adamw_", lambda *a, _real=clib.adamw_, **k: done.append(_real(*a, **k)) or done[-1])
    chain, params = optim.adamw(1e-2, clip=1.0), leaves(torch.float32)
    in_place(chain)({k: p.bfloat16() for k, p in params.items()}, chain.init(params), params)
    assert done
    assert all(done)


@needs
def test_what_it_does_not_know_is_left_alone() -> None:
    p, g = torch.ones(6, 4), torch.ones(6, 4)
    words = {"rate": 0.1, "b1": 0.9, "b2": 0.9, "eps": 1e-8, "decay": 0.0, "count": 1}
    m, v = torch.zeros(6, 4), torch.zeros(6, 4)
    assert not clib.adamw_([p.double()], [g], [m], [v], **words)
    assert not clib.adamw_([p], [g.half()], [m], [v], **words)
    assert not clib.adamw_([p], [g], [m], [v.bfloat16()], **words)
    assert not clib.adamw_([p], [g.T.contiguous().T], [m], [v], **words)  # another order in memory
    assert not clib.adamw_([p[:, ::2]], [g[:, ::2]], [m[:, ::2]], [v[:, ::2]], **words)
    assert torch.equal(p, torch.ones(6, 4))
    assert clib.square_sum([p.half()]) is None
    assert clib.square_sum([p[:, ::2]]) is None
    assert clib.square_sum([p.double()]) is None


@needs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squares(dtype: torch.dtype) -> None:
    tensors = [*leaves(dtype).values(), fnlm.random.normal(fnlm.key(9), (31, 77)).to(dtype).T]
    want = float(sum(t.double().square().sum() for t in tensors))
    sums = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sums.append(clib.square_sum(tensors))
    torch.set_num_threads(1)
    assert sums[0] == sums[1] == pytest.approx(want, rel=1e-7)
    assert clib.square_sum([torch.full((3,), torch.inf)]) == torch.inf
    assert clib.square_sum([torch.tensor([1.0, torch.nan])]) != clib.square_sum([torch.tensor([1.0, torch.nan])])


def test_without_a_compiler_torch_does_the_work(no_library: None) -> None:
    assert "no C compiler" in clib.library("adam").says
    chain, params = optim.adamw(1e-2, clip=1.0), leaves(torch.float32)
    state = in_place(chain)({k: p.bfloat16() for k, p in params.items()}, chain.init(params), params)
    assert int(state["adam"].count) == 1


@needs
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_source_compiles_without_a_warning(name: str, tmp_path: Path) -> None:
    compiler = next(c for c in build.COMPILERS if shutil.which(c))
    warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
    assert build.built(name, compiler, tmp_path, warnings).is_file()
    assert os.listdir(tmp_path) == [build.built(name, compiler, tmp_path, warnings).name]  # found the second time
