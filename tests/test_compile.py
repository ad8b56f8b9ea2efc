"""torch.compile: the same numbers where it works, one line and the same numbers where it does not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm import compiling
from fnlm.compiling import compiled
from fnlm.ngrams import ngram_ids
from fnlm.params import shapes
from tests.reference import BASE, CASES, ngram_row, random_params, random_tokens

DROPS = {"dropout_embed": 0.2, "dropout_attn": 0.2, "dropout_residual": 0.2, "dropout_ngram": 0.2}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")


def case(name: str, **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


def a_batch() -> fnlm.Batch:
    weights = (torch.arange(7) < torch.tensor([[5], [7], [2]])).float()
    return fnlm.Batch(random_tokens(11, 3, 7), random_tokens(11, 3, 7, 1), weights)


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What we logged; torch traces itself on a logger of its own."""
    return [r for r in caplog.records if r.name == compiling.__name__]


@pytest.fixture
def fresh() -> Any:
    """Neither a compiled function nor a failure of another test is remembered."""
    compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["block", "step"])
@pytest.mark.parametrize(("name", "drops"), [("llama", {}), ("window-alibi", {}), ("ngrams", DROPS)])
def test_compiled_equals_eager(name: str, drops: Any, mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    cfg, key = case(name, **drops), fnlm.key(1)
    params = random_params(shapes(cfg), dtype=torch.float32)
    value, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, a_batch(), key)
    loss = fnlm.make_lm_loss(cfg, fnlm.Compute(compile=mode))
    got, got_grads = fnlm.value_and_grad(loss)(params, a_batch(), key)
    assert not ours(caplog)  # it was compiled, not run eagerly after a failure
    assert abs(float(got - value)) < 1e-5
    largest = max(float(g.abs().max()) for g in grads.values())
    for name_, g in grads.items():
        torch.testing.assert_close(got_grads[name_], g, rtol=0, atol=2e-5 * largest)


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("mode", ["block", "step"])
def test_compiled_training_equals_eager(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    cfg, optimizer, losses = case("llama", dropout_residual=0.1), fnlm.optim.sgd(0.1), []
    for compute in (fnlm.Compute(), fnlm.Compute(compile=mode)):
        state = fnlm.init_state(random_params(shapes(cfg), dtype=torch.float32), optimizer)
        step = fnlm.make_step(fnlm.make_lm_loss(cfg, compute), optimizer)
        losses.append([])
        for _ in range(4):
            state, metrics = step(state, a_batch())
            losses[-1].append(float(metrics["train/loss"]))
    assert not ours(caplog)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("order", "vocab"), [(2, 50257), (3, 2**20), (4, 50257), (6, 2**21)])
def test_compiled_ngram_rows_are_the_formula(order: int, vocab: int) -> None:
    """A product beyond int64 is undefined in the C++ that inductor writes."""
    tokens = random_tokens(vocab, 64, 65)
    ids = torch.compile(lambda t: ngram_ids(t, order, 65536, vocab))(tokens)
    want = [[ngram_row(row, t, order, 65536, vocab) for t in range(65)] for row in tokens.tolist()]
    assert ids.tolist() == want


class Broken(Exception):
    """What a compiler may raise."""


def breaking(*_: Any, **__: Any) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        raise Broken("no such backend\nand a long story")

    return call


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("mode", ["block", "step"])
def test_a_failing_compiler_costs_one_line_and_no_result(
    mode: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", breaking)
    cfg = case("llama", **DROPS)
    params = random_params(shapes(cfg))
    want = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, a_batch(), fnlm.key(1))
    run = fnlm.value_and_grad(fnlm.make_lm_loss(cfg, fnlm.Compute(compile=mode)))
    with caplog.at_level(logging.WARNING):
        results = [run(params, a_batch(), fnlm.key(1)) for _ in range(3)]
    for value, grads in results:
        assert abs(float(value - want[0])) < 1e-12
        assert all(torch.allclose(grads[k], want[1][k], rtol=0, atol=1e-12) for k in grads)
    (record,) = ours(caplog)
    assert "runs eagerly (Broken: no such backend)" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_fails_at_once_is_survived_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`torch.compile` itself raises where a Python or a platform is not supported."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch.compile is not supported here")

    monkeypatch.setattr(torch, "compile", refuse)
    cfg = case("llama")
    params = random_params(shapes(cfg))
    for mode in ("block", "step"):
        loss = fnlm.make_lm_loss(cfg, fnlm.Compute(compile=mode))  # type: ignore[arg-type]
        assert abs(float(loss(params, a_batch()) - fnlm.lm_loss(params, a_batch(), cfg))) < 1e-12
    assert len(ours(caplog)) == 2


@pytest.mark.usefixtures("fresh")
def test_an_error_of_the_function_itself_is_raised_unchanged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    mine = KeyError("my own mistake")

    def wrong(x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise mine
        return x + 1

    call = compiled(wrong)
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            call(torch.ones(1))
        assert caught.value is mine
    assert not ours(caplog)
    assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))  # a mistake is no reason to stop compiling


@pytest.mark.usefixtures("fresh")
def test_an_interrupt_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        def call(*args: Any) -> Tensor:
            raise KeyboardInterrupt

        return call

    monkeypatch.setattr(torch, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(torch.sin)(torch.ones(1))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("mode", ["off", "step"])
def test_a_compiled_loss_is_called_as_an_eager_one(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    cfg = case("llama", dropout_residual=0.2)
    params = random_params(shapes(cfg))
    loss = fnlm.make_lm_loss(cfg, fnlm.Compute(compile=mode))
    want = fnlm.lm_loss(params, a_batch(), cfg, key=fnlm.key(1))
    assert torch.equal(loss(params, a_batch(), key=fnlm.key(1)), want)


@pytest.mark.usefixtures("fresh")
def test_too_long_an_input_is_the_users_error_under_compile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", breaking)
    cfg = case("llama")
    loss = fnlm.make_lm_loss(cfg, fnlm.Compute(compile="step"))
    tokens = random_tokens(11, 1, 14)
    with pytest.raises(ValueError, match="14 tokens are more than seq_len=13"):
        loss(random_params(shapes(cfg)), fnlm.Batch(tokens, tokens, torch.ones(1, 14)))
