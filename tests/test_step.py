"""One step: micro-batches, precisions, donation, dropout and errors; the plan changes how, never what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm import optim
from fnlm.params import shapes
from fnlm.tree import equal, flatten
from tests.reference import BASE, CASES, random_params, random_tokens

State = fnlm.TrainState


def case(name: str = "llama", **more: Any) -> fnlm.ModelConfig:
    return fnlm.ModelConfig(**{**BASE, **CASES[name], **more})


def ragged(b: int = 6, t: int = 7, dtype: torch.dtype = torch.float32) -> fnlm.Batch:
    """Rows with 0 to `t` weighted tokens; one row with none."""
    weights = (torch.arange(t) < torch.tensor([t, 2, 0, 5, 1, t - 1])[:b, None]).to(dtype)
    return fnlm.Batch(random_tokens(11, b, t), random_tokens(11, b, t, 1), weights)


def some(cfg: fnlm.ModelConfig, dtype: torch.dtype = torch.float64) -> fnlm.Params:
    return random_params(shapes(cfg), dtype=dtype)


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def adamw(clip: float | None = 1.0) -> fnlm.Transform:
    return optim.adamw(1e-2, clip=clip, mask=fnlm.is_matrix)


def first_steps(
    cfg: fnlm.ModelConfig, params: fnlm.Params, batches: Sequence[Any], plan: fnlm.Plan, **more: Any
) -> tuple[State, list[dict[str, Tensor]]]:
    optimizer = more.pop("optimizer", None) or adamw()
    state = fnlm.init_state(params, optimizer, plan, key=fnlm.key(3))
    step, seen = fnlm.make_step(more.pop("loss", None) or fnlm.make_lm_loss(cfg, **more), optimizer, plan), []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append({k: v.clone() for k, v in metrics.items()})
    return state, seen


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_micro_batches_equal_the_big_batch(n: int, dtype: torch.dtype, atol: float) -> None:
    """The weights stay float32, as data come; in a float64 model their shares must not round to float32."""
    cfg = case()
    params, loss = some(cfg, dtype), fnlm.make_lm_loss(cfg)
    value, grads = fnlm.value_and_grad(loss)(params, ragged())
    got, got_grads = fnlm.value_and_grad(loss, fnlm.Plan(micro_batches=n))(params, ragged())
    largest = max(float(g.abs().max()) for g in grads.values())
    assert abs(float(got) - float(value)) < atol
    assert worst(got_grads, grads) < atol * largest
    assert all(g.dtype == dtype for g in got_grads.values())
    assert largest > 1e-2


def test_unequal_batches_in_a_list_equal_the_big_batch() -> None:
    cfg, big = case(), ragged(dtype=torch.float64)
    params, loss = some(cfg), fnlm.make_lm_loss(cfg)
    value, grads = fnlm.value_and_grad(loss)(params, big)
    for cuts in ((1, 5), (4, 2), (3, 1, 2), (2, 1, 3), (1, 1, 1, 1, 1, 1), (6,)):
        pieces = [fnlm.Batch(*parts) for parts in zip(*(x.split(cuts) for x in big), strict=True)]
        got, got_grads = fnlm.value_and_grad(loss)(params, pieces)
        assert abs(float(got) - float(value)) < 1e-12
        assert worst(got_grads, grads) < 1e-12


def test_batches_of_other_lengths_count_by_their_tokens() -> None:
    cfg = case()
    params, loss = some(cfg), fnlm.make_lm_loss(cfg)
    short = fnlm.Batch(*(x[:2, :3] for x in ragged(dtype=torch.float64)))
    long = ragged(dtype=torch.float64)
    got, grads = fnlm.value_and_grad(loss)(params, [short, long])
    parts = [(fnlm.value_and_grad(loss)(params, b), float(b.weights.sum())) for b in (short, long)]
    total = sum(w for _, w in parts)
    assert abs(float(got) - sum(float(v) * w for (v, _), w in parts) / total) < 1e-12
    assert worst(grads, {k: sum(g[k] * w for (_, g), w in parts) / total for k in grads}) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_masked_batches_teach_nothing(n: int) -> None:
    cfg = case()
    batch = ragged()._replace(weights=torch.zeros(6, 7))
    value, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg), fnlm.Plan(micro_batches=n))(some(cfg), batch)
    assert float(value) == 0
    assert all(bool((g == 0).all()) for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_torch_func(dtype: torch.dtype) -> None:
    cfg = case("qk-norm")
    params, loss = some(cfg, dtype), fnlm.make_lm_loss(cfg)
    value, grads = fnlm.value_and_grad(loss)(params, ragged())
    want, want_value = torch.func.grad_and_value(lambda p: loss(p, ragged()))(params)
    assert abs(float(value) - float(want_value)) < 1e-5
    assert worst(grads, want) < (1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_bfloat16_steps_follow_float32(n: int) -> None:
    cfg = case(d_model=32, n_layers=2)
    params = {k: v * 0.5 for k, v in some(cfg, torch.float32).items()}
    full, seen = first_steps(cfg, params, [ragged()] * 5, fnlm.Plan(micro_batches=n))
    low, low_seen = first_steps(cfg, params, [ragged()] * 5, fnlm.Plan(precision="bf16", micro_batches=n))
    for a, b in zip(seen, low_seen, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=0.03)
        assert float(a["train/grad_norm"]) == pytest.approx(float(b["train/grad_norm"]), rel=0.06)
        assert b["train/loss"].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in low.params.values())
    assert float(seen[-1]["train/loss"]) < float(seen[0]["train/loss"])
    moved = {k: full.params[k] - params[k] for k in params}
    apart = sum(float((low.params[k] - full.params[k]).square().sum()) for k in params)
    assert apart < 0.04 * sum(float(m.square().sum()) for m in moved.values())


def test_half_precision_is_not_skipped_and_follows_float32() -> None:
    """A benign model, the first scale: 2^16 is above float16's largest number and must not meet a float16 gradient."""
    cfg = case(d_model=32)
    params = {k: v * 0.5 for k, v in some(cfg, torch.float32).items()}
    for kernels in ("plain", "auto"):
        compute = fnlm.Compute(kernels=kernels)
        _, seen = first_steps(cfg, params, [ragged()] * 4, fnlm.Plan(), compute=compute)
        _, half = first_steps(cfg, params, [ragged()] * 4, fnlm.Plan(precision="fp16"), compute=compute)
        assert [int(m["train/skipped"]) for m in half] == [0] * 4, kernels
        for a, b in zip(seen, half, strict=True):
            assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=0.01)
            assert float(a["train/grad_norm"]) == pytest.approx(float(b["train/grad_norm"]), rel=0.02)


