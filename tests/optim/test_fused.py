"""The donated form against the pure chain."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fnlm import optim, tree
from fnlm.optim.lower import lower

SHAPES = {
    "embed.weight": (13, 6), "blocks.0.q.weight": (6, 6), "blocks.0.up.weight": (9, 6), "blocks.0.norm.weight": (6,),
    "blocks.1.q.weight": (6, 6), "blocks.1.up.weight": (9, 6), "blocks.1.norm.weight": (6,), "scale": (),
}  # fmt: skip


def is_matrix(name):
    return name.endswith("weight") and "norm" not in name


def in_blocks(name):
    return "q.weight" in name or "up.weight" in name


def tensors(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


schedule = optim.warmup_cosine(1e-2, 2, 10)
RECIPES = {
    "sgd": lambda clip: optim.sgd(schedule, clip=clip),
    "l2": lambda clip: optim.sgd(0.01, decay=0.1, mask=is_matrix, clip=clip),
    "momentum": lambda clip: optim.sgd(schedule, 0.9, decay=0.1, mask=is_matrix, clip=clip),
    "nesterov": lambda clip: optim.sgd(0.01, 0.9, nesterov=True, clip=clip),
    "dampening": lambda clip: optim.sgd(0.01, 0.9, dampening=0.3, clip=clip),
    "adam": lambda clip: optim.adam(0.01, clip=clip),
    "adamw": lambda clip: optim.adamw(schedule, mask=is_matrix, clip=clip),
    "bf16_moments": lambda clip: optim.adamw(schedule, mask=is_matrix, clip=clip, moments_dtype=torch.bfloat16),
    "bf16_muon": lambda clip: optim.muon(
        schedule, in_blocks, schedule, adam_decay=0.1, adam_mask=is_matrix, clip=clip, moments_dtype=torch.bfloat16
    ),
    "lion": lambda clip: optim.lion(schedule, mask=is_matrix, clip=clip),
    "adafactor": lambda clip: optim.adafactor(clip=clip, decay=0.1),
    "muon": lambda clip: optim.muon(schedule, in_blocks, schedule, adam_decay=0.1, adam_mask=is_matrix, clip=clip),
}
NEAR = {torch.float32: 2e-6, torch.float64: 1e-12}
ROUNDED = {"bf16_moments": 1e-2, "bf16_muon": 1e-2, "muon": 1e-3}
"""Where bfloat16 lies between: a batched product may round one place otherwise than a single one."""


def run_pure(optimizer, params, grads):
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def run_in_place(optimizer, params, grads, **options):
    params, update = tree.map(torch.clone, params), optim.in_place(optimizer, **options)
    state = optimizer.init(params)
    for g in grads:
        state = update(tree.map(torch.clone, g), state, params)
    return params, state


def assert_same(optimizer, dtype=torch.float32, grad_dtype=None, near=None, seeds=6, **options):
    params, grads = tensors(0, dtype), [tensors(i + 1, grad_dtype or dtype) for i in range(seeds)]
    pure = tree.flatten(run_pure(optimizer, params, grads))
    mine = tree.flatten(run_in_place(optimizer, params, grads, **options))
    assert list(pure) == list(mine)
    for k, x in pure.items():
        assert (x.dtype, x.shape) == (mine[k].dtype, mine[k].shape), k
        assert (x.double() - mine[k].double()).abs().max() <= (near or NEAR[dtype]) * max(1.0, x.abs().max()), k


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recipes_agree(name, clip, dtype):
    assert_same(RECIPES[name](clip), dtype, near=ROUNDED.get(name))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_gradients_agree(name, clip):
    assert_same(RECIPES[name](clip), grad_dtype=torch.bfloat16, near=ROUNDED.get(name))


@pytest.mark.parametrize("name", RECIPES)
def test_small_chunks_agree(name):
    assert_same(RECIPES[name](0.5), torch.float64, near=ROUNDED.get(name), chunk=40)


def link_pool():
    def unknown():
        halve = optim.scale(0.5)
        return halve._replace(rule=None)

    both = {"m": optim.sgd(0.1, 0.5), "v": optim.chain(clip=optim.clip_by_global_norm(0.3), lion=optim.scale_by_lion())}
    return {
        "clip": optim.clip_by_global_norm(0.7),
        "value_clip": optim.clip_by_value(0.5),
        "adam": optim.scale_by_adam(),
        "lion": optim.scale_by_lion(),
        "trace": optim.trace(0.9, nesterov=True),
        "adafactor": optim.scale_by_adafactor(),
        "decay": optim.add_decayed_weights(0.1, is_matrix),
        "more_decay": optim.add_decayed_weights(0.2),
        "scale": optim.scale(-0.1),
        "by_name": optim.scale_by_name(lambda name: 0.0 if "norm" in name else 0.5),
        "schedule": optim.scale_by_schedule(schedule),
        "value": optim.scale_by_value(0.1),
        "unknown": unknown(),
        "masked": optim.masked(optim.scale_by_adam(b2=0.9), is_matrix),
        "parts": optim.partition(lambda name: "m" if is_matrix(name) else "v", **both),
        "inner": optim.chain(adam=optim.scale_by_adam(b1=0.5), decay=optim.add_decayed_weights(0.3)),
        "ema": optim.ema_params(0.9, warmup=True),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(link_pool())), max_size=5, unique=True))
def test_any_chain_agrees(names):
    pool = link_pool()
    assert_same(optim.chain(**{name: pool[name] for name in names}), torch.float64, near=1e-11, seeds=3)


@pytest.mark.parametrize(
    "links",
    [
        ("clip", "adam", "decay", "by_name", "schedule"),
        ("clip", "adam", "by_name", "decay", "value", "ema"),
        ("decay", "trace", "scale", "schedule"),
        ("clip", "decay", "adam", "more_decay", "schedule"),
        ("clip", "inner", "scale"),
        ("parts", "scale", "schedule", "ema"),
        ("lion", "decay", "more_decay", "value", "scale"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_canonical_chains_are_lowered(links, dtype):
    pool = link_pool()
    optimizer = optim.chain(**{name: pool[name] for name in links})
    plan = lower(optimizer, tensors(), 1 << 20)
    assert all(part.core is None or hasattr(part.core[1].rule, "update_") for part in plan.parts)
    assert_same(optimizer, dtype)


@pytest.mark.parametrize("coefficients", ["quintic", "polar"])
def test_muon_agrees_in_float64(coefficients):
    turn = optim.scale_by_muon(coefficients=coefficients, dtype=torch.float64)
    parts = {"m": optim.chain(muon=turn, decay=optim.add_decayed_weights(0.1)), "v": optim.scale_by_lion()}
    split = optim.partition(lambda name: "m" if in_blocks(name) else "v", **parts)
    optimizer = optim.chain(clip=optim.clip_by_global_norm(0.5), parts=split, lr=optim.scale_by_schedule(schedule))
    assert [len(part.chunks) for part in lower(optimizer, tensors(), 1 << 20).parts] == [2, 1]
    assert_same(optimizer, torch.float64, near=1e-10)


def test_one_part_that_cannot_be_lowered_leaves_the_others_fast():
    parts = optim.partition(
        lambda name: "m" if is_matrix(name) else "v", m=optim.adafactor(), v=optim.adamw(0.01, clip=0.1)
    )
    optimizer = optim.chain(parts=parts, lr=optim.scale_by_schedule(optim.constant(0.5)))
    plan = lower(optimizer, tensors(), 1 << 20)
    assert [hasattr(part.core[1].rule, "update_") for part in plan.parts] == [False, True]
    assert_same(optimizer, torch.float64)


def test_arguments_are_donated():
    params, optimizer = tensors(), RECIPES["adamw"](1.0)
    state, grads = optimizer.init(params), tensors(1)
    addresses = {k: t.data_ptr() for k, t in tree.leaves((params, state["adam"].mu, state["adam"].nu))}
    before = tree.map(torch.clone, params)
    after = optim.in_place(optimizer)(grads, state, params)
    assert grads == {}
    assert {k: t.data_ptr() for k, t in tree.leaves((params, after["adam"].mu, after["adam"].nu))} == addresses
    assert not any(torch.equal(params[k], p) for k, p in before.items() if k != "scale")


def test_the_norm_and_the_counts_of_an_older_state_stay_readable():
    params, optimizer = tensors(), RECIPES["adamw"](1.0)
    update, states = optim.in_place(optimizer), [optimizer.init(params)]
    for step in range(3):
        states.append(update(tensors(step + 1), states[-1], params))
    assert [int(s["adam"].count) for s in states] == [0, 1, 2, 3]
    assert [int(s["lr"].count) for s in states] == [0, 1, 2, 3]
    norms = [0.0] + [float(optim.global_norm(tensors(step + 1))) for step in range(3)]
    assert [float(s["clip"].norm) for s in states] == pytest.approx(norms)


def test_gradients_are_freed_chunk_by_chunk():
    params, optimizer = tensors(), optim.sgd(0.1)
    grads = {k: g.bfloat16() for k, g in tensors(1).items()}
    first = weakref.ref(grads["embed.weight"])
    seen = []

    class Watched(dict):
        def pop(self, key):
            seen.append((key, first() is None))
            return super().pop(key)

    watched = Watched(grads)
    del grads
    optim.in_place(optimizer, chunk=1)(watched, optimizer.init(params), params)
    gc.collect()
    assert seen[0] == ("embed.weight", False)
    assert seen[1][1]


def test_the_value_link_takes_effect_at_the_next_step():
    params = {"a": torch.ones(2)}
    optimizer = optim.chain(lr=optim.scale_by_value(0.1))
    update, state = optim.in_place(optimizer), optimizer.init(params)
    state = update({"a": torch.ones(2)}, state, params)
    state = optim.with_value(state, "lr/value", torch.tensor(0.4))
    update({"a": torch.ones(2)}, state, params)
    assert params["a"].tolist() == pytest.approx([0.5, 0.5])


def test_one_function_serves_several_models():
    optimizer = RECIPES["muon"](0.5)
    update = optim.in_place(optimizer)
    for dtype in (torch.float32, torch.float64):
        params, grads = tensors(0, dtype), tensors(1, dtype)
        pure, _ = run_pure(optimizer, params, [grads])
        update(tree.map(torch.clone, grads), optimizer.init(params), params)
        assert all(torch.allclose(params[k], pure[k], atol=1e-6) for k in params)
    small = {k: p for k, p in tensors().items() if k != "scale"}
    update({k: p.clone() for k, p in small.items()}, optimizer.init(small), small)


def test_zero_gradients_move_nothing_but_by_decay():
    params = tensors()
    optimizer = optim.adamw(0.1, decay=0.5, clip=1.0, mask=is_matrix)
    before = tree.map(torch.clone, params)
    optim.in_place(optimizer)({k: torch.zeros_like(p) for k, p in params.items()}, optimizer.init(params), params)
    for k, p in before.items():
        assert torch.allclose(params[k], p * 0.95 if is_matrix(k) else p)


def test_a_norm_given_by_the_caller_is_used():
    optimizer = optim.chain(clip=optim.clip_by_global_norm(1.0, lambda grads: torch.tensor(4.0)), lr=optim.scale(-1.0))
    params = {"a": torch.zeros(2)}
    state = optim.in_place(optimizer)({"a": torch.ones(2)}, optimizer.init(params), params)
    assert params["a"].tolist() == [-0.25, -0.25]
    assert state["clip"].norm == 4


def test_missing_gradients_are_refused():
    params, optimizer = tensors(), optim.sgd(0.1)
    grads = tensors(1)
    del grads["scale"]
    with pytest.raises(ValueError, match=r"1 names have no gradient or no parameter, first 'scale'"):
        optim.in_place(optimizer)(grads, optimizer.init(params), params)


def test_a_transposed_gradient_is_not_mixed_up() -> None:
    g = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(3, 5, generator=g)}
    grads = {"a": torch.randn(5, 3, generator=g).T}
    optimizer = optim.adamw(1e-2)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    want = optim.apply_updates(params, updates)
    optim.in_place(optimizer)(dict(grads), optimizer.init(params), params)
    torch.testing.assert_close(params["a"], want["a"])
