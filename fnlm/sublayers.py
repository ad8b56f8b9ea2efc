"""The halves of a block for long sequences on a CPU, x + attention(norm(x)) and x + mlp(norm(x)), gradients by hand.

The same mathematics as the composed block in forward.py, which short sequences, transforms, dropout, parallel residuals
and split models use. Above KEEP positions each half keeps only what is expensive to compute again: not norms,
rotations, attention weights, activations, or joined weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnlm import clib
from fnlm.attention import Places
from fnlm.blocked import Heads, attend, attend_backward, keeps, to_heads, to_rows
from fnlm.config import Mlp, ModelConfig
from fnlm.kernels import once_differentiable, rotate
from fnlm.mlp import activate
from fnlm.types import Params

Grads = tuple[Tensor | None, ...]


def attention_sublayer(p: Params, x: Tensor, cfg: ModelConfig, places: Places) -> Tensor:
    """x + out(attention(norm(x))) of a block's dict: (B, T, D) -> (B, T, D)."""
    names = ["attn_norm.weight", "attn_norm.bias", "attn.q_norm.weight", "attn.q_norm.bias"]
    names += ["attn.k_norm.weight", "attn.k_norm.bias", "attn.out.weight", "attn.out.bias"]
    names += [f"attn.{head}.{kind}" for kind in ("weight", "bias") for head in "qkv"]
    out: Tensor = _Attention.apply(x, cfg, places, *(p.get(name) for name in names))  # type: ignore[no-untyped-call]
    return out