def test_loss_scaling_saves_gradients_too_small_for_half_precision() -> None:
    """Many tokens and many words make logit gradients of about 1e-9, far below float16's 6e-8."""
    cfg = case("plain", vocab_size=3000, n_layers=1, d_model=16, seq_len=64, tied=False)
    params = {k: v * 0.2 for k, v in some(cfg, torch.float32).items()}
    tokens = random_tokens(3000, 16, 64)
    batch = fnlm.Batch(tokens, tokens.roll(-1, 1), torch.ones(16, 64))
    _, want = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, batch)
    scale = torch.tensor(2.0**12)
    for kernels in ("plain", "auto"):
        loss = fnlm.make_lm_loss(cfg, fnlm.Compute(kernels=kernels))
        _, got = fnlm.value_and_grad(loss, fnlm.Plan(precision="fp16"))(params, batch, None, scale)
        for name, g in want.items():
            error = float((got[name].float() / scale - g).norm() / g.norm())
            assert error < 0.02, f"{kernels}: {name} is off by {error:.1%}"


def overflowing(cfg: fnlm.ModelConfig, when: set[int]) -> Any:
    calls = []

    def loss(params: fnlm.Params, batch: fnlm.Batch, key: Any, use: Any) -> Tensor:
        calls.append(0)
        value = fnlm.lm_loss(params, batch, cfg, key=key, use=use, compute=fnlm.Compute(kernels="plain"))
        return value * (1e30 if len(calls) - 1 in when else 1.0)

    return loss


