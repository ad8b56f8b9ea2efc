"""Pure functions: what goes in comes out unchanged, and torch.func can transform the model and its loss as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fnlm
from fnlm import optim, random
from fnlm.lift import from_stateful_module, stack
from fnlm.losses import fused_cross_entropy
from fnlm.params import shapes
from fnlm.tree import equal, flatten, leaves
from tests.reference import BASE, CASES, random_params, random_tokens, small_blocks

DROPS = {"dropout_embed": 0.2, "dropout_attn": 0.2, "dropout_residual": 0.2, "dropout_ngram": 0.2}


def case(name: str = "llama", **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


def a_batch(b: int = 3, t: int = 7, dtype: torch.dtype = torch.float64) -> fnlm.Batch:
    weights = (torch.arange(t) < torch.tensor([[5], [7], [2]])[:b]).to(dtype)
    return fnlm.Batch(random_tokens(11, b, t), random_tokens(11, b, t, 1), weights)


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, list):
        return [t for part in tree for t in tensors(part)]
    return [t for _, t in leaves(tree)]


def unchanged(call: Callable[..., Any], *args: Any) -> None:
    """Bits and version counters: a tensor that is written to and restored has changed."""
    inside = [t for a in args if isinstance(a, (dict, tuple, list, Tensor)) for t in tensors(a)]
    assert inside
    before = [(t.clone(), t._version, t.requires_grad) for t in inside]
    state = torch.get_rng_state()
    call(*args)
    for t, (bits, version, needs) in zip(inside, before, strict=True):
        assert torch.equal(t, bits)
        assert t._version == version
        assert t.requires_grad == needs
    assert torch.equal(torch.get_rng_state(), state)  # explicit keys: torch's own generator is not touched


def calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    key = fnlm.key(3)
    for name in ("llama", "ngrams", "window-alibi", "mup-all"):
        cfg = case(name)
        wet = case(name, **DROPS)
        for dtype in (torch.float64, torch.float32):
            params = random_params(shapes(cfg), dtype=dtype)
            for kernels in ("auto", "plain", "sdpa"):
                for remat in ("none", "block"):
                    c = fnlm.Compute(kernels=kernels, remat=remat)
                    label = f"{name}-{dtype}-{kernels}-{remat}"
                    batch, pieces = a_batch(), fnlm.Plan(micro_batches=3)
                    dry, wet_loss = fnlm.make_lm_loss(cfg, c), fnlm.make_lm_loss(wet, c)
                    run = partial(fnlm.forward, compute=c)
                    yield (
                        f"forward-{label}",
                        lambda p, t, k, f=run, w=wet: f(p, t, w, key=k),
                        (params, batch.tokens, key),
                    )
                    yield f"grad-{label}", fnlm.value_and_grad(wet_loss, pieces), (params, batch, key)
                    yield f"grad-dry-{label}", fnlm.value_and_grad(dry), (params, batch)
    cfg, params = case(), random_params(shapes(case()), dtype=torch.float32)
    for precision in ("bf16", "fp16"):
        run = fnlm.value_and_grad(fnlm.make_lm_loss(cfg), fnlm.Plan(precision=precision))
        yield f"grad-{precision}", run, (params, a_batch())
    yield "lm_loss", lambda p, b, k: fnlm.lm_loss(p, b, cfg, key=k), (params, a_batch(), key)
    yield (
        "pieces",
        lambda p, b, c: fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(p, [b, c]),
        (params, a_batch(), a_batch(2)),
    )
    logits = torch.randn(3, 7, 11)
    yield "cross_entropy", fnlm.cross_entropy, (logits, a_batch().targets, a_batch().weights)
    capped = case("softcap")
    x, w = torch.randn(3, 7, 16), torch.randn(11, 16)
    yield "fused", lambda *a: fused_cross_entropy(*a, capped), (x, w, a_batch().targets, a_batch().weights)
    yield "as_module", lambda p, t: fnlm.as_module(cfg, p)(t).sum().backward(), (params, a_batch().tokens)
    yield "init_params", lambda k: fnlm.init_params(cfg, k), (key,)
    yield "init_state", lambda p, k: fnlm.init_state(p, optim.adamw(1e-3), key=k), (params, key)
    yield "split", fnlm.split, (key,)
    yield "fold_in", fnlm.fold_in, (key, torch.arange(4))
    yield "stack", lambda p: stack([p, p]), (params,)
    yield "tree.map", lambda p: fnlm.tree.map(lambda t: t + 1, p), (params,)
    yield "randoms", lambda k: (random.normal(k, (9,)), random.uniform(k, (9,)), random.permutation(k, 9)), (key,)


CALLS = {name: (call, args) for name, call, args in calls()}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_stay_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 4)
    call, args = CALLS[name]
    unchanged(call, *args)


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("grad")])
def test_leaves_that_want_gradients_get_none_written(name: str) -> None:
    call, (params, *rest) = CALLS[name]
    live = {k: v.clone().requires_grad_() for k, v in params.items()}
    unchanged(call, live, *rest)
    assert all(v.grad is None for v in live.values())


OPTIMIZERS = {
    "sgd": optim.sgd(0.1, momentum=0.9, clip=1.0),
    "adam": optim.adam(0.1, clip=1.0),
    "adamw": optim.adamw(0.1, mask=fnlm.is_matrix),
    "lion": optim.lion(0.1, clip=1.0),
    "adafactor": optim.adafactor(0.1),
    "muon": optim.muon(0.1, fnlm.is_hidden_matrix, 0.1),
    "ema": optim.chain(a=optim.adamw(0.1), ema=optim.ema_params(0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_undonated_steps_leave_their_inputs(name: str) -> None:
    cfg, optimizer = case(), OPTIMIZERS[name]
    params = random_params(shapes(cfg), dtype=torch.float32)
    _, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, a_batch())
    state = optimizer.init(params)
    unchanged(optimizer.init, params)
    unchanged(optimizer.update, grads, state, params)
    updates, after = optimizer.update(grads, state, params)
    unchanged(optimizer.update, grads, after, params)
    unchanged(optim.apply_updates, params, updates)
    plan = fnlm.Plan(donate=False)
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)
    start = fnlm.init_state(params, optimizer, plan)
    unchanged(step, start, a_batch())
    once, _ = step(start, a_batch())
    unchanged(step, once, a_batch())
    again, _ = step(start, a_batch())
    assert equal(flatten(once), flatten(again))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_donated_step_takes_the_state_and_nothing_else(name: str) -> None:
    cfg, optimizer = case(), OPTIMIZERS[name]
    params, batch = random_params(shapes(cfg), dtype=torch.float32), a_batch()
    before = {k: v.clone() for k, v in params.items()}
    state = fnlm.init_state(params, optimizer, key=fnlm.key(8))
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer)
    for _ in range(2):
        old_key, version = state.key.clone(), state.step.clone()
        new, _ = step(state, batch)
        assert torch.equal(state.key, old_key)
        assert torch.equal(state.step, version)  # the count of a dead state still says which step it was
        state = new
    assert equal(params, before)
    assert equal(batch, a_batch())


def test_modules_stay_as_they_are() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    apply, params, buffers = from_stateful_module(module)
    x = torch.randn(8, 3)
    unchanged(lambda p, b, y: apply(p, b, y), params, buffers, x)
    pure, params = fnlm.from_module(module)
    unchanged(lambda p, y: pure(p, y), params, x)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.testing.assert_close(pure(params, x), pure(params, x), rtol=0, atol=0)
    assert equal(before, dict(module.state_dict()))


# torch.func over the public loss, as it comes: no option has to be set.

# torch.func.jvp itself imports scripts of torch.jit, once a process
JVP = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
PARAMS = random_params(shapes(case()))


def loss(params: fnlm.Params, batch: fnlm.Batch, name: str = "llama", key: Any = None) -> Tensor:
    return fnlm.lm_loss(params, batch, case(name), key=key)


def by_autograd(params: fnlm.Params, batch: fnlm.Batch, name: str = "llama") -> fnlm.Params:
    return fnlm.value_and_grad(fnlm.make_lm_loss(case(name)))(params, batch)[1]


def agree(a: Any, b: Any, atol: float = 1e-10) -> None:
    x, y = flatten(a), flatten(b)
    assert x.keys() == y.keys()
    for key in x:
        torch.testing.assert_close(x[key], y[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["llama", "window-alibi", "mup-all", "ngrams", "qk-layernorm-bias", "softcap"])
def test_grad(name: str) -> None:
    params = random_params(shapes(case(name)))
    agree(grad(loss)(params, a_batch(), name), by_autograd(params, a_batch(), name))


def test_gradients_per_sample() -> None:
    batch = a_batch()
    rows = fnlm.Batch(*(x[:, None] for x in batch))
    each = vmap(grad(loss), in_dims=(None, 0))(PARAMS, rows)
    for i in range(3):
        agree({k: v[i] for k, v in each.items()}, by_autograd(PARAMS, fnlm.Batch(*(x[i : i + 1] for x in batch))))


@JVP
def test_directional_derivatives() -> None:
    direction = random_params(shapes(case()), seed=5)
    value, slope = jvp(lambda p: loss(p, a_batch()), (PARAMS,), (direction,))
    torch.testing.assert_close(value, loss(PARAMS, a_batch()), rtol=0, atol=1e-12)
    grads = by_autograd(PARAMS, a_batch())
    torch.testing.assert_close(slope, sum((grads[k] * direction[k]).sum() for k in grads), rtol=0, atol=1e-10)


@JVP
def test_hessian_vector_products() -> None:
    direction = random_params(shapes(case()), seed=5)
    _, got = jvp(grad(lambda p: loss(p, a_batch())), (PARAMS,), (direction,))
    h = 1e-6
    ahead, behind = (by_autograd({k: v + s * h * direction[k] for k, v in PARAMS.items()}, a_batch()) for s in (1, -1))
    agree(got, {k: (ahead[k] - behind[k]) / (2 * h) for k in ahead}, 1e-6)


def test_ensembles() -> None:
    models = [random_params(shapes(case()), seed=s) for s in range(3)]
    values = vmap(loss, in_dims=(0, None))(stack(models), a_batch())
    grads = vmap(grad(loss), in_dims=(0, None))(stack(models), a_batch())
    for i, model in enumerate(models):
        torch.testing.assert_close(values[i], loss(model, a_batch()), rtol=0, atol=1e-12)
        agree({k: v[i] for k, v in grads.items()}, by_autograd(model, a_batch()))


def test_dropout_under_vmap_over_keys_is_the_loop() -> None:
    cfg, keys = case("ngrams", **DROPS), fnlm.split(fnlm.key(1), 3)
    params, batch = random_params(shapes(cfg)), a_batch()
    values = vmap(lambda k: fnlm.lm_loss(params, batch, cfg, key=k))(keys)
    for i in range(3):
        torch.testing.assert_close(values[i], fnlm.lm_loss(params, a_batch(), cfg, key=keys[i]), rtol=0, atol=1e-12)
    assert len(set(values.tolist())) == 3


def test_grad_under_dropout_is_autograds() -> None:
    cfg = case("ngrams", **DROPS)
    params = random_params(shapes(cfg))
    got = grad(lambda p: fnlm.lm_loss(p, a_batch(), cfg, key=fnlm.key(1)))(params)
    live = {k: v.clone().requires_grad_() for k, v in params.items()}
    want = torch.autograd.grad(fnlm.lm_loss(live, a_batch(), cfg, key=fnlm.key(1)), list(live.values()))
    agree(got, dict(zip(live, want, strict=True)))


def test_transforms_beyond_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 3)
    agree(grad(loss)(PARAMS, a_batch()), by_autograd(PARAMS, a_batch()))
    rows = fnlm.Batch(*(x[:, None] for x in a_batch()))
    together = vmap(grad(loss), in_dims=(None, 0))(PARAMS, rows)
    agree({k: v[1] for k, v in together.items()}, by_autograd(PARAMS, fnlm.Batch(*(x[1:2] for x in a_batch()))))
