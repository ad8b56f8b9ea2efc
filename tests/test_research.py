"""The page on research scripts is true: its blocks run, in order, and so does what its sentences say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import grad, jvp

import fnlm
from fnlm import lift

PAGE = Path(__file__).parents[1] / "docs" / "research.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
CFG = fnlm.ModelConfig(vocab_size=16, n_layers=1, n_heads=2, d_model=16, seq_len=8, positions="rope")

# torch compiles forward-mode formulas by its own deprecated torch.jit when the first jvp runs.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


def batch() -> fnlm.Batch:
    rows = fnlm.random.randint(fnlm.key(1), (4, 9), 0, 16)
    return fnlm.Batch(rows[:, :-1], rows[:, 1:], torch.ones(4, 8))


@forward_mode
def test_the_blocks_run_from_top_to_bottom() -> None:
    assert len(BLOCKS) >= 9
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        for block in BLOCKS:
            line = PAGE.read_text(encoding="utf-8").split(block)[0].count("\n")  # errors name the line of the page
            exec(compile("\n" * line + block, str(PAGE), "exec"), names)


@forward_mode
@pytest.mark.parametrize("kernels", ["auto", "plain", "sdpa"])
def test_nothing_has_to_be_switched_under_a_transform(kernels: Any) -> None:
    params = fnlm.init_params(CFG, fnlm.key(0), dtype=torch.float64)

    def slope(compute: fnlm.Compute) -> fnlm.Params:
        return jvp(lambda p: grad(fnlm.lm_loss)(p, batch(), CFG, compute=compute), (params,), (params,))[1]

    want = slope(fnlm.Compute(kernels="plain"))
    for name, got in slope(fnlm.Compute(kernels=kernels)).items():
        torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize("kernels", ["auto", "sdpa"])
def test_a_second_derivative_of_a_fast_kernel_is_refused_or_right(kernels: Any) -> None:
    def second(compute: fnlm.Compute) -> tuple[torch.Tensor, ...]:
        params = fnlm.init_params(CFG, fnlm.key(0), dtype=torch.float64)
        leaves = [p.requires_grad_() for p in params.values()]
        first = torch.autograd.grad(fnlm.lm_loss(params, batch(), CFG, compute=compute), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)

    try:
        got = second(fnlm.Compute(kernels=kernels))
    except (RuntimeError, ValueError):
        return
    for a, b in zip(got, second(fnlm.Compute(kernels="plain")), strict=True):
        torch.testing.assert_close(a, b)


def test_rematerialisation_under_grad_is_refused() -> None:
    params = fnlm.init_params(CFG, fnlm.key(0))
    with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        grad(fnlm.lm_loss)(params, batch(), CFG, compute=fnlm.Compute(remat="block"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_gradient_is_right() -> None:
    params = fnlm.init_params(CFG, fnlm.key(0))
    fast = torch.compile(lambda p: grad(fnlm.lm_loss)(p, batch(), CFG), backend="aot_eager")(params)
    for name, want in grad(fnlm.lm_loss)(params, batch(), CFG).items():
        torch.testing.assert_close(fast[name], want, rtol=1e-4, atol=1e-6)


@forward_mode
def test_forward_mode_through_torchs_attention_wants_the_plain_kernel() -> None:
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    apply, params = lift.from_module(layer)
    x = fnlm.random.normal(fnlm.key(0), (2, 6, 4))
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(lambda p: apply(p, x), (params,), (params,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jvp(lambda p: apply(p, x), (params,), (params,))
