"""The forward for text that grows: new tokens against cached keys and values, the same mathematics as forward.py.

A row of the batch is a text of its own, with its own position. Letters as in forward.py; S counts the positions a cache
holds, G = H / H_kv the queries a key serves. On a CPU steps of few tokens are lowered to `fnlm.native`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fnlm import clib, native
from fnlm.attended import suits
from fnlm.attention import Places
from fnlm.cache import KVCache, init_cache, picked
from fnlm.cached import bias_at, bias_of, each_at, look
from fnlm.collectives import LOCAL, Axes, psum, pvary
from fnlm.config import Compute, ModelConfig
from fnlm.embedding import embed, reach
from fnlm.forward import shape_logits, turn
from fnlm.linear import linear
from fnlm.lowered import FEW, Row, padded, together
from fnlm.mlp import mlp
from fnlm.norms import norm
from fnlm.places import how_of
from fnlm.prepared import Prepared, prepare
from fnlm.types import Params

__all__ = [
    "CHUNK", "FEW", "KVCache", "Prepared", "Row", "decode", "init_cache", "padded", "picked", "prefill", "prepare",
    "together",
]  # fmt: skip

CHUNK = 512  # prompt tokens at a time: on a CPU a tenth faster to the first token than 256, or 1,500, at once
_PLAIN = Compute(kernels="plain")


class _Step(NamedTuple):
    """Where the new tokens of one call lie: `at` (B, T) positions; `start` of all rows where they agree, else None and
    `put` (rows, positions, index into B T) of the valid ones; `seen` the cached positions anyone looks at; `bias` on
    the scores of the last s of them (B, H_kv or 1, G or 1, T, s), None where all is seen; `each` the rows that are
    looked at one by one. `how`: the C library attends, to `counts` tokens of each row behind `starts` others. `dtype`:
    what products compute in; between blocks bfloat16 is carried on in float32, as the native step does."""

    at: Tensor
    start: int | None
    put: tuple[Tensor, Tensor, Tensor] | None
    seen: slice
    bias: Tensor | None
    places: Places
    each: tuple[tuple[int, slice], ...] | None = None
    how: clib.How | None = None
    starts: Sequence[int] = ()
    counts: Sequence[int] = ()
    dtype: torch.dtype = torch.float32


@torch.no_grad()
def decode(
    params: Params | Prepared,
    tokens: Tensor,
    cfg: ModelConfig,
    cache: KVCache,
    *,
    lengths: Tensor | None = None,
    axes: Axes = LOCAL,
    apart: bool = False,
    every: bool = False,
) -> tuple[Tensor, KVCache]:
    """Logits (B, V) after each row's last new token, of tokens (B, T) that follow what the cache holds.

    `lengths` (B,): how many of the T are meant, the first ones; a row with 0 rests, keeps its cache, and its logits say
    nothing. Logits are float32 (float64 where parameters are); `axes.tensor` set: V is this rank's part. `apart`: each
    row attends over its own positions alone, so that for the same B and T its logits are the same bits whatever the
    other rows hold. `every`: after each new token, (B, T, V). The cache is donated: use the one that is returned.
    ValueError where a row does not fit into it.
    """
    ready = params if isinstance(params, Prepared) else prepare(params, cfg, lowered=False)
    if _is_native(ready, tokens, cache, lengths, axes):
        return _native(ready, tokens, cfg, cache, lengths, every)
    step = _step(tokens, cfg, cache, lengths, ready, axes, apart)
    before = None
    if reach(cfg):
        before = _tokens_before(cache, cfg)
        _write_(cache.tokens[:, None, :, None], tokens[..., None, None], step)
    x = embed(ready.root, tokens, cfg, None, axes, before, step.at)
    step = step._replace(dtype=x.dtype)
    x = x.float() if x.dtype == torch.bfloat16 else x
    new = tokens.shape[1] if lengths is None else lengths.to(cache.pos)
    last = None if every else (cache.pos.new_full((len(x),), new) if isinstance(new, int) else new).clamp(min=1) - 1
    blocks = list(zip(ready.blocks, cache.k.unbind(0), cache.v.unbind(0), strict=True))
    for p, k, v in blocks:
        x = _block(p, x, cfg, step, k, v, axes, last if p is blocks[-1][0] else None)
    x = x if every else x[:, 0]
    x = pvary(norm(ready.root, "norm", x.to(step.dtype), cfg), axes.tensor)
    own = "head" if "head.weight" in ready.root else "embed.tokens"
    logits = shape_logits(linear(ready.root, own, x), cfg)
    return logits if logits.dtype == torch.float64 else logits.float(), cache._replace(pos=cache.pos + new)


def _is_native(ready: Prepared, tokens: Tensor, cache: KVCache, lengths: Tensor | None, axes: Axes) -> bool:
    """Whether the C library takes this step: one token of each row, or few of one row."""
    few = tokens.shape[1] == 1 or (len(tokens) == 1 and tokens.shape[1] <= FEW and lengths is None)
    return few and ready.native is not None and axes == LOCAL and native.takes(cache.k, cache.v)


def _native(
    ready: Prepared, tokens: Tensor, cfg: ModelConfig, cache: KVCache, lengths: Tensor | None, every: bool
) -> tuple[Tensor, KVCache]:
    """`decode` by the C library."""
    starts, counts = _room(tokens, cache, lengths)
    rows = zip(cache.k.unbind(1), cache.v.unbind(1), cache.tokens, starts, strict=True)
    texts, meant = [Row(*row) for row in rows], [b for b, n in enumerate(counts) if n]
    given: list[list[int]] = tokens.tolist()
    logits = together(ready, [texts[b] for b in meant], [given[b] for b in meant], cfg, every)
    if len(meant) < len(counts):
        logits = logits.new_zeros(len(counts), logits.shape[1]).index_copy_(
            0, torch.tensor(meant, dtype=torch.int64), logits
        )
    new = tokens.shape[1] if lengths is None else lengths.to(cache.pos)
    return logits.unflatten(0, (len(counts), -1)) if every else logits, cache._replace(pos=cache.pos + new)


def prefill(
    params: Params | Prepared,
    prompts: Sequence[Sequence[int]],
    cfg: ModelConfig,
    cache: KVCache,
    *,
    chunk: int = CHUNK,
    axes: Axes = LOCAL,
) -> tuple[Tensor, KVCache]:
    """`decode` of a prompt for each row, `chunk` tokens at a time: logits (B, V) after each one's last token.

    Prompts may differ in length, and none may be empty: the short ones join in the last chunks, so all end together.
    """
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty; give each at least one token")
    ready = params if isinstance(params, Prepared) else prepare(params, cfg)
    logits = cache.k.new_empty(0)
    for later in reversed(range(-(-max(map(len, prompts)) // chunk))):
        ends = [max(0, len(p) - later * chunk) for p in prompts]
        parts = [p[max(0, end - chunk) : end] for p, end in zip(prompts, ends, strict=True)]
        tokens, lengths = padded(parts, cache.pos.device)
        logits, cache = decode(ready, tokens, cfg, cache, lengths=lengths, axes=axes)
    return logits, cache


def _room(tokens: Tensor, cache: KVCache, lengths: Tensor | None) -> tuple[list[int], list[int]]:
    """Where each row's new tokens begin, and how many they are. ValueError where they do not fit into the cache."""
    rows, t = tokens.shape
    if cache.pos.shape[0] != rows:
        raise ValueError(f"{rows} rows of tokens do not suit a cache of {cache.pos.shape[0]}; give one for each")
    starts: list[int] = cache.pos.tolist()
    counts: list[int] = [t] * rows if lengths is None else lengths.tolist()
    if len(counts) != rows or not 0 <= min(counts) <= max(counts) <= t:
        raise ValueError(f"lengths={counts} do not suit {rows} rows of {t} tokens; give one of 0 to {t} for each")
    used, size = max(s + n for s, n in zip(starts, counts, strict=True)), cache.k.shape[3]
    if used > size:
        raise ValueError(f"position {used - 1} does not fit into a cache of {size}; make it longer, or stop before")
    return starts, counts


