"""The model: a pure function of an explicit dict of parameters, read from bottom to top like the paper.

    B batch   T time   S keys seen   D d_model   F d_ff   H heads   K d_head   V vocabulary

A block is a plain function of its own dict. `use(group, params)` stands just before a group computes ("root", then
"blocks.0", ...): the identity on one device; under a strategy, how parameters at rest become parameters in use.
`pvary` before a column-split product and `psum` after a row-split one are all there is to tensor parallelism; `enter`
and `leave` are these two, or their forms on split positions. With a split context, T is this rank's part of the text,
and keys and values of all of it are gathered in each block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fnlm import random
from fnlm.attended import attended
from fnlm.attention import BLOCK, Places, attention
from fnlm.collectives import LOCAL, Axes, enter, gather, leave, pvary, split
from fnlm.compiling import compiled
from fnlm.config import Compute, ModelConfig
from fnlm.dropout import dropout
from fnlm.embedding import embed, front
from fnlm.kernels import joined_linear, needs_plain, rotate
from fnlm.mlp import mlp
from fnlm.norms import norm
from fnlm.places import begins_of, places_of
from fnlm.sublayers import attention_sublayer, mlp_sublayer
from fnlm.types import Key, Params

Use = Callable[[str, Params], Params]


def identity(group: str, params: Params) -> Params:
    """The `use` hook of a single device: parameters at rest are parameters in use."""
    return params


def forward(
    params: Params,
    tokens: Tensor,
    cfg: ModelConfig,
    *,
    key: Key | None = None,
    use: Use = identity,
    axes: Axes = LOCAL,
    compute: Compute = Compute(),
) -> Tensor:
    """Logits (B, T, V) of tokens (B, T).

    `key`: (2,), or (B, 2) one per sample, draws dropout; None evaluates. `axes.tensor` set: V is this rank's part.
    """
    x, root = hidden(params, tokens, cfg, key=key, use=use, axes=axes, compute=compute)
    return unembed(x, head_weight(root, cfg), cfg)


def hidden(
    params: Params,
    tokens: Tensor,
    cfg: ModelConfig,
    *,
    key: Key | None = None,
    use: Use = identity,
    axes: Axes = LOCAL,
    compute: Compute = Compute(),
) -> tuple[Tensor, Params]:
    """The last normed activations (B, T, D), and the root group in use, which holds the head."""
    length = tokens.shape[-1] * (axes.context.size if axes.context else 1)
    if length > cfg.seq_len:
        raise ValueError(f"{length} tokens are more than seq_len={cfg.seq_len}; cut the input, or raise seq_len")
    groups = split_groups(params, cfg)
    keys = _site_keys(key, tokens.shape[0], cfg)
    root = use("root", groups["root"])
    begins = begins_of(tokens, compute, axes)
    x = embed(root, tokens, cfg, keys and keys[:2], axes, *front(tokens, cfg, axes, begins))
    dropped = keys is not None and cfg.dropout_attn > 0
    places = places_of(tokens.shape[1], cfg, x, compute, axes, begins, dropped)
    x = split(x, axes.sequence, 1)
    run = compiled(_block) if compute.compile == "block" else _block
    for i in range(cfg.n_layers):
        name, mine = f"blocks.{i}", keys and keys[2 + 3 * i : 5 + 3 * i]

        def layer(x: Tensor, name: str = name, mine: list[Tensor] | None = mine) -> Tensor:
            return run(use(name, groups[name]), x, cfg, places, mine, axes, compute, use is not identity)

        x = (
            checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            if compute.remat == "block"
            else layer(x)
        )
    return enter(norm(root, "norm", x, cfg, axes.sequence), axes), root


def _block(
    p: Params,
    x: Tensor,
    cfg: ModelConfig,
    places: Places,
    keys: list[Tensor] | None,
    axes: Axes,
    compute: Compute,
    lean: bool = False,
) -> Tensor:
    """One transformer block, (B, T, D) -> (B, T, D); pre-norm, sequential or parallel residual (GPT-J).

    `lean`: parameters are not here to stay, and nothing as large as they are is kept for the backward pass.
    """
    if compute.kernels == "auto" and _by_hand(x, cfg, places, keys, axes, lean):
        return mlp_sublayer(p, attention_sublayer(p, x, cfg, places), cfg)
    att, res1, res2 = keys or (None, None, None)
    first = (places.start + (axes.sequence.index * x.shape[1] if axes.sequence else 0), 0)
    a = _attend(p, norm(p, "attn_norm", x, cfg, axes.sequence), cfg, places, att, axes, compute, lean)
    a = dropout(a, cfg.dropout_residual, res1, first)
    y = x if cfg.parallel_residual else x + a
    m = mlp(p, norm(p, "mlp_norm", y, cfg, axes.sequence), cfg, axes, compute.kernels)
    m = dropout(m, cfg.dropout_residual, res2, first)
    return x + a + m if cfg.parallel_residual else y + m


def _by_hand(x: Tensor, cfg: ModelConfig, places: Places, keys: list[Tensor] | None, axes: Axes, lean: bool) -> bool:
    """Whether the sublayers with hand-written gradients compute what is asked for: in less memory where texts are long,
    and faster by the library, but all gradients of a sublayer come together then.
    """
    long = x.device.type in ("cpu", "meta") and (x.shape[1] > BLOCK or (places.how is not None and not lean))
    dropped = keys is not None and (cfg.dropout_attn or cfg.dropout_residual)
    return long and not (dropped or cfg.parallel_residual or axes.tensor or axes.context or needs_plain())


def _attend(
    p: Params, x: Tensor, cfg: ModelConfig, places: Places, key: Tensor | None, axes: Axes, compute: Compute, lean: bool
) -> Tensor:
    """Multi-head attention, (B, T, D) -> (B, T, D); however many heads the weights hold are computed here."""
    n_q = p["attn.q.weight"].shape[0] // cfg.head_dim
    weights = [p[f"attn.{name}.weight"] for name in "qkv"]
    by_hand = lean and compute.kernels == "auto" and not needs_plain()
    bias = torch.cat([p["attn.q.bias"], p["attn.k.bias"], p["attn.v.bias"]]) if cfg.has_qkv_bias else None
    qkv = joined_linear(enter(x, axes), weights, bias, by_hand)
    if places.how is not None:
        y = attended(qkv, places.how)
    else:
        q, k, v = _three(p, rearrange(qkv, "B T (A K) -> B T A K", K=cfg.head_dim), n_q, cfg, places, axes, compute)
        k, v = gather(k, axes.context, 1), gather(v, axes.context, 1)
        y = attention(q, k, v, cfg, places, compute.kernels, key)
    out = leave(F.linear(y, p["attn.out.weight"]), axes)
    return out + pvary(p["attn.out.bias"], axes.sequence) if cfg.bias else out


def _three(
    p: Params, qkv: Tensor, n_q: int, cfg: ModelConfig, places: Places, axes: Axes, compute: Compute
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in their places in the text, (B, T, H or H_kv, K), of (B, T, H + 2 H_kv, K)."""
    n_kv = (qkv.shape[2] - n_q) // 2
    if not cfg.qk_norm and places.rotation is None:
        q, k, v = qkv.split([n_q, n_kv, n_kv], 2)
        return q, k, v
    qk, v = qkv.split([n_q + n_kv, n_kv], 2)
    q, k = turn(p, qk, n_q, cfg, places, axes, compute).split([n_q, n_kv], 2)
    return q, k, v


