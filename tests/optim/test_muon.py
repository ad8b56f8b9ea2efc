"""Newton-Schulz and the shapes it meets."""

import pytest
import torch

from fnlm import optim


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64), (3, 64, 16), (2, 3, 16, 64)])
@pytest.mark.parametrize(("coefficients", "low", "high"), [("quintic", 0.3, 1.25), ("polar", 0.3, 1.2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_singular_values_come_near_one_and_vectors_stay(shape, coefficients, low, high, dtype):
    x = normal(*shape)
    y = optim.newton_schulz(x, 5, coefficients, dtype)
    assert y.shape == x.shape
    assert y.dtype == dtype
    values = torch.linalg.svdvals(y.float())
    assert low < values.min()
    assert values.max() < high
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    polar = u @ v
    assert ((y.float() - polar).norm() / polar.norm()) < 0.25


def test_polar_is_nearer_to_one_than_quintic():
    x = normal(64, 16)
    spread = {
        c: (torch.linalg.svdvals(optim.newton_schulz(x, 5, c).float()) - 1).abs().max() for c in ("quintic", "polar")
    }
    assert spread["polar"] < 0.06 < spread["quintic"]


def test_fewer_polar_steps_keep_the_last_polynomials():
    x = torch.full((1, 1), 2.0, dtype=torch.float64)
    y = optim.newton_schulz(x, 1, "polar", torch.float64).item()
    z = 1 / 1.01
    assert y == pytest.approx(2.8366 * z - 3.0525 * z**3 + 1.2012 * z**5, rel=1e-6)


@pytest.mark.parametrize("coefficients", ["quintic", "polar"])
def test_zeros_stay_zeros(coefficients):
    assert not optim.newton_schulz(torch.zeros(4, 3), 5, coefficients).any()


@pytest.mark.parametrize(
    ("adjust", "shape", "ratio"),
    [("none", (64, 16), 1), ("original", (64, 16), 2), ("original", (16, 64), 1), ("match_rms_adamw", (16, 100), 2)],
)
def test_adjust(adjust, shape, ratio):
    link = optim.scale_by_muon(adjust=adjust)
    params = {"w": normal(*shape)}
    updates, _ = link.update({"w": normal(*shape, seed=1)}, link.init(params), params)
    rms_of_orthogonal = max(shape) ** -0.5
    assert updates["w"].square().mean().sqrt() == pytest.approx(ratio * rms_of_orthogonal, rel=0.2)


def test_leading_dims_are_independent_matrices():
    x = normal(3, 16, 8)
    together = optim.newton_schulz(x, dtype=torch.float64)
    apart = torch.stack([optim.newton_schulz(m, dtype=torch.float64) for m in x])
    assert torch.allclose(together, apart, atol=1e-12)
