"""Links, their combinations, their states and their errors."""

import pytest
import torch

from fnlm import optim, tree

SHAPES = {"embed.weight": (7, 4), "blocks.0.up.weight": (8, 4), "norm.weight": (4,), "gain": ()}
RECIPES = {
    "sgd": optim.sgd(0.1, 0.9, nesterov=True, decay=0.1, clip=0.5),
    "adam": optim.adam(0.01),
    "adamw": optim.adamw(optim.constant(0.01), clip=0.5, mask=lambda name: name != "norm.weight"),
    "bf16": optim.adamw(0.01, moments_dtype=torch.bfloat16),
    "lion": optim.lion(0.01),
    "adafactor": optim.adafactor(),
    "muon": optim.muon(0.02, lambda name: "blocks" in name, 0.01, clip=1.0),
    "ema": optim.chain(adam=optim.scale_by_adam(), lr=optim.scale_by_value(0.1), ema=optim.ema_params(0.9)),
}


def tensors(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=g, dtype=dtype) for k, s in SHAPES.items()}


def is_matrix(name):
    return name in ("embed.weight", "blocks.0.up.weight")


@pytest.mark.parametrize("name", RECIPES)
def test_update_leaves_its_inputs_as_they_were(name):
    optimizer, params = RECIPES[name], tensors()
    state = optimizer.init(params)
    for step in range(3):
        grads = tensors(step + 1)
        before = tree.map(torch.clone, (grads, state, params))
        updates, after = optimizer.update(grads, state, params)
        assert tree.equal(before, (grads, state, params))
        assert list(updates) == list(params)
        assert not any(a is b for a in tree.flatten(after).values() for b in params.values())
        state = after


@pytest.mark.parametrize("name", RECIPES)
def test_state_keeps_its_paths_shapes_and_dtypes(name):
    optimizer, params = RECIPES[name], tensors()
    state = optimizer.init(params)
    _, after = optimizer.update(tensors(1), state, params)
    before, after = tree.flatten(state), tree.flatten(after)
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}


def test_state_paths():
    assert list(tree.flatten(RECIPES["adamw"].init(tensors()))) == [
        "clip/norm", "adam/count",
        "adam/mu/embed.weight", "adam/mu/blocks.0.up.weight", "adam/mu/norm.weight", "adam/mu/gain",
        "adam/nu/embed.weight", "adam/nu/blocks.0.up.weight", "adam/nu/norm.weight", "adam/nu/gain",
        "lr/count",
    ]  # fmt: skip
    muon = tree.flatten(RECIPES["muon"].init(tensors()))
    assert "matrices/muon/mu/blocks.0.up.weight" in muon
    assert "rest/adam/nu/norm.weight" in muon
    assert "rest/adam/nu/blocks.0.up.weight" not in muon


def test_chain_applies_from_left_to_right():
    params = tensors()
    add_then_double = optim.chain(decay=optim.add_decayed_weights(1.0), twice=optim.scale(2.0))
    updates, _ = add_then_double.update(params, add_then_double.init(params), params)
    assert all(torch.equal(updates[k], 4 * p) for k, p in params.items())


def test_masked_leaves_the_others_alone():
    params = tensors()
    part = optim.masked(optim.scale_by_adam(), is_matrix)
    state = part.init(params)
    updates, state = part.update(params, state, params)
    assert "norm.weight" not in state.mu
    assert updates["norm.weight"] is params["norm.weight"]
    assert torch.allclose(updates["embed.weight"], params["embed.weight"].sign(), atol=1e-4)


def test_partition_gives_each_name_to_one_part():
    params = tensors()
    parts = optim.partition(lambda name: "m" if is_matrix(name) else "v", m=optim.scale(-1.0), v=optim.scale(-2.0))
    updates, _ = parts.update(params, parts.init(params), params)
    assert list(updates) == list(params)
    assert torch.equal(updates["embed.weight"], -params["embed.weight"])
    assert torch.equal(updates["norm.weight"], -2 * params["norm.weight"])