@pytest.mark.parametrize("donate", [True, False])
def test_an_overflow_skips_the_step_and_halves_the_scale(donate: bool) -> None:
    cfg = case()
    params = {k: v * 0.5 for k, v in some(cfg, torch.float32).items()}
    plan = fnlm.Plan(precision="fp16", donate=donate)
    optimizer, loss = adamw(), overflowing(cfg, {1})
    state = fnlm.init_state(params, optimizer, plan)
    step = fnlm.make_step(loss, optimizer, plan)
    state, metrics = step(state, ragged())
    assert int(metrics["train/skipped"]) == 0
    before = {k: v.clone() for k, v in flatten((state.params, state.opt_state.inner)).items()}
    scale = float(state.opt_state.scale)
    assert float(metrics["train/loss_scale"]) == scale
    state, metrics = step(state, ragged())
    assert int(metrics["train/skipped"]) == 1
    assert float(state.opt_state.scale) == scale / 2 == float(metrics["train/loss_scale"])
    assert equal(flatten((state.params, state.opt_state.inner)), before)
    assert int(state.step) == 2
    state, metrics = step(state, ragged())
    assert int(metrics["train/skipped"]) == 0
    assert worst(state.params, {k: before[f"0/{k}"] for k in params}) > 1e-4


def test_the_scale_doubles_after_enough_good_steps_in_a_row() -> None:
    cfg = case()
    params = {k: v * 0.5 for k, v in some(cfg, torch.float32).items()}
    plan = fnlm.Plan(precision="fp16", scale_every=2)
    _, seen = first_steps(cfg, params, [ragged()] * 7, plan, loss=overflowing(cfg, {3}), optimizer=optim.sgd(1e-3))
    scales = [float(m["train/loss_scale"]) / 2**16 for m in seen]
    assert scales == [1, 2, 2, 1, 1, 2, 2]  # an overflow also starts the count again
    assert [int(m["train/skipped"]) for m in seen] == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n", [1, 2])
def test_donation_changes_no_number(precision: Any, n: int) -> None:
    cfg = case()  # without biases: that of the keys has no gradient but rounding, which Adam would blow up
    params = {k: v * 0.5 for k, v in some(cfg, torch.float32).items()}
    compute = fnlm.Compute(kernels="plain")
    kept, given = (
        first_steps(
            cfg, params, [ragged()] * 4, fnlm.Plan(precision=precision, micro_batches=n, donate=d), compute=compute
        )
        for d in (False, True)
    )
    assert worst(kept[0].params, given[0].params) < 1e-5
    for a, b in zip(kept[1], given[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5)


def test_a_donated_state_is_updated_in_place_and_an_undonated_one_is_not() -> None:
    cfg, optimizer = case(), adamw()
    params = some(cfg, torch.float32)
    original = {k: v.clone() for k, v in params.items()}
    batch = ragged()
    for donate in (True, False):
        plan = fnlm.Plan(donate=donate)
        state = fnlm.init_state(params, optimizer, plan)
        before = {k: v.clone() for k, v in flatten(state).items()}
        new, _ = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)(state, batch)
        same = [state.params[k].data_ptr() == new.params[k].data_ptr() for k in params]
        assert all(same) if donate else not any(same)
        assert all(torch.equal(state.params[k], original[k]) for k in params) is not donate
        assert donate or equal(flatten(state), before)
        assert equal(params, original)
        assert not any(p.requires_grad for p in (*params.values(), *new.params.values()))
        assert equal(batch, ragged())


def test_states_of_one_dict_share_nothing() -> None:
    params = some(case(), torch.float32)
    a, b = (fnlm.init_state(params, adamw()) for _ in range(2))
    pointers = [t.data_ptr() for tree in (params, a, b) for t in flatten(tree).values() if t.numel()]
    assert len(set(pointers)) == len(pointers)


DRY, WET = {}, {"dropout_embed": 0.2, "dropout_attn": 0.3, "dropout_residual": 0.2, "dropout_ngram": 0.3}


def test_same_key_same_bits_other_key_other_dropout() -> None:
    cfg = case("ngrams", **WET)
    run = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))
    a, b, c = (run(some(cfg), ragged(), fnlm.key(s)) for s in (1, 1, 2))
    assert equal(a, b)
    assert worst(a[1], c[1]) > 1e-3


