"""Explicit randomness: a counter-based cipher, so that a draw is a function of (key, index) and of nothing else.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3) in
torch ops on int64: the same text and the same bits eagerly, compiled and under vmap, on every device. A key is for one
use: to draw twice, `split` it or `fold_in` a number first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fnlm import clib
from fnlm.types import Key

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Schedule: TypeAlias = list[tuple[Tensor, Tensor]]
Index: TypeAlias = int | Tensor
W = TypeVar("W", int, Tensor)
Device: TypeAlias = torch.device | str | None

_WORD = 0xFFFFFFFF
_ROUNDS = 10
# Philox multiplies by M0 = 0xD2511F53 and M1 = 0xCD9E8D57. M - 2**32 has the same low words and keeps every product
# within int64: a C++ compiler may assume that int64 does not overflow, and did, giving other bits under inductor.
_MULTIPLIERS = 0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32)
_WEYL = 0x9E3779B9, 0xBB67AE85
# Domains: the top four bits of the last counter word. No two of them ever share a counter.
_SPLIT, _FOLD_IN, _BITS, KEEP_MASK, _FEISTEL = (domain << 28 for domain in range(1, 6))
# The intra-op thread pool hands out 32768 elements at a time: one such grain per thread is the smallest block that
# keeps every thread busy, and its five int64 buffers stay in the cache.
GRAIN = 1 << 15
_FEISTEL_ROUNDS = 6
_SMALL = 1024  # below this a sorted permutation is as cheap as a Feistel network, and exactly uniform
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def key(seed: int) -> Key:
    """The root key of a 64-bit seed: its low and high word, (2,) int64. ValueError for a seed outside [0, 2**64)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in [0, 2**64); take it modulo 2**64")
    return torch.tensor([seed & _WORD, seed >> 32])


def philox(key: Key, counter: Sequence[Tensor]) -> Words:
    """The cipher: four int64 tensors of 32-bit words (broadcastable) to four of their common shape, in [0, 2**32).

    Philox-4x32-10, Salmon et al. 2011, section 3.3; agrees with the known-answer vectors of Random123.
    """
    x0, x1, x2, x3 = encrypt(schedule(key), counter)
    return x0, x1 & _WORD, x2, x3 & _WORD


def schedule(key: Key, device: Device = None) -> Schedule:
    """The ten round keys of each key (..., 2): the two words plus multiples of two Weyl constants, (...) each."""
    if key.shape[-1:] != (2,):
        raise ValueError(f"a key has shape (2,) or (..., 2), not {tuple(key.shape)}")
    key = key.to(device=device)
    steps = torch.arange(_ROUNDS, device=key.device)
    left, right = ((key[..., i, None] + steps * _WEYL[i]) & _WORD for i in (0, 1))
    return list(zip(left.unbind(-1), right.unbind(-1), strict=True))


def encrypt(schedule: Sequence[tuple[W, W]], counter: Sequence[W]) -> tuple[W, W, W, W]:
    """Ten rounds, on tensors or single numbers; the second and fourth result carry rubbish above their 32 bits, which
    a shift or a mask removes.

    Words keep their own shapes until they meet, so that the first rounds of a grid of counters cost next to nothing;
    after four rounds each has met all the others.
    """
    # The mask also hides what inductor knows of an arange, whose negative multiples it would compute in int32.
    x0, x1, x2, x3 = (word & _WORD for word in counter)
    for k0, k1 in schedule:
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) + x0, (p1 >> 32) + x2
        x0, x1, x2, x3 = (high1 ^ x1 ^ k0) & _WORD, p1, (high0 ^ x3 ^ k1) & _WORD, p0
    return x0, x1, x2, x3


