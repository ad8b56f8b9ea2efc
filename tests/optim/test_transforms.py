"""The pure update under torch's own transforms: an ensemble by vmap, a derivative through a step."""

import torch

from fnlm import optim, tree

OPTIMIZER = optim.chain(
    clip=optim.clip_by_global_norm(1.0),
    adam=optim.scale_by_adam(),
    decay=optim.add_decayed_weights(0.1, lambda name: name == "w"),
    lr=optim.scale_by_schedule(optim.warmup_cosine(1e-2, 2, 10)),
    gain=optim.scale_by_value(1.0),
    ema=optim.ema_params(0.9, warmup=True),
)


def members(seed, n=3):
    g = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(4, 3, generator=g), "b": torch.randn(3, generator=g)} for _ in range(n)]


def stack(trees):
    return tree.map(lambda *ts: torch.stack(ts), trees[0], *trees[1:])


def step(grads, state, params):
    updates, state = OPTIMIZER.update(grads, state, params)
    return optim.apply_updates(params, updates), state


def test_an_ensemble_by_vmap_equals_its_members():
    params = members(0)
    states = [OPTIMIZER.init(p) for p in params]
    # each member has its own learning rate, as data
    states = [optim.with_value(s, "gain/value", 0.5 * i) for i, s in enumerate(states)]
    many, many_state = stack(params), stack(states)
    for i in range(4):
        grads = members(i + 1)
        many, many_state = torch.func.vmap(step)(stack(grads), many_state, many)
        params, states = zip(*(step(*x) for x in zip(grads, states, params, strict=True)), strict=True)
    expected, found = tree.flatten((stack(params), stack(states))), tree.flatten((many, many_state))
    for k, x in expected.items():
        assert found[k].dtype == x.dtype, k
        assert torch.allclose(found[k], x, atol=1e-6), k


def test_init_works_under_vmap():
    state = torch.func.vmap(OPTIMIZER.init)(stack(members(0)))
    assert state["adam"].mu["w"].shape == (3, 4, 3)
    assert torch.equal(state["adam"].count, torch.zeros(3, dtype=torch.int64))


def test_a_step_is_differentiable():
    params, grads = ({k: v.double() for k, v in members(i)[0].items()} for i in (0, 1))
    state = OPTIMIZER.init(params)

    def after(scale):
        moved, _ = step({k: g * scale for k, g in grads.items()}, state, params)
        return moved["w"].sum()

    optimizer_free = torch.func.grad(after)(torch.tensor(0.01, dtype=torch.float64))
    h = 1e-6
    numeric = (after(torch.tensor(0.01 + h).double()) - after(torch.tensor(0.01 - h).double())) / (2 * h)
    assert torch.isfinite(optimizer_free)
    assert torch.allclose(optimizer_free, numeric, rtol=1e-2, atol=1e-9)