def test_each_step_drops_its_own() -> None:
    cfg = case("ngrams", **WET)
    still = optim.sgd(0.0)
    _, seen = first_steps(cfg, some(cfg), [ragged()] * 3, fnlm.Plan(), optimizer=still)
    assert len({float(m["train/loss"]) for m in seen}) == 3
    _, again = first_steps(cfg, some(cfg), [ragged()] * 3, fnlm.Plan(), optimizer=still)
    assert [float(m["train/loss"]) for m in again] == [float(m["train/loss"]) for m in seen]


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_dropout_does_not_depend_on_micro_batches(n: int, remat: Any) -> None:
    cfg = case("ngrams", **WET)
    params, batch = some(cfg), ragged(dtype=torch.float64)
    loss = fnlm.make_lm_loss(cfg, fnlm.Compute(remat=remat))
    value, grads = fnlm.value_and_grad(loss)(params, batch, fnlm.key(1))
    got, got_grads = fnlm.value_and_grad(loss, fnlm.Plan(micro_batches=n))(params, batch, fnlm.key(1))
    assert abs(float(got) - float(value)) < 1e-12
    assert worst(got_grads, grads) < 1e-12


@pytest.mark.parametrize("dropout", [DRY, WET])
def test_remat_changes_no_number(dropout: dict[str, float]) -> None:
    cfg, results = case("ngrams", **dropout), []
    for remat in ("none", "block"):
        loss = fnlm.make_lm_loss(cfg, fnlm.Compute(remat=remat))
        results.append(fnlm.value_and_grad(loss, fnlm.Plan(micro_batches=2))(some(cfg), ragged(), fnlm.key(1)))
    assert abs(float(results[0][0]) - float(results[1][0])) < 1e-12
    assert worst(results[0][1], results[1][1]) < 1e-12


def test_metrics() -> None:
    cfg = case()
    _, (seen,) = first_steps(cfg, some(cfg), [ragged()], fnlm.Plan())
    value, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(some(cfg), ragged())
    assert seen.keys() == {"train/loss", "train/grad_norm"}
    assert float(seen["train/loss"]) == float(value)
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    assert float(seen["train/grad_norm"]) == pytest.approx(norm, rel=1e-12)
    assert all(v.ndim == 0 and not v.requires_grad for v in seen.values())
    _, (bare,) = first_steps(cfg, some(cfg), [ragged()], fnlm.Plan(), optimizer=adamw(clip=None))
    assert bare.keys() == {"train/loss"}
    small = {k: v.float() for k, v in some(cfg).items()}
    _, (half,) = first_steps(cfg, small, [ragged()], fnlm.Plan(precision="fp16"))
    assert half.keys() == {"train/loss", "train/grad_norm", "train/loss_scale", "train/skipped"}


def test_metrics_of_a_step_survive_the_next_one() -> None:
    cfg, optimizer = case(), adamw()
    state = fnlm.init_state(some(cfg), optimizer)
    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer)
    state, first = step(state, ragged())
    kept = {k: float(v) for k, v in first.items()}
    step(state, ragged(5))
    assert {k: float(v) for k, v in first.items()} == kept


def test_one_sgd_step_is_the_formula() -> None:
    cfg = case()
    params = some(cfg)
    state, _ = first_steps(cfg, params, [ragged()], fnlm.Plan(), optimizer=optim.sgd(0.1))
    _, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(params, ragged())
    assert worst(state.params, {k: p - 0.1 * grads[k] for k, p in params.items()}) < 1e-13


def test_parameters_a_loss_does_not_use_get_zeros() -> None:
    cfg = case()
    params = some(cfg) | {"unused.weight": torch.ones(3, dtype=torch.float64)}
    for n in (1, 2):
        _, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg), fnlm.Plan(micro_batches=n))(params, ragged())
        assert torch.equal(grads["unused.weight"], torch.zeros(3, dtype=torch.float64))
        assert list(grads) == list(params)


