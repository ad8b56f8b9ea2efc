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
from fnlm.attention import BLOCK, Places, attention
from fnlm.collectives import LOCAL, Axes, Axis, enter, gather, leave, psum, pvary, split
from fnlm.compiling import compiled
from fnlm.config import Compute, ModelConfig
from fnlm.dropout import dropout
from fnlm.kernels import joined_linear, needs_plain, rotate
from fnlm.mlp import mlp
from fnlm.ngrams import ngram_ids
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
    x = embed(root, tokens, cfg, keys and keys[:2], axes, *_front(tokens, cfg, axes, begins))
    places = places_of(tokens.shape[1], cfg, x, compute, axes, begins)
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
    if compute.kernels == "auto" and _by_hand(x, cfg, keys, axes):
        return mlp_sublayer(p, attention_sublayer(p, x, cfg, places), cfg)
    att, res1, res2 = keys or (None, None, None)
    first = (places.start + (axes.sequence.index * x.shape[1] if axes.sequence else 0), 0)
    a = _attend(p, norm(p, "attn_norm", x, cfg, axes.sequence), cfg, places, att, axes, compute, lean)
    a = dropout(a, cfg.dropout_residual, res1, first)
    y = x if cfg.parallel_residual else x + a
    m = mlp(p, norm(p, "mlp_norm", y, cfg, axes.sequence), cfg, axes, compute.kernels)
    m = dropout(m, cfg.dropout_residual, res2, first)
    return x + a + m if cfg.parallel_residual else y + m


def _by_hand(x: Tensor, cfg: ModelConfig, keys: list[Tensor] | None, axes: Axes) -> bool:
    """Whether the sublayers with hand-written gradients compute what is asked for, in less memory."""
    long = x.device.type == "cpu" and x.shape[1] > BLOCK
    dropped = keys is not None and (cfg.dropout_attn or cfg.dropout_residual)
    return long and not (dropped or cfg.parallel_residual or axes.tensor or axes.context or needs_plain())


