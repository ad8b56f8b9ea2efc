"""Any nn.Module as a pure function, our model as an nn.Module: the same numbers, and nobody's weights are touched."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fnlm
from fnlm import optim, random, tree
from fnlm.lift import as_module, from_module, from_stateful_module, stack

# torch compiles forward-mode formulas by its own deprecated torch.jit when the first jvp runs.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


class Tied(nn.Module):
    """One weight as embedding and as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(tokens)).tanh())


class Shared(nn.Module):
    """One submodule under two names, and once more inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.rest = nn.ModuleList([nn.Linear(4, 4), self.first])
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        if self.broken:
            raise RuntimeError("broken inside")
        return self.rest[1](self.rest[0](x))


class Twice(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 4))
        self.down = self.up

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.up).tanh() @ self.down.mT


class Masked(nn.Module):
    """As Hugging Face's GPT-2: a causal mask and a scale in buffers, one of them not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor, *, last_only: bool = False) -> dict[str, Any]:
        q, k, v = self.qkv(x).split(4, -1)
        t = x.shape[-2]
        scores = (q @ k.mT * self.scale).masked_fill(~self.mask[:t, :t], -torch.inf)
        y = scores.softmax(-1) @ v
        return {"out": y[..., -1:, :] if last_only else y, "more": (scores.exp(), None)}


class Listed(nn.Module):
    """Parameters in torch's containers, and a Sequential within a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Sequential(nn.LayerNorm(4))])
        self.bias = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.gains = nn.ParameterDict({"in": torch.randn(4)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.gains["in"]
        for layer, bias in zip(self.layers, self.bias, strict=True):
            x = layer(x) + bias
        return x, x.sum()


class Average(nn.Module):
    """A buffer that is replaced, not written into, and one that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Module()
        self.inner.register_buffer("steps", self.steps)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        self.inner.steps += 1
        return (x - self.mean) * self.weight


def tokens() -> Tensor:
    return random.randint(fnlm.key(7), (3, 5), 0, 11)


def floats(*shape: int) -> Tensor:
    return random.normal(fnlm.key(8), shape or (6, 4))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied": (Tied, tokens),
    "shared": (Shared, floats),
    "twice": (Twice, floats),
    "masked": (Masked, lambda: floats(2, 6, 4)),
    "listed": (Listed, floats),
    "average": (Average, floats),
    "batch norm, train": (batch_norm, floats),
    "batch norm, eval": (lambda: batch_norm().eval(), floats),
    "no parameters": (nn.Tanh, floats),
    "recurrent": (lambda: nn.LSTM(4, 3, num_layers=2), floats),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), floats),
    "transformer layer": (transformer_layer, lambda: floats(2, 6, 4)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, example = CASES[request.param]
    return make(), example()


def tensors(out: Any) -> list[Tensor]:
    """The tensors of a module's result, whatever its shape."""
    if isinstance(out, dict):
        out = tuple(out.values())
    return [t for x in out for t in tensors(x)] if isinstance(out, tuple) else [] if out is None else [out]


def total(out: Any) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors(out)]).sum()


def live(params: fnlm.Params) -> fnlm.Params:
    return {k: v.detach().requires_grad_() for k, v in params.items()}


# What a call returns