def test_any_loss_of_any_dict_can_be_stepped() -> None:
    def loss(params: fnlm.Params, batch: fnlm.Batch, key: Any, use: Any) -> Tensor:
        return (params["w"] * batch.weights.mean() - 3).square().sum()

    state = fnlm.init_state({"w": torch.zeros(2)}, optim.sgd(0.4))
    step = fnlm.make_step(loss, optim.sgd(0.4))
    batch = fnlm.Batch(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    for _ in range(20):
        state, metrics = step(state, batch)
    torch.testing.assert_close(state.params["w"], torch.tensor([3.0, 3.0]))
    assert float(metrics["train/loss"]) < 1e-6


def test_modules_train_too() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11))
    apply, params = fnlm.from_module(module)
    before = {k: v.detach().clone() for k, v in module.named_parameters()}

    def loss(params: fnlm.Params, batch: fnlm.Batch, key: Any, use: Any) -> Tensor:
        return fnlm.cross_entropy(apply(params, batch.tokens), batch.targets, batch.weights)

    _, seen = first_steps(case(), params, [ragged()] * 3, fnlm.Plan(micro_batches=3), loss=loss)
    assert float(seen[2]["train/loss"]) < float(seen[0]["train/loss"])
    assert equal(before, {k: v.detach() for k, v in module.named_parameters()})


def test_use_stands_between_rest_and_compute() -> None:
    cfg, params = case(), some(case())

    def doubled(group: str, mine: fnlm.Params) -> fnlm.Params:
        return {k: 2 * v for k, v in mine.items()}

    value, grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg), fnlm.Plan(use=doubled))(params, ragged())
    twice = {k: 2 * v for k, v in params.items()}
    want, want_grads = fnlm.value_and_grad(fnlm.make_lm_loss(cfg))(twice, ragged())
    assert float(value) == float(want)
    assert worst(grads, {k: 2 * g for k, g in want_grads.items()}) < 1e-13


def test_a_loss_that_is_no_number_is_refused() -> None:
    def loss(params: fnlm.Params, batch: fnlm.Batch, key: Any, use: Any) -> Tensor:
        return params["w"] * batch.weights

    with pytest.raises(ValueError, match=r"this one has shape \(6, 7\); take its mean"):
        fnlm.value_and_grad(loss)({"w": torch.ones(())}, ragged())


def test_indivisible_micro_batches_are_refused() -> None:
    run = fnlm.value_and_grad(fnlm.make_lm_loss(case()), fnlm.Plan(micro_batches=4))
    with pytest.raises(ValueError, match=r"6 rows is not divisible into 4 micro-batches; choose a divisor of 6"):
        run(some(case()), ragged())


def test_an_empty_list_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="batch"):
        fnlm.value_and_grad(fnlm.make_lm_loss(case()))(some(case()), [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "bf61"}, "precision='bf61' is unknown; did you mean 'bf16'"),
        ({"precision": "float32"}, "precision='float32' is unknown"),
        ({"micro_batches": 0}, "micro_batches=0 must be at least 1"),
    ],
)
def test_wrong_plans_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fnlm.Plan(**wrong)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_judge_decides_before_anything_changes(precision: Any, donate: bool, clip: float | None) -> None:
    """Refused: the same bits, one step on. Accepted: the same bits as without a judge."""
    cfg, plan = case(), fnlm.Plan(precision, donate=donate)
    params, batch, optimizer = some(cfg, torch.float32), ragged(), adamw(clip)

    def fresh(step: int) -> State:
        state = fnlm.init_state(params, optimizer, plan)._replace(step=torch.tensor(step))
        if precision == "fp16":  # a scale that does not overflow
            state = state._replace(opt_state=state.opt_state._replace(scale=torch.tensor(64.0)))
        return state

    start = fresh(0)
    before = {k: v.clone() for k, v in flatten(start).items()}
    norms: list[float] = []

    def refuse(value: Tensor, norm: Tensor, grads: fnlm.Params, at: fnlm.Params) -> bool:
        norms.append(float(norm))
        assert grads.keys() == at.keys()
        assert float(norm) == pytest.approx(float(optim.global_norm(grads)), rel=1e-5)
        return len(norms) > 1

    step = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan, refuse)
    state, metrics = step(start, batch)
    assert int(metrics["train/skipped"]) == 1
    assert int(state.step) == 1
    after = flatten(state)
    loss_scale_counts = {"step", "opt_state/good"}  # fp16 counts good gradients, applied or not
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k not in loss_scale_counts)
    state, metrics = step(state, batch)
    assert int(metrics["train/skipped"]) == 0
    assert float(metrics["train/grad_norm"]) == norms[1]
    plain = fnlm.make_step(fnlm.make_lm_loss(cfg), optimizer, plan)
    unjudged = plain(fresh(1), batch)[0]
    assert all(torch.equal(v, state.params[k]) for k, v in unjudged.params.items())