def test_partition_refuses_an_unknown_label():
    parts = optim.partition(lambda name: "matrix", matrices=optim.scale(1.0), rest=optim.scale(1.0))
    with pytest.raises(ValueError, match=r"'embed.weight' is assigned to 'matrix'; the parts are matrices, rest"):
        parts.init(tensors())


def test_decay_follows_its_mask():
    params = tensors()
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    updates, _ = optim.add_decayed_weights(0.5, is_matrix).update(zeros, (), params)
    assert torch.equal(updates["embed.weight"], 0.5 * params["embed.weight"])
    assert not updates["norm.weight"].any()


def test_clipping_zero_gradients_is_harmless():
    params = tensors()
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    clip = optim.clip_by_global_norm(1.0)
    updates, state = clip.update(zeros, clip.init(params), params)
    assert state.norm == 0
    assert not any(u.any() for u in updates.values())
    assert optim.global_norm({}) == 0


def test_small_gradients_are_not_clipped():
    params = tensors()
    clip = optim.clip_by_global_norm(1e3)
    updates, _ = clip.update(params, clip.init(params), params)
    assert tree.equal(updates, params)


def test_clip_by_value():
    updates, _ = optim.clip_by_value(0.5).update({"a": torch.tensor([-2.0, 0.1, 3.0])}, (), {})
    assert updates["a"].tolist() == [-0.5, pytest.approx(0.1), 0.5]


def test_low_precision_gradients_give_full_precision_updates():
    params = tensors()
    grads = {k: g.bfloat16() for k, g in tensors(1).items()}
    for optimizer in RECIPES.values():
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert {u.dtype for u in updates.values()} == {torch.float32}
    exact, _ = optim.sgd(0.1).update({k: g.float() for k, g in grads.items()}, {"lr": ()}, params)
    updates, _ = optim.sgd(0.1).update(grads, {"lr": ()}, params)
    assert tree.equal(updates, exact)


def test_value_is_replaced_between_steps_and_only_there():
    params = tensors()
    optimizer = optim.chain(lr=optim.scale_by_value(0.1))
    state = optimizer.init(params)
    later = optim.with_value(state, "lr/value", 0.2)
    assert (float(state["lr"].value), float(later["lr"].value)) == (0.1, 0.2)
    updates, _ = optimizer.update(params, later, params)
    assert torch.allclose(updates["embed.weight"], -0.2 * params["embed.weight"])
    for path in ("lr/count", "rate/value", "lr/value/x", "lr"):
        with pytest.raises(ValueError, match="no tensor at"):
            optim.with_value(state, path, 0.2)


def test_scale_by_name():
    updates, _ = optim.scale_by_name(lambda name: 2.0 if is_matrix(name) else 0.0).update(tensors(), (), tensors())
    assert torch.equal(updates["embed.weight"], 2 * tensors()["embed.weight"])
    assert not updates["norm.weight"].any()


def test_ema_follows_the_updated_parameters():
    optimizer, params = RECIPES["ema"], tensors(dtype=torch.float64)
    state = optimizer.init(params)
    expected = params["embed.weight"]
    for step in range(4):
        updates, state = optimizer.update(tensors(step, torch.float64), state, params)
        params = optim.apply_updates(params, updates)
        expected = 0.9 * expected + 0.1 * params["embed.weight"]
    assert torch.allclose(state["ema"].average["embed.weight"], expected, rtol=1e-12)


def test_ema_warmup_forgets_the_initial_parameters():
    link, params = optim.ema_params(0.999, warmup=True), {"a": torch.zeros(1, dtype=torch.float64)}
    state, expected = link.init(params), 0.0
    for t in range(5):
        params = {"a": torch.full((1,), float(t), dtype=torch.float64)}
        _, state = link.update({"a": torch.zeros(1)}, state, params)
        decay = (1 + t) / (10 + t)
        expected = decay * expected + (1 - decay) * t
    assert state.average["a"].item() == pytest.approx(expected, rel=1e-12)
    assert state.average["a"].item() > 2


def test_bfloat16_moments_stay_near_float32_ones():
    params = tensors()
    exact, rounded = optim.adamw(0.01), RECIPES["bf16"]
    states = [exact.init(params), rounded.init(params)]
    for step in range(8):
        a, states[0] = exact.update(tensors(step), states[0], params)
        b, states[1] = rounded.update(tensors(step), states[1], params)
    assert {v.dtype for v in states[1]["adam"].nu.values()} == {torch.bfloat16}
    assert all((a[k] - b[k]).abs().max() < 2e-4 for k in params)
    assert not tree.equal(a, b)


