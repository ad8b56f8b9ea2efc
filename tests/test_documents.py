"""Documents that are packed into one window and told apart: the logits of each are those of it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fnlm
from fnlm.collectives import LOCAL, Axis
from fnlm.places import begins_of

END, START = 1, 2
SHAPES: dict[str, dict[str, object]] = {
    "rope": {"positions": "rope", "n_kv_heads": 1, "norm": "rmsnorm", "mlp": "swiglu"},
    "learned": {"positions": "learned", "embed_norm": True},
    "alibi": {"positions": "alibi"},
    "window": {"positions": "rope", "window": 5},
    "ngrams": {"positions": "rope", "ngrams": ((2, 4000), (3, 50)), "token_shift": 0.5, "qk_norm": True},
    "parallel": {"positions": "rope", "rope_fraction": 0.5, "parallel_residual": True},
}


def model(seq_len: int, **shape: object) -> tuple[fnlm.ModelConfig, fnlm.Params]:
    cfg = fnlm.ModelConfig(vocab_size=60, n_layers=2, n_heads=2, d_model=16, seq_len=seq_len, **shape)
    params = fnlm.init_params(cfg, fnlm.key(3))
    return cfg, {k: v.double() + 0.02 * torch.ones_like(v).double() for k, v in params.items()}


def documents(*lengths: int, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(3, 60, (n - 1,), generator=made), torch.tensor([END])]) for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernels", "long"), [("auto", False), ("plain", False), ("sdpa", False), ("auto", True)])
def test_a_packed_document_has_the_logits_of_it_alone(shape: str, kernels: str, long: bool) -> None:
    rows = [documents(150, 3, 147), documents(1, 270, 29, seed=1)] if long else [documents(7, 1, 12), documents(13, 7)]
    cfg, params = model(sum(map(len, rows[0])), **SHAPES[shape])
    compute = fnlm.Compute(kernels=kernels, document_end=END)
    packed = fnlm.forward(params, torch.stack([torch.cat(row) for row in rows]), cfg, compute=compute)
    plain = fnlm.Compute(kernels="plain")
    for b, row in enumerate(rows):
        alone = [fnlm.forward(params, one[None], cfg, compute=plain)[0] for one in row]
        assert (packed[b] - torch.cat(alone)).abs().max() < 1e-10
    together = fnlm.forward(params, torch.stack([torch.cat(row) for row in rows]), cfg, compute=plain)
    assert (together - packed).abs().max() > 1e-3  # and without, they would not be


@pytest.mark.parametrize("shape", ["rope", "ngrams", "alibi"])
def test_gradients_are_those_of_the_documents_alone(shape: str) -> None:
    rows = [documents(150, 3, 147), documents(1, 270, 29, seed=1)]
    cfg, params = model(300, **SHAPES[shape])

    def gradient(batches: list[Tensor], compute: fnlm.Compute) -> dict[str, Tensor]:
        live = {k: v.clone().requires_grad_() for k, v in params.items()}
        total = torch.zeros((), dtype=torch.float64)
        for tokens in batches:
            batch = fnlm.Batch(tokens, (tokens * 7 + 1) % 60, torch.ones(tokens.shape))
            total = total + fnlm.lm_loss(live, batch, cfg, compute=compute) * tokens.numel()
        return dict(zip(live, torch.autograd.grad(total, list(live.values())), strict=True))

    packed = gradient([torch.stack([torch.cat(row) for row in rows])], fnlm.Compute(document_end=END))
    alone = gradient([one[None] for row in rows for one in row], fnlm.Compute(kernels="plain"))
    for name, g in alone.items():
        assert (packed[name] - g).abs().max() < 1e-9, name


def test_a_document_may_begin_with_an_id_of_its_own() -> None:
    cfg, params = model(20, positions="learned")
    one, two = (torch.cat([torch.tensor([START]), d[:-1], torch.tensor([END, END])]) for d in documents(6, 7))
    packed = fnlm.forward(params, torch.cat([one, two])[None], cfg, compute=fnlm.Compute(document_start=START))
    alone = torch.cat([fnlm.forward(params, x[None], cfg) for x in (one, two)], 1)
    assert (packed - alone).abs().max() < 1e-10


def test_where_documents_begin() -> None:
    row = torch.tensor([[5, END, 6, 7, END, END, START, 8]])
    assert begins_of(row, fnlm.Compute(document_end=END)).tolist() == [[0, 0, 2, 2, 2, 5, 6, 6]]
    assert begins_of(row, fnlm.Compute(document_start=START)).tolist() == [[0, 0, 0, 0, 0, 0, 6, 6]]
    assert begins_of(row, fnlm.Compute()) is None


def test_each_row_has_documents_of_its_own_under_vmap_too() -> None:
    cfg, params = model(20, positions="rope")
    rows = torch.stack([torch.cat(documents(13, 7, seed=s)) for s in range(3)])
    compute = fnlm.Compute(document_end=END)

    def one(row: Tensor) -> Tensor:
        return fnlm.forward(params, row[None], cfg, compute=compute)[0]

    assert (torch.func.vmap(one)(rows) - fnlm.forward(params, rows, cfg, compute=compute)).abs().max() < 1e-12


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="two ways to say one thing"):
        fnlm.Compute(document_end=1, document_start=2)
    with pytest.raises(ValueError, match="not told apart on a split context"):
        begins_of(torch.zeros(1, 4), fnlm.Compute(document_end=1), LOCAL._replace(context=Axis("context", 2, 0, None)))
