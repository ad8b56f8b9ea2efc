"""A slow model that is obviously right: the papers' formulas, one sample, position and head at a time, in float64.

It shares nothing with fnlm but the names of parameters and config fields, so that agreement means something. Written in
differentiable torch operations on single vectors: autograd through it gives reference gradients.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

Params = dict[str, Tensor]


def logits(params: Params, tokens: Tensor, cfg: Any) -> Tensor:
    """(B, T, V) for tokens (B, T)."""
    return torch.stack([torch.stack(sample(params, row.tolist(), cfg)) for row in tokens])


def sample(p: Params, tokens: list[int], cfg: Any) -> list[Tensor]:
    xs = [embedding(p, tokens, t, cfg) for t in range(len(tokens))]
    for i in range(cfg.n_layers):
        xs = block({k.split(".", 2)[2]: v for k, v in p.items() if k.startswith(f"blocks.{i}.")}, xs, cfg)
    head = p["embed.tokens.weight"] if cfg.tied else p["head.weight"]
    out = [head @ normalise(p, "norm", x, cfg) for x in xs]
    if cfg.init == "mup":
        out = [x * cfg.mup_base / cfg.d_model for x in out]
    if cfg.logit_softcap is not None:
        out = [cfg.logit_softcap * torch.tanh(x / cfg.logit_softcap) for x in out]
    return out


def embedding(p: Params, tokens: list[int], t: int, cfg: Any) -> Tensor:
    x = words(p, tokens, t, cfg)
    if t > 0:
        x = x + cfg.token_shift * words(p, tokens, t - 1, cfg)
    if cfg.positions == "learned":
        x = x + p["embed.positions.weight"][t]
    return normalise(p, "embed_norm", x, cfg) if cfg.embed_norm else x


def words(p: Params, tokens: list[int], t: int, cfg: Any) -> Tensor:
    x = p["embed.tokens.weight"][tokens[t]]
    for order, rows in cfg.ngrams:
        x = x + p[f"embed.ngram{order}.weight"][ngram_row(tokens, t, order, rows, cfg.vocab_size)]
    return x


def ngram_row(tokens: list[int], t: int, order: int, rows: int, vocab_size: int) -> int:
    """In unbounded integers: base V + 1 while the code fits into 62 bits, then a 32-bit multiplicative hash."""
    recent = [tokens[t - back] if t >= back else vocab_size for back in range(order)]
    if (vocab_size + 1) ** order < 2**62:
        code = sum(token * (vocab_size + 1) ** back for back, token in enumerate(recent))
        if (vocab_size + 1) ** order <= rows:
            return code
    else:
        code = recent[0]
        for token in recent[1:]:
            code = (code * 739982445 + token) % 2**32
    code = (code ^ (code // 2**32)) % 2**32
    return ((code ^ (code // 2**15)) * 739982445) % 2**31 % rows


def block(p: Params, xs: list[Tensor], cfg: Any) -> list[Tensor]:
    attended = attend(p, [normalise(p, "attn_norm", x, cfg) for x in xs], cfg)
    if cfg.parallel_residual:
        return [x + a + mlp(p, normalise(p, "mlp_norm", x, cfg), cfg) for x, a in zip(xs, attended, strict=True)]
    ys = [x + a for x, a in zip(xs, attended, strict=True)]
    return [y + mlp(p, normalise(p, "mlp_norm", y, cfg), cfg) for y in ys]


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def normalise(p: Params, name: str, x: Tensor, cfg: Any) -> Tensor:
    centred = x - x.sum() / len(x) if cfg.norm == "layernorm" else x
    y = centred / torch.sqrt((centred * centred).sum() / len(x) + cfg.norm_eps)
    if f"{name}.weight" in p:
        y = y * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def attend(p: Params, xs: list[Tensor], cfg: Any) -> list[Tensor]:
    K, n_kv = cfg.d_head or cfg.d_model // cfg.n_heads, cfg.n_kv_heads or cfg.n_heads
    qs, ks, vs = ([linear(p, f"attn.{n}", x).reshape(-1, K) for x in xs] for n in "qkv")
    slopes = alibi(cfg.n_heads)
    out = []
    for t in range(len(xs)):
        heads = []
        for h in range(cfg.n_heads):
            served = h // (cfg.n_heads // n_kv)
            q = placed(p, "attn.q_norm", qs[t][h], t, cfg)
            first = 0 if cfg.window is None else max(0, t - cfg.window + 1)
            weights = []
            for s in range(first, t + 1):
                score = (q * placed(p, "attn.k_norm", ks[s][served], s, cfg)).sum()
                score = score * 8 / K if cfg.init == "mup" else score / math.sqrt(K)
                if cfg.positions == "alibi":
                    score = score - slopes[h] * (t - s)
                weights.append(torch.exp(score))
            heads.append(sum(w * vs[first + i][served] for i, w in enumerate(weights)) / sum(weights))
        out.append(linear(p, "attn.out", torch.cat(heads)))
    return out


def placed(p: Params, norm: str, x: Tensor, t: int, cfg: Any) -> Tensor:
    """A query or key, normed and rotated."""
    x = normalise(p, norm, x, cfg) if cfg.qk_norm else x
    return rotated(x, t, cfg) if cfg.positions == "rope" else x


def rotated(x: Tensor, t: int, cfg: Any) -> Tensor:
    """Su et al. 2021, eq. 15, with the pairs (i, i + R/2) of GPT-NeoX."""
    R = round(len(x) * cfg.rope_fraction)
    y = list(x)
    for i in range(R // 2):
        angle = t * cfg.rope_theta ** (-2 * i / R)
        a, b = x[i], x[i + R // 2]
        y[i] = a * math.cos(angle) - b * math.sin(angle)
        y[i + R // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(y)


def alibi(n: int) -> list[float]:
    """Press et al. 2022, 3: from 2^(-8/n) in that ratio; else a power of two of them, then every other of twice it."""
    if n & (n - 1) == 0:
        return [2.0 ** (-8.0 / n * (i + 1)) for i in range(n)]
    below = 1
    while below * 2 < n:
        below *= 2
    return alibi(below) + alibi(2 * below)[::2][: n - below]


def mlp(p: Params, x: Tensor, cfg: Any) -> Tensor:
    h = linear(p, "mlp.up", x)
    if cfg.mlp == "swiglu":
        g = linear(p, "mlp.gate", x)
        h = g / (1 + torch.exp(-g)) * h
    elif cfg.mlp == "gelu":
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    elif cfg.mlp == "gelu-tanh":
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        h = torch.stack([v if v > 0 else v * 0 for v in h])
        h = h * h if cfg.mlp == "relu2" else h
    return linear(p, "mlp.down", h)


def loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of -log p(target): 0 where all weights are 0."""
    total, count = logits.new_zeros(()), 0.0
    for row, target, weight in zip(
        logits.flatten(0, 1), targets.flatten().tolist(), weights.flatten().tolist(), strict=True
    ):
        top = max(row.tolist())
        total = total + weight * (torch.log(torch.exp(row - top).sum()) + top - row[target])
        count += weight
    return total / count if count else total