def traced(*values: object) -> bool:
    """Whether someone watches (compile, vmap, grad): then no buffers are filled and no blocks are cut."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return torch.compiler.is_compiling() or any(isinstance(v, Tensor) and wrapped(v) for v in values)


def split(key: Key, n: int = 2) -> Tensor:
    """`n` new keys of each key: (..., 2) -> (..., n, 2) int64; the first keys do not depend on `n`."""
    index = torch.arange(n, device=key.device)
    zero = index.new_zeros(())
    return torch.stack(philox(key[..., None, :], (index, zero, zero, zero + _SPLIT))[:2], -1)


def fold_in(key: Key, data: Index) -> Key:
    """A new key from a key and a number: a step, a layer, a name of a site. An int and a 0-d tensor give the same key.

    Shapes broadcast: a key (2,) and numbers (n,), or keys (n, 2) and a number, give n keys, (n, 2).
    Pass what changes from step to step as a tensor: a compiled function is then compiled once.
    ValueError for an int outside [0, 2**63).
    """
    if isinstance(data, int) and not 0 <= data < 1 << 63:
        raise ValueError(f"cannot fold in {data}: choose a number in [0, 2**63)")
    if _single(key, data):
        # Ten rounds on Python's numbers take 20 us, on 0-d tensors 200: a twentieth of a small model's step.
        number = int(data)
        words = encrypt(_int_schedule(key), (number & _WORD, number >> 32, 0, _FOLD_IN))
        return torch.tensor([words[0], words[1] & _WORD])
    value = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    zero = torch.zeros_like(value)
    return torch.stack(philox(key, (value, value >> 32, zero, zero + _FOLD_IN))[:2], -1)


def _single(key: Key, data: Index) -> bool:
    """Whether this is one key and one number at hand: neither traced nor on another device."""
    numbers = [key, data] if isinstance(data, Tensor) else [key]
    here = all(x.device.type == "cpu" for x in numbers) and not traced(*numbers)
    return here and key.shape == (2,) and (isinstance(data, int) or data.ndim == 0)


def _int_schedule(key: Key) -> list[tuple[int, int]]:
    k0, k1 = key.tolist()
    return [((k0 + i * _WEYL[0]) & _WORD, (k1 + i * _WEYL[1]) & _WORD) for i in range(_ROUNDS)]


def _draw(
    key: Key,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: Device,
    per_counter: int,
    value: Callable[[Words], Tensor],
) -> Tensor:
    """Element i of the flat result is one of the `per_counter` values (last dim) made of the words of counter
    i // per_counter; the result does not depend on how the counters are cut into blocks."""
    n = math.prod(shape)
    counters = -(-n // per_counter)
    if key.shape != (2,):
        raise ValueError(f"a draw takes one key of shape (2,), not {tuple(key.shape)}; index it, or vmap over it")
    keys = schedule(key, device)
    at = keys[0][0].device

    def block(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=at)
        zero = index.new_zeros(())
        x0, x1, x2, x3 = encrypt(keys, (index, index >> 32, zero, zero + _BITS))
        return value((x0, x1 & _WORD, x2, x3 & _WORD)).to(dtype)

    if traced(key):
        return block(0, counters).flatten()[:n].reshape(shape)
    out = torch.empty((counters, per_counter), dtype=dtype, device=at)
    size = GRAIN * torch.get_num_threads() if at.type == "cpu" else 1 << 22
    for start in range(0, counters, size):
        stop = min(start + size, counters)
        out[start:stop] = block(start, stop)
    return out.flatten()[:n].reshape(shape)


def bits(key: Key, shape: Sequence[int], device: Device = None) -> Tensor:
    """Random 32-bit words, int64 in [0, 2**32); element i depends on the key and on the flat index i only."""
    return _draw(key, shape, torch.int64, device, 4, lambda words: torch.stack(words, -1))


def uniform(
    key: Key,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    low: float = 0.0,
    high: float = 1.0,
    device: Device = None,
) -> Tensor:
    """Uniform numbers in [low, high), with as many random digits as the dtype holds (24 in float32).

    The numbers in [0, 1) are the same bits on every device. Scaling rounds: it may reach `high` itself, and a compiled
    kernel that fuses the product with the sum may differ in the last place.
    """
    digits = _DIGITS[dtype]

    def value(words: Words) -> Tensor:
        unit = _unit53(words) if digits == 53 else (torch.stack(words, -1) >> (32 - digits)).to(dtype) * 2.0**-digits
        return unit if (low, high) == (0.0, 1.0) else unit * (high - low) + low

    return _draw(key, shape, dtype, device, 2 if digits == 53 else 4, value)


def _unit53(words: Words) -> Tensor:
    """Two float64 numbers in [0, 1), last dim, with 53 digits each."""
    x0, x1, x2, x3 = words
    return torch.stack([((a >> 5) << 26 | b >> 6).to(torch.float64) * 2.0**-53 for a, b in ((x0, x1), (x2, x3))], -1)


def normal(key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Device = None) -> Tensor:
    """Standard normal numbers, by the method of Box and Muller (1958); |z| is at most 6.8 (8.7 in float64).

    Computed in float64 and rounded once. The random words are the same everywhere; log, cos and sin may differ in the
    last place of float64 between devices, compilers and vector widths, so that fewer than one float32 result in 10**8
    differs, by one unit in the last place.
    """
    if dtype == torch.float32 and (own := _by_library(key, shape, device)) is not None:
        return own
    if dtype == torch.float64:
        return _draw(key, shape, dtype, device, 2, lambda words: _box_muller(*(_unit53(words) + 2.0**-54).unbind(-1)))

    def value(words: Words) -> Tensor:
        unit = (torch.stack(words, -1).to(torch.float64) + 0.5) * 2.0**-32
        return _box_muller(unit[..., 0::2], unit[..., 1::2]).flatten(-2)

    return _draw(key, shape, dtype, device, 4, value)


def _by_library(key: Key, shape: Sequence[int], device: Device) -> Tensor | None:
    """`normal` on a CPU, where there is a library for it."""
    if key.shape != (2,) or traced(key) or torch.device(device or key.device).type != "cpu":
        return None
    out = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    k0, k1 = key.tolist()
    return out if clib.normal_(out, (k0, k1), _BITS) else None


def _box_muller(u: Tensor, v: Tensor) -> Tensor:
    """Two independent normals (a new last dim) from u in (0, 1] and v in [0, 1)."""
    radius, angle = torch.sqrt(-2.0 * torch.log(u)), 2.0 * math.pi * v
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)