def mlp_sublayer(p: Params, x: Tensor, cfg: ModelConfig) -> Tensor:
    """x + down(activate(up(norm(x)))) of a block's dict: (B, T, D) -> (B, T, D)."""
    names = ["mlp_norm.weight", "mlp_norm.bias", "mlp.down.weight", "mlp.down.bias"]
    inner = ("gate", "up") if cfg.mlp == "swiglu" else ("up",)
    names += [f"mlp.{name}.{kind}" for kind in ("weight", "bias") for name in inner]
    out: Tensor = _Mlp.apply(x, cfg, *(p.get(name) for name in names))  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cfg: ModelConfig, places: Places, *weights: Any) -> Tensor:
        nw, nb, *qk_norms, wo, bo, wq, wk, wv, bq, bk, bv = weights
        rows = x.flatten(0, 1)
        h, stats = _norm(rows, nw, nb, cfg)
        joined = _join(wq, wk, wv)
        qkv = F.linear(h, joined, _join(bq, bk, bv))
        n = (wq.shape[0] // cfg.head_dim, wk.shape[0] // cfg.head_dim)
        y, inner = _inner(qkv.view(*x.shape[:2], -1), qk_norms, n, cfg, places)
        ctx.save_for_backward(x, *stats, *weights, y, *([h, joined] if keeps(x.shape[1]) else []), *inner)
        ctx.cfg, ctx.places, ctx.n = cfg, places, n
        return _add_linear(rows, y, wo, bo).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Grads:
        cfg, places, n = ctx.cfg, ctx.places, ctx.n
        x, mean, rstd, nw, nb, *rest = ctx.saved_tensors
        qk_norms, (wo, bo, wq, wk, wv, bq, _, _, y, *kept) = rest[:4], rest[4:]
        rows, g2 = x.flatten(0, 1), g.flatten(0, 1)
        h, joined, *inner = kept if keeps(x.shape[1]) else (_norm(rows, nw, nb, cfg)[0], _join(wq, wk, wv), *kept)
        d_qkv, *d_qk_norms = _inner_backward((g2 @ wo).view(*x.shape[:2], -1), y, inner, qk_norms, n, cfg, places)
        sizes = [w.shape[0] for w in (wq, wk, wv)]
        qkv_wanted, out_wanted = any(ctx.needs_input_grad[-6:-3]), ctx.needs_input_grad[-8]
        d_w = (d_qkv.T @ h).split(sizes) if qkv_wanted else (None, None, None)
        d_b = (None, None, None) if bq is None else d_qkv.sum(0).split(sizes)
        d_x, d_nw, d_nb = _norm_backward(d_qkv @ joined, rows, (mean, rstd), nw, nb, cfg, g2)
        d_bo = None if bo is None else g2.sum(0)
        d_norms = (d_nw, d_nb, *_fill(qk_norms, d_qk_norms))
        return d_x.view_as(x), None, None, *d_norms, g2.T @ y if out_wanted else None, d_bo, *d_w, *d_b


def _inner(
    qkv: Tensor, norms: list[Tensor | None], n: Heads, cfg: ModelConfig, places: Places
) -> tuple[Tensor, list[Tensor]]:
    """(B, T, A K) -> (B T, H K) between the two products, and what its gradient needs."""
    if places.how is not None:
        y, tops = clib.attend(qkv, places.how)
        return y.flatten(0, 1), [qkv, tops]
    heads = to_heads(qkv.flatten(0, 1), qkv.shape[0], cfg.head_dim)
    y, kept = attend(_Turn(heads, norms, n, cfg, places).out.detach(), n, cfg, places)
    return y, [heads, *kept]


def _inner_backward(
    g: Tensor, y: Tensor, inner: list[Tensor], norms: list[Tensor | None], n: Heads, cfg: ModelConfig, places: Places
) -> list[Tensor]:
    """The gradients of (B T, A K) and of the weights of QK norm, from that of y (B, T, H K)."""
    if places.how is not None:
        qkv, tops = inner
        return [clib.attend_backward(g, qkv, y.view_as(g), tops, places.how).flatten(0, 1)]
    heads, *probs = inner
    turn = _Turn(heads, norms, n, cfg, places)
    d_heads, *d_norms = turn.backward(attend_backward(g.flatten(0, 1), turn.out.detach(), probs, n, cfg, places))
    return [to_rows(d_heads), *d_norms]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cfg: ModelConfig, *weights: Any) -> Tensor:
        nw, nb, wd, bd, *ups = weights
        rows, half = x.flatten(0, 1), len(ups) // 2
        h, stats = _norm(rows, nw, nb, cfg)
        inner = [F.linear(h, w, b) for w, b in zip(ups[:half], ups[half:], strict=True)]
        kept, by_library = keeps(x.shape[1]), clib.has_rows(*inner)
        ctx.factors = kept and by_library
        if ctx.factors:
            active, inner = clib.activated_with_factors(cfg.mlp, *inner)
        elif by_library:
            active = clib.activated(cfg.mlp, *inner)
        else:
            active = activate(cfg.mlp, *inner, by_hand=True)
        ctx.save_for_backward(x, *stats, *weights, *inner, *([h, active] if kept else []))
        ctx.cfg, ctx.half = cfg, half
        return _add_linear(rows, active, wd, bd).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Grads:
        cfg, half = ctx.cfg, ctx.half
        x, mean, rstd, nw, nb, wd, bd, *rest = ctx.saved_tensors
        ups, biases, inner, kept = rest[:half], rest[half : 2 * half], rest[2 * half : 3 * half], rest[3 * half :]
        rows, g2 = x.flatten(0, 1), g.flatten(0, 1)
        d_active = g2 @ wd
        if ctx.factors:
            active, d_inner = kept[1], [d_active * factor for factor in inner[1:]]
            d_inner.insert(0, d_active.mul_(inner[0]))
        else:
            active, d_inner = _activate_backward(cfg.mlp, d_active, inner, kept[1] if kept else None)
        d_wd = g2.T @ active if ctx.needs_input_grad[4] else None
        del active
        h = kept[0] if kept else _norm(rows, nw, nb, cfg)[0]
        d_ups = [d.T @ h if wanted else None for d, wanted in zip(d_inner, ctx.needs_input_grad[6:], strict=False)]
        d_biases = [None if b is None else d.sum(0) for b, d in zip(biases, d_inner, strict=True)]
        d_h = d_inner[0] @ ups[0]
        for d, w in zip(d_inner[1:], ups[1:], strict=True):
            d_h.addmm_(d, w)
        d_x, d_nw, d_nb = _norm_backward(d_h, rows, (mean, rstd), nw, nb, cfg, g2)
        d_bd = None if bd is None else g2.sum(0)
        return d_x.view_as(x), None, d_nw, d_nb, d_wd, d_bd, *d_ups, *d_biases