BASE = {"vocab_size": 11, "n_layers": 2, "n_heads": 4, "d_model": 16, "seq_len": 13}

# Every option of the architecture alone, and the combinations in which one could hide another.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "rmsnorm": {"norm": "rmsnorm", "norm_eps": 1e-3},
    "rmsnorm-bias": {"norm": "rmsnorm", "bias": True},
    "no-affine": {"norm_affine": False, "bias": True},
    "gelu-tanh": {"mlp": "gelu-tanh"},
    "relu": {"mlp": "relu"},
    "relu2": {"mlp": "relu2"},
    "swiglu": {"mlp": "swiglu", "bias": True, "d_ff": 20},
    "rope": {"positions": "rope"},
    "rope-theta": {"positions": "rope", "rope_theta": 50.0, "d_head": 10},
    "rope-half": {"positions": "rope", "rope_fraction": 0.5, "d_head": 8, "n_kv_heads": 2},
    "alibi": {"positions": "alibi"},
    "alibi-3": {"positions": "alibi", "n_heads": 3, "d_model": 12},
    "alibi-6": {"positions": "alibi", "n_heads": 6, "d_model": 12, "n_kv_heads": 2},
    "alibi-12": {"positions": "alibi", "n_heads": 12, "d_model": 24},
    "none": {"positions": "none"},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1, "positions": "rope"},
    "window": {"window": 3},
    "window-1": {"window": 1},
    "window-rope-gqa": {"window": 5, "positions": "rope", "n_kv_heads": 2},
    "window-alibi": {"window": 4, "positions": "alibi", "n_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rope", "n_kv_heads": 2},
    "qk-layernorm-bias": {"qk_norm": True, "bias": True},
    "qk-rms": {"qk_norm": True, "norm": "rmsnorm", "norm_affine": False},
    "parallel": {"parallel_residual": True, "positions": "rope", "rope_fraction": 0.5},
    "softcap": {"logit_softcap": 2.0},
    "embed-norm": {"embed_norm": True, "bias": True},
    "ngrams": {"ngrams": ((2, 144), (3, 50), (4, 7))},
    "token-shift": {"token_shift": 0.5},
    "token-shift-ngrams": {"token_shift": 1.0, "ngrams": ((2, 144), (3, 50)), "embed_norm": True},
    "ngram-hash": {"ngrams": ((3, 9), (20, 31))},
    "untied": {"tied": False},
    "mup": {"init": "mup", "mup_base": 8},
    "mup-all": {"init": "mup", "mup_base": 64, "tied": False, "positions": "rope", "logit_softcap": 3.0},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2, "d_ff": 24},
    "odd-head": {"n_heads": 5, "d_model": 15, "d_head": 3},
    "one-layer-one-head": {"n_layers": 1, "n_heads": 1, "d_model": 6},
}  # fmt: skip


def random_params(shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    """Large enough that every term matters; norms near 1, everything else normal."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        out[name] = (1 + 0.2 * x if "norm.weight" in name else x * 0.4).to(dtype)
    return out


def random_tokens(vocab_size: int, b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (b, t), generator=torch.Generator().manual_seed(seed))


def small_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    """Make every file that cuts sequences into blocks of BLOCK positions cut them this small."""
    files = [m for name, m in sys.modules.items() if name.startswith("fnlm.") and hasattr(m, "BLOCK")]
    assert files
    for file in files:
        patch.setattr(file, "BLOCK", size)