def bernoulli(key: Key, p: float | Tensor, shape: Sequence[int], device: Device = None) -> Tensor:
    """True with probability p (a number, or a tensor that broadcasts to `shape`), exact to 2**-32; bool."""
    if not isinstance(p, Tensor) and not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p} is not a probability; choose a number in [0, 1]")
    return bits(key, shape, device).to(torch.float64) < p * 2.0**32


def randint(key: Key, shape: Sequence[int], low: int, high: int, device: Device = None) -> Tensor:
    """Whole numbers in [low, high), int64, from 64 random bits each: no number is favoured by more than 2**-33.

    The high word of a 64-bit product (Lemire, "Fast random integer generation in an interval", 2019), without the
    rejection, whose loop could not be compiled. ValueError unless 1 <= high - low <= 2**31.
    """
    span = high - low
    if not 1 <= span <= 1 << 31:
        raise ValueError(f"high - low = {span} must be between 1 and 2**31")

    def value(words: Words) -> Tensor:
        fine, coarse = torch.stack(words[0::2], -1), torch.stack(words[1::2], -1)
        return ((coarse * span + ((fine * span) >> 32)) >> 32) + low

    return _draw(key, shape, torch.int64, device, 2, value)


def permutation(key: Key, n: int, device: Device = None) -> Tensor:
    """The numbers 0 to n - 1 in random order, (n,) int64: a stable sort by 64 random bits, the same on every device."""
    order = _draw(key, (n,), torch.int64, device, 2, pack)
    return torch.argsort(order, stable=True)


def pack(words: Words) -> Tensor:
    """Four words as two int64 (a new last dim), the even words low; rubbish above odd words is shifted out."""
    x0, x1, x2, x3 = words
    return torch.stack((x0 | (x1 << 32), x2 | (x3 << 32)), -1)


def shuffled_index(key: Key, n: int, i: Tensor) -> Tensor:
    """Positions `i` (int64, any shape) of one pseudo-random permutation of range(n): `permutation` without its memory.

    A generalised Feistel network on Z_a x Z_b, a * b >= n, with Philox as its round function, walked until it falls
    below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 5). Memory is that of `i`.
    The walk looks at values: this runs eagerly only. ValueError unless 1 <= n <= 2**40 and 0 <= i < n.
    """
    if not 1 <= n <= 1 << 40:
        raise ValueError(f"n={n} must be between 1 and 2**40")
    if i.numel() and not 0 <= int(i.min()) <= int(i.max()) < n:
        raise ValueError(f"positions {int(i.min())} to {int(i.max())} are not all in range({n}); take them modulo n")
    if n <= _SMALL:
        return permutation(key, n, i.device)[i]
    keys = schedule(key, i.device)
    x = _feistel(keys, n, i.flatten())
    outside = (x >= n).nonzero().squeeze(-1)
    while outside.numel():
        x[outside] = _feistel(keys, n, x[outside])
        outside = outside[x[outside] >= n]
    return x.reshape(i.shape)


def _feistel(keys: Schedule, n: int, x: Tensor) -> Tensor:
    """One pass of a permutation of range(a * b), where n <= a * b < n + a: each half in turn is moved by a hash of the
    other."""
    a = math.isqrt(n - 1) + 1
    left, right, sides = x % a, x // a, (a, -(-n // a))
    zero = x.new_zeros(())
    for r in range(_FEISTEL_ROUNDS):
        word = encrypt(keys, (right, zero + r, zero, zero + _FEISTEL))[0]
        left, right = right, (left + word) % sides[r % 2]
    return left + a * right