def test_needs_is_read_from_the_rules():
    assert optim.needs(optim.adamw(0.1)) == "element"
    assert optim.needs(optim.adafactor()) == "matrix"
    assert optim.needs(RECIPES["muon"]) == "tree"  # its AdamW part is clipped
    assert optim.needs(optim.masked(optim.scale_by_muon(), is_matrix)) == "matrix"
    assert optim.needs(optim.scale_by_adam()._replace(rule=None)) == "tree"


def test_rewrite_replaces_the_norm_everywhere():
    def on_mesh(link):
        if not isinstance(link.rule, optim.ClipByGlobalNorm):
            return link
        return optim.clip_by_global_norm(link.rule.max_norm, lambda grads: torch.tensor(2.0))

    for optimizer in (RECIPES["muon"], RECIPES["adamw"], optim.masked(RECIPES["sgd"], is_matrix)):
        changed = optim.rewrite(on_mesh, optimizer)
        assert optim.needs(changed) != "tree"
        _, state = changed.update(tensors(1), changed.init(tensors()), tensors())
        norms = [v for k, v in tree.leaves(state) if k.endswith("norm")]
        assert norms == [torch.tensor(2.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adamw(-0.1), r"lr=-0.1 is negative"),
        (lambda: optim.adafactor(-0.1), r"lr=-0.1 is negative"),
        (lambda: optim.scale(float("nan")), r"factor=nan"),
        (lambda: optim.scale_by_value(-1.0), r"value=-1.0"),
        (lambda: optim.scale_by_schedule(0.1), r"did you mean scale\(-lr\)"),
        (lambda: optim.adam(0.1, b2=1.0), r"b2=1.0 is outside \[0, 1\); choose"),
        (lambda: optim.adam(0.1, b1=-0.1), r"b1=-0.1 is outside"),
        (lambda: optim.adam(0.1, eps=0.0), r"eps=0.0"),
        (lambda: optim.adam(0.1, b2=0.999, moments_dtype=torch.bfloat16), r"b2=0.999 never decays in torch.bfloat16"),
        (lambda: optim.lion(0.1, b2=1.5), r"b2=1.5 is outside"),
        (lambda: optim.trace(1.0), r"momentum=1.0 is outside"),
        (lambda: optim.trace(0.9, True, 0.1), r"nesterov with dampening=0.1"),
        (lambda: optim.trace(0.9, False, 2.0), r"dampening=2.0"),
        (lambda: optim.scale_by_muon(steps=0), r"steps=0 is outside \[1, 99\]"),
        (lambda: optim.scale_by_muon(steps=6, coefficients="polar"), r"steps=6 is outside \[1, 5\]"),
        (lambda: optim.scale_by_muon(coefficients="cubic"), r"choose 'quintic' or 'polar'"),
        (lambda: optim.scale_by_muon(adjust="rms"), r"choose one of none, original"),
        (lambda: optim.scale_by_muon().init({"b": torch.zeros(3)}), r"'b' has shape \(3,\)"),
        (lambda: optim.scale_by_adafactor(beta2_decay=0.8), r"beta2_decay=0.8"),
        (lambda: optim.scale_by_adafactor(clip=0.5), r"clip=0.5 is below 1"),
        (lambda: optim.scale_by_adafactor(eps2=-1.0), r"eps2=-1.0"),
        (lambda: optim.clip_by_global_norm(0.0), r"max_norm=0.0 would stop all learning"),
        (lambda: optim.clip_by_value(-1.0), r"limit=-1.0"),
        (lambda: optim.add_decayed_weights(-0.1), r"rate=-0.1 would make the weights grow"),
        (lambda: optim.ema_params(1.0), r"decay=1.0 is outside \[0, 1\)"),
        (lambda: optim.partition(lambda name: "a"), r"a partition without parts"),
    ],
)
def test_bad_hyperparameters_are_refused_with_number_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