def _step(
    tokens: Tensor,
    cfg: ModelConfig,
    cache: KVCache,
    lengths: Tensor | None,
    ready: Prepared,
    axes: Axes,
    apart: bool,
) -> _Step:
    starts, counts = _room(tokens, cache, lengths)
    t, used = tokens.shape[1], max(s + n for s, n in zip(starts, counts, strict=True))
    together = min(counts) == t and min(starts) == max(starts) and not apart
    at = cache.pos[:, None] + torch.arange(t, device=tokens.device)
    put = None if together else _valid(at, counts)
    at = at if min(counts) == t else at.clamp(max=cfg.seq_len - 1)  # what stands behind a row's end is looked up too
    if (how := _how(ready, cfg, cache, axes)) is not None:
        start, seen = starts[0] if together else None, slice(0, used)
        return _Step(at, start, put, seen, None, Places(None, (), 0), None, how, starts, counts)
    first = max(0, min(starts) + 1 - cfg.window) if cfg.window and not apart else 0
    seen = slice(first, max(used, 1))
    rotation = None if ready.rotation is None else (ready.rotation[0][at], ready.rotation[1][at])
    needs_bias = t > 1 or not (together or apart) or cfg.positions == "alibi"
    causal = together and cfg.window is None and cfg.positions != "alibi"  # nothing is hidden but of the new ones
    told = slice(starts[0], used) if causal else seen
    bias = bias_of(at[:1] if together else at, told, cfg, cache.k, axes) if needs_bias else None
    each = _spans(starts, counts, cfg.window) if apart else None
    return _Step(at, starts[0] if together else None, put, seen, bias, Places(rotation, (), 0), each)