def _join(*parts: Tensor | None) -> Any:
    """One tensor of several, along the first dimension; None of Nones."""
    return None if parts[0] is None else torch.cat([x for x in parts if x is not None])


def _fill(like: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor | None]:
    """`values` in the places where `like` is not None."""
    left = iter(values)
    return [None if x is None else next(left) for x in like]


def _add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.addmm(x, y, weight.T)
    return out if bias is None else out.add_(bias)


class _Graph:
    """A small piece of autograd's graph inside a node: elementwise functions that are not worth a gradient by hand."""

    def __init__(self, fn: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            self.out = fn(*self.inputs)

    def backward(self, g: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(self.out, self.inputs, g))


class _Turn(_Graph):
    """What stands between the projection and attention: QK-norm, and the rotation of q and k."""

    def __init__(
        self, heads: Tensor, norms: list[Tensor | None], n: tuple[int, int], cfg: ModelConfig, places: Places
    ) -> None:
        def turned(heads: Tensor, *weights: Tensor) -> Tensor:
            q, k, v = heads.split([n[0], n[1], n[1]])
            if cfg.qk_norm:
                q_weight, q_bias, k_weight, k_bias = _fill(norms, weights)
                q, k = _norm(q, q_weight, q_bias, cfg)[0], _norm(k, k_weight, k_bias, cfg)[0]
            qk = torch.cat([q, k])
            return torch.cat([qk if places.rotation is None else rotate(qk, *places.rotation, by_hand=True), v])

        if cfg.qk_norm or places.rotation is not None:
            super().__init__(turned, heads, *(w for w in norms if w is not None))
        else:
            self.inputs, self.out = [heads], heads

    def backward(self, g: Tensor) -> list[Tensor]:
        return [g] if self.out is self.inputs[0] else super().backward(g)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, cfg: ModelConfig) -> tuple[Tensor, tuple[Any, Any]]:
    """The norm of rows (N, D), and what its gradient needs: LayerNorm's mean and 1/deviation, the library's stats."""
    if x.ndim == 2 and clib.has_rows(x, weight, bias):
        y, stats = clib.normed(x, weight, bias, cfg.norm, cfg.norm_eps)
        return y, (stats, None)
    if cfg.norm == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], weight, cfg.norm_eps), (None, None)
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, cfg.norm_eps)
    return y, (mean, rstd)


def _norm_backward(
    g: Tensor,
    x: Tensor,
    stats: tuple[Any, Any],
    weight: Tensor | None,
    bias: Tensor | None,
    cfg: ModelConfig,
    more: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias from that of the norm; `more` (N, D) is added to that of x."""
    mean, rstd = stats
    if mean is not None and rstd is None:
        return clib.norm_backward(g, x, mean, weight, bias, cfg.norm, more.contiguous())
    if cfg.norm == "layernorm":
        mask = [True, weight is not None, bias is not None]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], *stats, weight, bias, mask
        )
        return d_x.add_(more), d_weight, d_bias
    if weight is None:
        return _Graph(lambda x: F.rms_norm(x, x.shape[-1:], None, cfg.norm_eps), x).backward(g)[0].add(more), None, None
    d_x, d_weight = _Graph(lambda x, w: F.rms_norm(x, x.shape[-1:], w, cfg.norm_eps), x, weight).backward(g)
    return d_x.add(more), d_weight, None


def _activate_backward(kind: Mlp, g: Tensor, inner: list[Tensor], active: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The activations, kept or made again, and the gradients of what they are made of."""
    if active is None and clib.has_rows(g, *inner):
        return clib.activate_backward(kind, g, *inner)
    if kind in ("gelu", "gelu-tanh"):
        d = torch.ops.aten.gelu_backward(g, inner[0], approximate="tanh" if kind == "gelu-tanh" else "none")
        return activate(kind, *inner, by_hand=True) if active is None else active, [d]
    graph = _Graph(lambda *h: activate(kind, *h, by_hand=True), *inner)
    return graph.out.detach(), graph.backward(g)