def _attend(
    p: Params, x: Tensor, cfg: ModelConfig, places: Places, key: Tensor | None, axes: Axes, compute: Compute, lean: bool
) -> Tensor:
    """Multi-head attention, (B, T, D) -> (B, T, D); however many heads the weights hold are computed here."""
    n_kv, n_q = (p[f"attn.{name}.weight"].shape[0] // cfg.head_dim for name in "kq")
    weights = [p[f"attn.{name}.weight"] for name in "qkv"]
    by_hand = lean and compute.kernels == "auto" and not needs_plain()
    bias = torch.cat([p["attn.q.bias"], p["attn.k.bias"], p["attn.v.bias"]]) if cfg.has_qkv_bias else None
    qkv = joined_linear(enter(x, axes), weights, bias, by_hand)
    qkv = rearrange(qkv, "B T (A K) -> B T A K", K=cfg.head_dim)
    if cfg.qk_norm or places.rotation is not None:
        qk, v = qkv.split([n_q + n_kv, n_kv], 2)
        q, k = turn(p, qk, n_q, cfg, places, axes, compute).split([n_q, n_kv], 2)
    else:
        q, k, v = qkv.split([n_q, n_kv, n_kv], 2)
    k, v = gather(k, axes.context, 1), gather(v, axes.context, 1)
    y = attention(q, k, v, cfg, places, compute.kernels, key)
    out = leave(F.linear(y, p["attn.out.weight"]), axes)
    return out + pvary(p["attn.out.bias"], axes.sequence) if cfg.bias else out


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


def norm(p: Params, name: str, x: Tensor, cfg: ModelConfig, axis: Axis | None = None) -> Tensor:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension.

    `axis`: x differs along it, and the weights do not.
    """
    weight, bias = (None if w is None else pvary(w, axis) for w in (p.get(f"{name}.weight"), p.get(f"{name}.bias")))
    if cfg.norm == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], weight, cfg.norm_eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, cfg.norm_eps)


def embed(
    root: Params,
    tokens: Tensor,
    cfg: ModelConfig,
    keys: list[Tensor] | None,
    axes: Axes,
    before: Tensor | None = None,
    at: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Token, n-gram and learned position embeddings, added: (B, T) -> (B, T, D).

    With `token_shift`, what is one position back is added to each before positions are ("token shift", Peng et al.
    2023): a position then knows what it follows, and one layer of attention can copy what followed the same before.

    In the midst of a text: `before` (B, N) are the tokens in front, V where there is none, `at` (B, T) the positions,
    or `start` the first of them. Without `before`, `at` are positions within documents, which nothing looks out of.
    """
    seen = tokens if before is None else torch.cat([before, tokens], 1)
    more = int(cfg.token_shift > 0 and seen.shape[1] > tokens.shape[1])  # one that is only shifted
    own = at if before is None else None
    x = _words(root, seen, tokens.shape[1] + more, cfg, keys, axes, start - more, own)
    if cfg.token_shift:
        back = x[:, :-1] if more else F.pad(x[:, :-1], (0, 0, 1, 0))
        back = back if own is None else back * (own > 0)[..., None]
        x = x[:, more:] + cfg.token_shift * back
    if cfg.positions == "learned":
        table = root["embed.positions.weight"]
        x = x + (table[start : start + tokens.shape[1]] if at is None else table[at])
    if cfg.embed_norm:
        x = norm(root, "embed_norm", x, cfg)
    return dropout(x, cfg.dropout_embed, keys[0] if keys else None, (start, 0))


def _words(
    root: Params,
    seen: Tensor,
    n: int,
    cfg: ModelConfig,
    keys: list[Tensor] | None,
    axes: Axes,
    start: int,
    own: Tensor | None,
) -> Tensor:
    """Token and n-gram embeddings of the last `n` tokens seen, of which the first is at position `start`; 0 for V."""
    mine = seen[:, seen.shape[1] - n :]
    there = mine < cfg.vocab_size if seen.shape[1] > n or start < 0 else None  # V stands before a text
    x = _rows(root["embed.tokens.weight"], mine if there is None else mine.where(there, 0), cfg.vocab_size, axes)
    for j, (order, rows) in enumerate(cfg.ngrams):
        ids = ngram_ids(seen, order, rows, cfg.vocab_size, own)
        e = F.embedding(ids[:, -n:], root[f"embed.ngram{order}.weight"])
        if keys and order > 2:
            kept = dropout(torch.ones_like(e[..., :1]), cfg.dropout_ngram, random.fold_in(keys[1], j), (start, 0))
            e = e * kept
        x = x + e
    return x if there is None else x * there[..., None]


def reach(cfg: ModelConfig) -> int:
    """How many tokens in front of a part of a text its embedding looks at."""
    return max((order - 1 for order, _ in cfg.ngrams), default=0) + (cfg.token_shift > 0)


def _front(
    tokens: Tensor, cfg: ModelConfig, axes: Axes, begins: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """For `embed`: of a split context the tokens in front and the first position; of parted documents the positions."""
    if axes.context is None:
        at = None if begins is None else torch.arange(tokens.shape[1], device=tokens.device) - begins
        return None, at, 0
    start, far = axes.context.index * tokens.shape[1], reach(cfg)
    before = gather(tokens, axes.context, 1)[:, max(0, start - far) : start] if far else None
    return before, None, start


def _rows(weight: Tensor, tokens: Tensor, vocab_size: int, axes: Axes) -> Tensor:
    """Embedding rows; split over the tensor axis, each rank contributes the rows it holds."""
    if axes.tensor is None:
        return F.embedding(tokens, weight)
    if not len(weight):
        return psum(weight.sum(0).expand(*tokens.shape, -1), axes.tensor)
    mine = tokens - first_row(vocab_size, axes)
    here = (mine >= 0) & (mine < weight.shape[0])
    return psum(F.embedding(mine.where(here, 0), weight) * here[..., None], axes.tensor)


def first_row(vocab_size: int, axes: Axes) -> int:
    """The first vocabulary row this rank holds: parts of ceil(V / ranks), the last ones short or empty."""
    return min(axes.tensor.index * -(-vocab_size // axes.tensor.size), vocab_size) if axes.tensor else 0


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