def _how(ready: Prepared, cfg: ModelConfig, cache: KVCache, axes: Axes) -> clib.How | None:
    """How the C library attends; None where it does not know the model, the cache, or a part of either."""
    like = ready.root["embed.tokens.weight"]
    if axes != LOCAL or not suits(like, cfg, Compute()) or not clib.can_cache(like, cache.k[0], cache.v[0]):
        return None
    return how_of(cfg, cfg.n_heads, ready.wide)


def _spans(starts: Sequence[int], counts: Sequence[int], window: int | None) -> tuple[tuple[int, slice], ...]:
    """The rows that do not rest, and the positions that each one sees."""
    spans = enumerate(zip(starts, counts, strict=True))
    return tuple((b, slice(max(0, s + 1 - window) if window else 0, s + n)) for b, (s, n) in spans if n)


def _valid(at: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that are meant: their rows, positions, and index among all."""
    meant = torch.arange(at.shape[1], device=at.device) < torch.tensor(counts, device=at.device)[:, None]
    index = meant.flatten().nonzero().squeeze(-1)
    return index // at.shape[1], at.flatten()[index], index


def _tokens_before(cache: KVCache, cfg: ModelConfig) -> Tensor:
    """The tokens that the next position's embedding looks back at, (B, N); V where the text has not begun."""
    at = cache.pos[:, None] + torch.arange(-reach(cfg), 0, device=cache.pos.device)
    return cache.tokens.gather(1, at.clamp(min=0)).masked_fill(at < 0, cfg.vocab_size)


def _block(
    p: Params, x: Tensor, cfg: ModelConfig, step: _Step, k: Tensor, v: Tensor, axes: Axes, last: Tensor | None
) -> Tensor:
    """One transformer block, (B, T, D) -> (B, T, D), that writes its keys and values into k and v (B, H_kv, S, K).

    `last` (B,): only what comes of each row's token there is wanted, (B, 1, D).
    """
    a = _attend(p, norm(p, "attn_norm", x.to(step.dtype), cfg), cfg, step, k, v, axes, last)
    x = x if last is None else each_at(x, last)
    y = x if cfg.parallel_residual else x + a
    m = mlp(p, norm(p, "mlp_norm", y.to(step.dtype), cfg), cfg, axes, "auto")
    return x + a + m if cfg.parallel_residual else y + m


def _attend(
    p: Params, x: Tensor, cfg: ModelConfig, step: _Step, k: Tensor, v: Tensor, axes: Axes, last: Tensor | None
) -> Tensor:
    rows = linear(p, "attn.qkv", pvary(x, axes.tensor))
    if step.how is not None:
        y = clib.attend_cached(rows, k, v, step.starts, step.counts, step.how, last is not None)
        return linear(p, "attn.out", y if last is None else each_at(y, last))
    qkv, n_kv = rows.unflatten(-1, (-1, cfg.head_dim)), k.shape[1]
    n_q = qkv.shape[2] - 2 * n_kv
    qk, v_new = qkv.split([n_q + n_kv, n_kv], 2)
    if cfg.qk_norm or step.places.rotation is not None:
        qk = turn(p, qk, n_q, cfg, step.places, axes, _PLAIN)
    q, k_new = qk.split([n_q, n_kv], 2)
    _write_(k, k_new, step)
    _write_(v, v_new, step)
    if last is not None:
        q, step = each_at(q, last), step._replace(bias=bias_at(step.bias, last))
    if step.each is None:
        y = look(q, k[:, :, step.seen], v[:, :, step.seen], cfg, step.bias)
    else:
        y = _look_each(q, k, v, cfg, step)
    out = psum(linear(p, "attn.out", y, bias=False), axes.tensor)
    return out + p["attn.out.bias"] if cfg.bias else out


def _write_(cached: Tensor, new: Tensor, step: _Step) -> None:
    """The new (B, T, H_kv, K) to their places in (B, H_kv, S, K)."""
    if step.put is None:
        assert step.start is not None
        cached[:, :, step.start : step.start + new.shape[1]] = new.transpose(1, 2)
    else:
        rows, positions, index = step.put
        cached[rows, :, positions] = new.flatten(0, 1)[index]


def _look_each(q: Tensor, k: Tensor, v: Tensor, cfg: ModelConfig, step: _Step) -> Tensor:
    """`_look` row by row; zeros for those that rest."""
    assert step.each is not None
    y = q.new_zeros(q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
    for row, seen in step.each:
        own = slice(row, row + 1)
        bias = None if step.bias is None else step.bias[own, ..., seen]
        y[own] = look(q[own], k[own, :, seen], v[own, :, seen], cfg, bias)
    return y