def turn(p: Params, qk: Tensor, n_q: int, cfg: ModelConfig, places: Places, axes: Axes, compute: Compute) -> Tensor:
    """QK norm and rotation of queries and keys together, (B, T, H + H_kv, K); tables (T, R), or (B, T, R) by row."""
    if cfg.qk_norm and not cfg.norm_affine:
        qk = norm(p, "attn.q_norm", qk, cfg)
    elif cfg.qk_norm:
        q, k = qk.tensor_split([n_q], 2)
        qk = torch.cat([norm(p, "attn.q_norm", q, cfg, axes.tensor), norm(p, "attn.k_norm", k, cfg, axes.tensor)], 2)
    if places.rotation is None:
        return qk
    cos, sin = (x[..., None, :] for x in places.rotation)
    return rotate(qk, cos, sin, compute.kernels == "auto" and not needs_plain())


def _site_keys(key: Key | None, batch: int, cfg: ModelConfig) -> list[Tensor] | None:
    """One key per sample and dropout site: embedding, n-grams, then (attention, residual, residual) per block."""
    if key is None or not cfg.has_dropout:
        return None
    samples = key if key.ndim == 2 else random.fold_in(key, torch.arange(batch, device=key.device))
    return list(random.split(samples, 2 + 3 * cfg.n_layers).unbind(-2))


def head_weight(root: Params, cfg: ModelConfig) -> Tensor:
    """The output matrix (V, D): the token embedding when tied."""
    return root["embed.tokens.weight" if cfg.tied else "head.weight"]


def unembed(x: Tensor, weight: Tensor, cfg: ModelConfig) -> Tensor:
    """Logits of activations, (..., D) -> (..., V); muP divides by the width, a soft cap bounds them (Gemma 2)."""
    return shape_logits(F.linear(x, weight), cfg)


def shape_logits(logits: Tensor, cfg: ModelConfig) -> Tensor:
    """The muP output multiplier and the soft cap, elementwise."""
    if cfg.init == "mup":
        logits = logits * (cfg.mup_base / cfg.d_model)
    return logits if cfg.logit_softcap is None else cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap)


def split_groups(params: Params, cfg: ModelConfig) -> dict[str, Params]:
    """The units of communication: "root" and each block's own dict, with the prefix taken off."""
    groups: dict[str, Params] = {"root": {}, **{f"blocks.{i}": {} for i in range(cfg.n_layers)}}
    for name, value in params.items():
        if name.startswith("blocks."):
            _, i, own = name.split(".", 2)
            groups[f"blocks.{i}"][own] = value
        else:
            groups["root"][name] = value
    return groups
