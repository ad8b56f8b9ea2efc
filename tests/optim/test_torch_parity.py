"""The pure chains against torch.optim, and Lion against its paper."""

import pytest
import torch

from fnlm import optim

SHAPES = {"embed.weight": (11, 6), "blocks.0.up.weight": (8, 6), "blocks.0.down.weight": (6, 8), "norm.weight": (6,)}


def make(dtype, names=tuple(SHAPES)):
    g = torch.Generator().manual_seed(0)
    params = {k: 0.05 * torch.randn(SHAPES[k], generator=g, dtype=dtype) for k in names}
    grads = [{k: torch.randn(SHAPES[k], generator=g, dtype=dtype) for k in names} for _ in range(12)]
    return params, grads


def run(optimizer, params, grads):
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optim.apply_updates(params, updates)
    return params


def run_torch(make_optimizer, params, grads):
    leaves = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = make_optimizer(leaves.values())
    for g in grads:
        for k, leaf in leaves.items():
            leaf.grad = g[k].clone()
        optimizer.step()
    return {k: leaf.detach() for k, leaf in leaves.items()}


T = torch.optim
CASES = {
    "sgd": (optim.sgd(0.01), lambda p: T.SGD(p, 0.01)),
    "momentum": (optim.sgd(0.01, 0.9, decay=0.1), lambda p: T.SGD(p, 0.01, 0.9, weight_decay=0.1)),
    "nesterov": (optim.sgd(0.01, 0.9, nesterov=True), lambda p: T.SGD(p, 0.01, 0.9, nesterov=True)),
    "dampening": (optim.sgd(0.01, 0.9, dampening=0.5), lambda p: T.SGD(p, 0.01, 0.9, dampening=0.5)),
    "adam": (optim.adam(1e-2), lambda p: T.Adam(p, 1e-2)),
    "adamw": (optim.adamw(1e-2, decay=0.1), lambda p: T.AdamW(p, 1e-2, (0.9, 0.95), weight_decay=0.1)),
    "adafactor": (optim.adafactor(1e-2, decay=0.1), lambda p: T.Adafactor(p, 1e-2, weight_decay=0.1)),
    "adafactor_rho": (optim.adafactor(0.5), lambda p: T.Adafactor(p, 0.5)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_equals_torch(name, dtype, tolerance):
    params, grads = make(dtype)
    ours, theirs = run(CASES[name][0], params, grads), run_torch(CASES[name][1], params, grads)
    assert all(ours[k].dtype == dtype and ours[k].shape == p.shape for k, p in params.items())
    assert max((ours[k] - theirs[k]).abs().max() for k in params) <= tolerance


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-7)])
def test_muon_equals_torch(nesterov, adjust, dtype, tolerance):
    params, grads = make(dtype, tuple(k for k, shape in SHAPES.items() if len(shape) == 2))
    ours = optim.muon(0.02, lambda name: True, adam_lr=0.0, nesterov=nesterov, adjust=adjust)
    theirs = run_torch(lambda p: T.Muon(p, 0.02, nesterov=nesterov, adjust_lr_fn=adjust), params, grads)
    ours = run(ours, params, grads)
    assert max((ours[k] - theirs[k]).abs().max() for k in params) <= tolerance


def test_lion_equals_its_paper():
    params, grads = make(torch.float64)
    expected = {}
    for k, p in params.items():
        m = torch.zeros_like(p)
        for g in grads:
            p = p - 0.01 * (torch.sign(0.9 * m + 0.1 * g[k]) + 0.2 * p)
            m = 0.99 * m + 0.01 * g[k]
        expected[k] = p
    ours = run(optim.lion(0.01, decay=0.2), params, grads[:])
    assert max((ours[k] - expected[k]).abs().max() for k in params) < 1e-14


def test_clip_equals_torch():
    params, (grads, *_) = make(torch.float64)
    leaves = [torch.nn.Parameter(p) for p in params.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    clip = optim.clip_by_global_norm(0.5)
    updates, state = clip.update(grads, clip.init(params), params)
    assert torch.allclose(state.norm, norm, rtol=1e-12)
    for leaf, u in zip(leaves, updates.values(), strict=True):
        assert torch.allclose(leaf.grad, u, rtol=1e-5)  # torch adds 1e-6 to the norm
    assert torch.allclose(optim.global_norm(updates), torch.tensor(0.5, dtype=torch.float64), rtol=1e-12)