def test_a_lifted_module_computes_what_the_module_does(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    apply, params = from_module(module)
    want = tensors(deepcopy(module)(x))
    for _ in range(2):  # the second call sees nothing of the first
        got = tensors(apply(live(params), x))  # torch's attention may take another kernel where no gradient is wanted
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_names_and_their_order_are_torchs(case: tuple[nn.Module, Tensor]) -> None:
    module, _ = case
    _, params, buffers = from_stateful_module(module)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert list(buffers) == [name for name, _ in module.named_buffers()]
    assert not any(t.requires_grad for t in (params | buffers).values())


def test_other_parameters_are_really_used(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    apply, params = from_module(module)
    other = {k: v * 1.5 + 0.1 for k, v in params.items()}
    copy = deepcopy(module)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(other[name])
    for a, b in zip(tensors(apply(other, x)), tensors(copy(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not params or not torch.equal(total(apply(other, x)), total(apply(params, x)))


def test_gradients_are_torchs_own(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    apply, params = from_module(module)
    if not params:
        return
    copy, leaves = deepcopy(module), live(params)
    total(copy(x)).backward()
    got = torch.autograd.grad(total(apply(leaves, x)), list(leaves.values()))
    functional = grad(lambda p: total(apply(p, x)))(params)
    for (name, p), g in zip(copy.named_parameters(), got, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(functional[name], p.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_tied_gradient_is_the_sum_of_both_uses() -> None:
    torch.manual_seed(0)
    module = Tied().double()
    apply, params = from_module(module)
    assert list(params) == ["embed.weight", "inner.weight", "inner.bias"]
    tied = grad(lambda p: total(apply(p, tokens())))(params)["embed.weight"]
    weight, inner = params["embed.weight"], module.inner.requires_grad_(False)

    def apart(rows: Tensor, head: Tensor) -> Tensor:
        return total(inner(rows[tokens()]).tanh() @ head.mT)

    rows, head = grad(apart, argnums=(0, 1))(weight, weight)
    assert min(float(part.abs().max()) for part in (rows, head)) > 1e-3
    torch.testing.assert_close(tied, rows + head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_parameters(dtype: torch.dtype) -> None:
    module = Shared().to(dtype)
    apply, params = from_module(module)
    assert {p.dtype for p in params.values()} == {dtype}
    assert torch.equal(apply(params, floats().to(dtype)), module(floats().to(dtype)))
    wide = {k: v.double() for k, v in params.items()}
    assert apply(wide, floats().double()).dtype == torch.float64


def test_arguments_by_position_and_by_name() -> None:
    module = Masked()
    apply, params = from_module(module)
    got, want = apply(params, x=floats(2, 6, 4), last_only=True), module(floats(2, 6, 4), last_only=True)
    assert torch.equal(got["out"], want["out"]) and got["out"].shape == (2, 1, 4)
    assert isinstance(got["more"], tuple) and got["more"][1] is None


# What a call leaves behind


@pytest.mark.xfail(reason="pytorch#164759: the reason why lift.py gives one name per module", strict=False)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_torchs_functional_call_restores_a_shared_submodule(tie_weights: bool) -> None:
    module = Shared()
    before = module.first.weight
    zeros = {name: torch.zeros_like(p) for name, p in module.state_dict().items()}
    functional_call(module, zeros, (floats(),), tie_weights=tie_weights)
    assert module.first.weight is before


def test_the_module_is_never_touched(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    values = {name: t.clone() for name, t in held.items()}
    apply, params, buffers = from_stateful_module(module)
    apply({k: v + 1 for k, v in params.items()}, buffers, x)
    after = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    assert all(after[name] is t and torch.equal(t, values[name]) for name, t in held.items())
    assert all(torch.equal(t, values[name]) for name, t in (params | buffers).items())


@pytest.mark.parametrize("broken", [False, True])
def test_a_call_keeps_no_parameters_alive(broken: bool) -> None:
    module = Shared()
    module.broken = broken
    apply, params = from_module(module)
    given = {k: v.clone() for k, v in params.items()}
    seen = [weakref.ref(v) for v in given.values()]
    if broken:
        with pytest.raises(RuntimeError, match="broken inside"):
            apply(given, floats())
    else:
        apply(given, floats())
    del given
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4


def test_a_lifted_module_can_be_compiled() -> None:
    module = Shared()
    apply, params = from_module(module)
    fast = torch.compile(apply, backend="eager", fullgraph=True)
    assert torch.equal(fast(params, floats()), module(floats()))
    assert torch.equal(apply(params, floats()), module(floats()))


def test_results_do_not_depend_on_earlier_calls_that_raised() -> None:
    module = Shared()
    apply, params = from_module(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        apply({k: v * 9 for k, v in params.items()}, torch.ones(2, 3))
    assert torch.equal(apply(params, floats()), module(floats()))


def test_later_changes_of_the_module_do_not_reach_the_function() -> None:
    module = batch_norm().eval()
    apply, params = from_module(module)
    before = apply(params, floats())
    module.train()
    with torch.no_grad():
        for t in module.state_dict().values():
            t += 1
    assert torch.equal(apply(params, floats()), before)


# Buffers and frozen parameters


def test_batch_norm_averages_are_results() -> None:
    module = batch_norm()
    apply, params, buffers = from_stateful_module(module)
    assert list(buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    for i in range(3):
        x, given = floats() + i, {k: b.clone() for k, b in buffers.items()}
        out, after = apply(params, buffers, x)
        assert torch.equal(out, module(x))
        assert tree.equal(buffers, given)
        buffers = after
    assert tree.equal(buffers, dict(module.named_buffers()))
    assert int(buffers["1.num_batches_tracked"]) == 3


def test_a_buffer_may_be_replaced_and_shared() -> None:
    module = Average()
    apply, params, buffers = from_stateful_module(module)
    assert list(buffers) == ["mean", "steps"]
    for i in range(3):
        out, buffers = apply(params, buffers, floats() + i)
        assert torch.equal(out, module(floats() + i))
    assert tree.equal(buffers, {"mean": module.mean, "steps": module.steps})
    assert int(buffers["steps"]) == 3


def test_buffers_inside_a_transform() -> None:
    apply, params, buffers = from_stateful_module(batch_norm())

    def loss(p: fnlm.Params) -> tuple[Tensor, fnlm.Params]:
        out, after = apply(p, buffers, floats())
        return total(out), after

    _, after = grad(loss, has_aux=True)(params)
    assert tree.equal(after, apply(params, buffers, floats())[1])


def test_frozen_parameters_stay_as_they_are() -> None:
    module = Shared()
    module.rest[0].requires_grad_(False)
    apply, params, buffers = from_stateful_module(module)
    assert list(params) == ["first.weight", "first.bias"]
    assert list(buffers) == ["rest.0.weight", "rest.0.bias"]
    assert torch.equal(apply(params, buffers, floats())[0], module(floats()))


# What is refused


def test_parameters_that_do_not_fit() -> None:
    apply, params = from_module(Tied())
    wrong = {"embed.weigth": params["embed.weight"], "inner.weight": params["inner.weight"]}
    message = "parameters do not fit the module: missing embed.weight, inner.bias; unknown embed.weigth"
    with pytest.raises(ValueError, match=message):
        apply(wrong, tokens())
    with pytest.raises(ValueError, match=r"missing none; unknown head.weight"):
        apply(params | {"head.weight": params["embed.weight"]}, tokens())
    with pytest.raises(ValueError, match=r"p0, p1, p2, p3, p4 and 4 more"):
        apply(params | {f"p{i}": torch.ones(1) for i in range(9)}, tokens())


def test_buffers_that_do_not_fit() -> None:
    apply, params, _ = from_stateful_module(batch_norm())
    with pytest.raises(ValueError, match=r"buffers do not fit the module: missing 1.num_batches_tracked, 1.running"):
        apply(params, {}, floats())


def test_a_lazy_module() -> None:
    with pytest.raises(ValueError, match="weight, bias have no shape yet; call the module once"):
        from_module(nn.LazyLinear(3))


class Hidden(nn.Module):
    """A parameter that a plain list holds too, where functional_call does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.again[0]


class Rematerialised(nn.Module):
    """A module that checkpoints itself: the backward pass calls it again, outside of functional_call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return y


def test_a_parameter_held_elsewhere_gives_nan_and_not_stale_values() -> None:
    apply, params = from_module(Hidden())
    assert apply(params, floats()).isnan().all()


def test_a_module_that_checkpoints_itself_gives_nan_and_not_wrong_gradients() -> None:
    apply, params = from_module(Rematerialised())
    leaves = live(params)
    grads = torch.autograd.grad(total(apply(leaves, floats())), list(leaves.values()))
    assert grads[0].isnan().all()


def test_a_lifted_module_may_be_checkpointed_from_outside() -> None:
    module = Shared()
    apply, params = from_module(module)
    leaves = live(params)
    out = checkpoint(apply, leaves, floats(), use_reentrant=False)
    got = torch.autograd.grad(total(out), list(leaves.values()))
    total(module(floats())).backward()
    for g, p in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


# Transforms


def test_per_sample_gradients() -> None:
    apply, params = from_module(Tied().double())

    def loss(p: fnlm.Params, row: Tensor) -> Tensor:
        return total(apply(p, row[None]))

    together = vmap(grad(loss), in_dims=(None, 0))(params, tokens())
    for i, row in enumerate(tokens()):
        for name, g in grad(loss)(params, row).items():
            torch.testing.assert_close(together[name][i], g)


@forward_mode
def test_forward_mode_and_the_hessian() -> None:
    apply, params = from_module(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double())
    x = floats(5, 2).double()
    v = {k: torch.ones_like(p) for k, p in params.items()}

    def loss(p: fnlm.Params) -> Tensor:
        return total(apply(p, x))

    def moved(by: float) -> fnlm.Params:
        return {k: p + by * v[k] for k, p in params.items()}

    slope, curved = jvp(loss, (params,), (v,))[1], jvp(grad(loss), (params,), (v,))[1]
    torch.testing.assert_close(slope, (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5, rtol=1e-7, atol=0)
    rows = hessian(loss)(params)
    for name, got in curved.items():
        want = sum(rows[name][other].flatten(got.ndim).sum(-1) for other in params)
        torch.testing.assert_close(got, want)


def test_batch_norm_in_train_mode_has_no_per_sample_gradients() -> None:
    apply, params = from_module(batch_norm())
    with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):
        vmap(lambda x: apply(params, x))(floats(2, 6, 4))


def test_dropout_draws_from_torch_not_from_a_key() -> None:
    apply, params = from_module(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    torch.manual_seed(3)
    first, second = apply(params, floats()), apply(params, floats())
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(apply(params, floats()), first)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: apply(params, x))(floats())
    vmap(lambda x: apply(params, x), randomness="different")(floats())


# Training


def test_training_equals_torchs_step_by_step() -> None:
    torch.manual_seed(0)
    module = Tied().double()
    apply, params = from_module(module)

    def loss(p: fnlm.Params, batch: fnlm.Batch, key: fnlm.Key | None, use: Any) -> Tensor:
        return fnlm.cross_entropy(apply(p, batch.tokens), batch.targets, batch.weights)

    optimizer = optim.adamw(1e-2, b2=0.99, decay=0.1, clip=0.5)
    step, state = fnlm.make_step(loss, optimizer), fnlm.init_state(params, optimizer)
    theirs = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    start = total(module(tokens())).item()
    for i in range(20):
        rows = random.randint(fnlm.fold_in(fnlm.key(1), i), (4, 6), 0, 11)
        state, metrics = step(state, fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(4, 5)))
        theirs.zero_grad()
        value = nn.functional.cross_entropy(module(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        value.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        theirs.step()
        assert abs(float(metrics["train/loss"] - value.detach())) < 1e-7
        assert abs(float(metrics["train/grad_norm"] - norm)) < 1e-7
        for name, p in module.named_parameters():
            torch.testing.assert_close(state.params[name], p.detach(), rtol=0, atol=1e-7)
    assert abs(total(module(tokens())).item() - start) > 0.1


# Our model as a module

BASE: dict[str, Any] = {"vocab_size": 17, "n_layers": 2, "n_heads": 2, "d_model": 8, "seq_len": 6}
CONFIGS = {
    "gpt2": fnlm.ModelConfig(**BASE, bias=True),
    "llama": fnlm.ModelConfig(**BASE, norm="rmsnorm", mlp="swiglu", positions="rope", n_kv_heads=1, tied=False),
    "ngrams": fnlm.ModelConfig(**BASE, ngrams=((2, 32),), norm_affine=False, qk_norm=True, positions="alibi"),
}


def ids() -> Tensor:
    return random.randint(fnlm.key(5), (2, 6), 0, 17)


@pytest.mark.parametrize("name", CONFIGS)
def test_functional_call_of_our_module_is_the_forward(name: str) -> None:
    cfg = CONFIGS[name]
    params = fnlm.init_params(cfg, fnlm.key(3))
    module = as_module(cfg)
    assert list(module.state_dict()) == list(params)
    assert torch.equal(functional_call(module, params, (ids(),)), fnlm.forward(params, ids(), cfg))
    assert torch.equal(as_module(cfg, params)(ids()), fnlm.forward(params, ids(), cfg))
    assert torch.equal(module(ids()), fnlm.forward(fnlm.init_params(cfg, fnlm.key(0)), ids(), cfg))


def test_dropout_of_our_module_is_that_of_the_key() -> None:
    cfg = fnlm.ModelConfig(**BASE, dropout_embed=0.2, dropout_attn=0.2, dropout_residual=0.2)
    module, params = as_module(cfg), fnlm.init_params(cfg, fnlm.key(0))
    want = fnlm.forward(params, ids(), cfg, key=fnlm.key(4))
    assert torch.equal(module.eval()(ids(), fnlm.key(4)), want)
    assert torch.equal(module.train()(ids(), key=fnlm.key(4)), want)
    assert torch.equal(module(ids()), fnlm.forward(params, ids(), cfg)) and not torch.equal(module(ids()), want)


def test_one_tensor_may_stand_under_two_names() -> None:
    cfg = CONFIGS["gpt2"]
    params = fnlm.init_params(cfg, fnlm.key(3))
    params["blocks.1.attn_norm.weight"] = params["blocks.0.attn_norm.weight"].mul_(2)
    assert torch.equal(functional_call(as_module(cfg), params, (ids(),)), fnlm.forward(params, ids(), cfg))


def test_our_module_holds_copies() -> None:
    cfg = CONFIGS["gpt2"]
    params = fnlm.init_params(cfg, fnlm.key(3))
    module = as_module(cfg, params)
    before = module(ids())
    for p in params.values():
        p.zero_()
    assert torch.equal(module(ids()), before)
    assert all(p.requires_grad for p in module.parameters())


def test_our_module_refuses_the_parameters_of_another() -> None:
    params = fnlm.init_params(CONFIGS["gpt2"], fnlm.key(0))
    with pytest.raises(ValueError, match=r"missing blocks.0.mlp.gate.weight, .* unknown blocks.0.attn.k.bias, .* more"):
        as_module(CONFIGS["llama"], params)


def test_there_and_back() -> None:
    cfg = CONFIGS["llama"]
    params = fnlm.init_params(cfg, fnlm.key(3))
    apply, again = from_module(as_module(cfg, params))
    assert tree.equal(again, params)
    assert torch.equal(apply(again, ids()), fnlm.forward(params, ids(), cfg))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    cfg = CONFIGS["gpt2"]
    params = fnlm.init_params(cfg, fnlm.key(3))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        module = as_module(cfg, params)
        wrapped = nn.parallel.DistributedDataParallel(module)
        total(wrapped(ids())).backward()
        del wrapped
    finally:
        dist.destroy_process_group()
    leaves = live(params)
    want = torch.autograd.grad(total(fnlm.forward(leaves, ids(), cfg)), list(leaves.values()))
    for (name, p), g in zip(module.named_parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export() -> None:
    module = as_module(CONFIGS["llama"])
    sizes = {"tokens": {0: torch.export.Dim("B", min=1, max=64)}}
    program = torch.export.export(module, (ids(),), dynamic_shapes=sizes)
    for rows in (ids(), ids()[:1], ids().repeat(3, 1)):
        torch.testing.assert_close(program.module()(rows), module(rows))


# Many models


def test_a_stack_of_models() -> None:
    cfg = CONFIGS["gpt2"]
    models = [fnlm.init_params(cfg, fnlm.key(i)) for i in range(3)]
    logits = vmap(lambda p: fnlm.forward(p, ids(), cfg))(stack(models))
    for got, params in zip(logits, models, strict=True):
        torch.testing.assert_close(got, fnlm.forward(params, ids(), cfg))


def test_what_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="no models to stack"):
        stack([])
    with pytest.raises(ValueError, match="missing a; unknown b"):
        stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_threads_do_not_meet_in_a_module() -> None:
    """Each calls the same lifted module with parameters of its own, many times at once."""
    apply, params = fnlm.from_module(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)))
    x = torch.ones(2, 3)
    given = [{k: torch.full_like(p, float(i)) for k, p in params.items()} for i in range(4)]
    wanted = [apply(p, x) for p in given]
    wrong = []

    def call(i: int) -> None:
        wrong.extend(n for n in range(300) if not torch.equal(apply(given[i], x), wanted[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
