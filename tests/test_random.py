"""The cipher against published vectors; same key, same bits; masks that do not depend on who computes which part."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import fnlm.dropout
from fnlm import random
from fnlm.dropout import keep_mask

KEY = random.key(20240607)
DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16
DRAWS = {
    "bits": lambda key: random.bits(key, (3, 7)),
    "uniform": lambda key: random.uniform(key, (3, 7), low=-1.0, high=3.0),
    "uniform64": lambda key: random.uniform(key, (3, 7), torch.float64),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (3, 7)),
    "randint": lambda key: random.randint(key, (3, 7), -5, 1000),
    "permutation": lambda key: random.permutation(key, 11),
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 3),
    "keep_mask": lambda key: keep_mask(key, 0.3, (2, 3, 4, 21), (1, 2, 3, 5)),
    "keep_mask_bool": lambda key: keep_mask(key, 0.3, (3, 21), dtype=torch.bool),
}


def chi_square(counts: torch.Tensor) -> float:
    """How far counts are from equal, in standard deviations of the chi-square statistic."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's coefficient, in standard deviations of that of independent samples."""
    return float(torch.corrcoef(torch.stack((x.flatten(), y.flatten())).double())[0, 1]) * math.sqrt(x.numel())


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    counter_, key_, words_ = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    got = random.philox(torch.tensor(key_), [torch.tensor(word) for word in counter_])
    assert [int(word) for word in got] == words_


def test_philox_broadcasts_counters() -> None:
    axes = [torch.arange(n).reshape(-1, *[1] * d) for d, n in enumerate((2, 3, 4, 5))]
    grid = random.philox(KEY, axes)
    whole = random.philox(KEY, torch.broadcast_tensors(*axes))
    assert all(a.shape == (5, 4, 3, 2) and torch.equal(a, b) for a, b in zip(grid, whole, strict=True))


@pytest.mark.parametrize("name", DRAWS)
def test_same_bits_under_vmap_over_keys(name: str) -> None:
    keys = random.split(KEY, 4)
    assert torch.equal(torch.vmap(DRAWS[name])(keys), torch.stack([DRAWS[name](key) for key in keys]))


def test_same_bits_under_vmap_over_counters() -> None:
    at = torch.arange(4)
    assert torch.equal(
        torch.vmap(lambda i: torch.stack(random.philox(KEY, (i, i, i, i))))(at),
        torch.stack(random.philox(KEY, (at, at, at, at)), 1),
    )
    assert torch.equal(
        torch.vmap(lambda i: keep_mask(KEY, 0.3, (2, 5, 9), (i, 2 * i, 3 * i)))(at),
        torch.stack([keep_mask(KEY, 0.3, (2, 5, 9), (i, 2 * i, 3 * i)) for i in range(4)]),
    )
    folded = torch.vmap(random.fold_in, in_dims=(None, 0))(KEY, at)
    assert torch.equal(folded, torch.stack([random.fold_in(KEY, i) for i in range(4)]))


def everything(key: torch.Tensor, step: torch.Tensor, at: torch.Tensor) -> list[torch.Tensor]:
    key = random.fold_in(key, step)
    return [*(draw(key) for draw in DRAWS.values()), keep_mask(key, 0.1, (2, 6, 20), (at, at, at))]


def test_same_bits_compiled_once() -> None:
    def draw(key: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return keep_mask(random.fold_in(key, step), 0.1, (2, 6, 20), (step, 2 * step, 3 * step))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(draw, backend=counter, fullgraph=True)
    for step in range(3):
        assert torch.equal(compiled(KEY, torch.tensor(step)), draw(KEY, torch.tensor(step)))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, when inductor is imported
def test_same_bits_from_inductor() -> None:
    def draws(key: torch.Tensor, step: torch.Tensor) -> list[torch.Tensor]:
        key = random.fold_in(key, step)
        masks = [keep_mask(key, 0.1, (2, 6, 20), at) for at in ((0, 0, 0), (step, step, step))]
        return [random.fold_in(key, 3), random.split(key, 3), random.bits(key, (3, 7)), *masks]

    torch._dynamo.reset()
    compiled = torch.compile(draws, fullgraph=True)
    for step in range(20):  # many: overflow in generated code shows in some words only
        args = KEY, torch.tensor(step)
        assert all(torch.equal(got, want) for got, want in zip(compiled(*args), draws(*args), strict=True))


@pytest.mark.slow
def test_mask_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(keep_mask, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 5, 40), (3, 8, 33)):
        assert torch.equal(compiled(KEY, 0.2, shape), keep_mask(KEY, 0.2, shape))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {
        "bits": lambda: random.bits(KEY, (2000,)),
        "normal": lambda: random.normal(KEY, (2000,)),
        "mask": lambda: keep_mask(KEY, 0.4, (3, 5, 7, 90), (9, 8, 7, 6)),
        "rows": lambda: keep_mask(random.split(KEY, 5), 0.4, (5, 7, 90), (8, 6)),
    }
    whole = {name: draw() for name, draw in draws.items()}
    monkeypatch.setattr(random, "GRAIN", 16)
    monkeypatch.setattr(fnlm.dropout, "GRAIN", 16)
    for name, draw in draws.items():
        torch.testing.assert_close(draw(), whole[name], rtol=1e-6 if name == "normal" else 0, atol=0)


# keys


def test_key_takes_64_bits() -> None:
    assert random.key(0x0123456789ABCDEF).tolist() == [0x89ABCDEF, 0x01234567]
    assert random.key(2**64 - 1).tolist() == [2**32 - 1] * 2


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_key_refuses_other_seeds(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} is not in .0, 2..64.; take it modulo"):
        random.key(seed)


@pytest.mark.parametrize("data", [0, 1, 2**31, 2**32, 2**63 - 1])
def test_fold_in_of_int_equals_fold_in_of_tensor(data: int) -> None:
    assert torch.equal(random.fold_in(KEY, data), random.fold_in(KEY, torch.tensor(data)))


def test_fold_in_refuses_what_no_int64_holds() -> None:
    with pytest.raises(ValueError, match="cannot fold in -1: choose"):
        random.fold_in(KEY, -1)
    with pytest.raises(ValueError, match="cannot fold in 9223372036854775808"):
        random.fold_in(KEY, 2**63)


def test_many_keys_are_not_a_key() -> None:
    with pytest.raises(ValueError, match=r"one key of shape \(2,\), not \(3, 2\); index it"):
        random.bits(random.split(KEY, 3), (2,))


def test_many_keys_are_the_keys_one_by_one() -> None:
    keys = random.split(KEY, 6)
    assert torch.equal(random.split(keys, 4), torch.stack([random.split(key, 4) for key in keys]))
    assert torch.equal(random.fold_in(keys, 7), torch.stack([random.fold_in(key, 7) for key in keys]))
    numbers = torch.arange(5) * 2**33
    assert torch.equal(random.fold_in(KEY, numbers), torch.stack([random.fold_in(KEY, i) for i in numbers]))


@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 40), (6, 3, 5, 17)])
def test_one_key_per_sample_masks_each_sample_by_itself(shape: tuple[int, ...]) -> None:
    keys, offset = random.split(KEY, 6), (3, 2, 1)[: len(shape) - 1]
    rows = [keep_mask(key, 0.4, shape[1:], offset) for key in keys]
    assert torch.equal(keep_mask(keys, 0.4, shape, offset), torch.stack(rows))
    with pytest.raises(ValueError, match="6 keys do not fit the first dimension"):
        keep_mask(keys, 0.4, (5, *shape[1:]))


def test_split_does_not_depend_on_how_many() -> None:
    assert torch.equal(random.split(KEY, 5)[:2], random.split(KEY))


def test_domains_never_share_words() -> None:
    keys = [tuple(key.tolist()) for key in random.split(KEY, 500)]
    keys += [tuple(random.fold_in(KEY, i).tolist()) for i in range(500)]
    keys += [tuple(pair) for pair in random.bits(KEY, (500, 4))[:, :2].tolist()]
    grid = random.pack(random.philox(KEY, [torch.arange(500), *torch.tensor([0, 0, random.KEEP_MASK])]))
    mask_words = (grid[:, 0] & 0xFFFFFFFF, (grid[:, 0] >> 32) & 0xFFFFFFFF)
    keys += [tuple(pair) for pair in torch.stack(mask_words, -1).tolist()]
    assert len(set(keys)) == 2000


def test_inputs_are_unchanged() -> None:
    key, step, at = KEY.clone(), torch.tensor(3), torch.tensor(5)
    everything(key, step, at)
    position = torch.arange(2000)
    random.shuffled_index(key, 2000, position)
    assert torch.equal(key, KEY) and int(step) == 3 and int(at) == 5
    assert torch.equal(position, torch.arange(2000))


# draws


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform(dtype: torch.dtype) -> None:
    x = random.uniform(KEY, (100, 1001), dtype)
    assert x.shape == (100, 1001) and x.dtype == dtype
    assert 0 <= float(x.min()) and float(x.max()) < 1
    x = x.double()
    assert abs(float(x.mean()) - 0.5) < 0.5 * 2.0**-7 and abs(float(x.var()) - 1 / 12) < 1e-3
    assert chi_square(torch.histc(x, 64, 0, 1)) < 4


def test_uniform_between() -> None:
    x = random.uniform(KEY, (10000,), low=-2.0, high=6.0)
    assert torch.equal(x, random.uniform(KEY, (10000,)) * 8 - 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal(dtype: torch.dtype) -> None:
    z = random.normal(KEY, (100, 1001), dtype)
    assert z.shape == (100, 1001) and z.dtype == dtype
    z = z.double()
    n = math.sqrt(z.numel())
    assert abs(float(z.mean())) < 4 / n and abs(float(z.var()) - 1) < 4 * math.sqrt(2) / n
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96) / n
    assert all(abs(correlation(z.flatten()[lag:], z.flatten()[:-lag])) < 4 for lag in (1, 2, 3, 4))
    assert chi_square(torch.histc(torch.special.ndtr(z), 32, 0, 1)) < (4 if dtype != torch.bfloat16 else math.inf)


def test_element_depends_on_its_index_only() -> None:
    assert torch.equal(random.bits(KEY, (5, 9)).flatten()[:13], random.bits(KEY, (13,)))
    assert torch.equal(random.randint(KEY, (45,), 0, 9)[:13], random.randint(KEY, (13,), 0, 9))


def test_empty_and_scalar_shapes() -> None:
    assert random.bits(KEY, (0, 3)).shape == (0, 3) and random.normal(KEY, ()).shape == ()
    assert keep_mask(KEY, 0.5, (0, 3)).shape == (0, 3) and random.permutation(KEY, 0).shape == (0,)


def test_bytes_of_bits_are_equally_likely() -> None:
    words = random.bits(KEY, (1 << 16,))
    assert 0 <= int(words.min()) and int(words.max()) < 1 << 32
    for shift in (0, 8, 16, 24):
        assert abs(chi_square(torch.bincount((words >> shift) & 255, minlength=256).double())) < 4


def test_bernoulli() -> None:
    assert abs(float(random.bernoulli(KEY, 0.3, (100000,)).double().mean()) - 0.3) < 4 * math.sqrt(0.21 / 100000)
    assert random.bernoulli(KEY, 1.0, (1000,)).all() and not random.bernoulli(KEY, 0.0, (1000,)).any()
    p = torch.tensor([0.0, 1.0])
    assert torch.equal(random.bernoulli(KEY, p, (50, 2)), torch.tensor([[False, True]]).expand(50, 2))
    with pytest.raises(ValueError, match=r"p=1\.5 is not a probability"):
        random.bernoulli(KEY, 1.5, (2,))


def test_randint() -> None:
    x = random.randint(KEY, (60000,), -2, 4)
    assert abs(chi_square(torch.bincount(x + 2).double())) < 4 and int(x.min()) == -2 and int(x.max()) == 3
    wide = random.randint(KEY, (1000,), 0, 2**31).double() / 2**31
    assert float(wide.max()) < 1 and abs(float(wide.mean()) - 0.5) < 0.04
    for low, high in ((3, 3), (0, 2**31 + 1)):
        with pytest.raises(ValueError, match=f"high - low = {high - low} must be between 1 and"):
            random.randint(KEY, (2,), low, high)


# permutations


@pytest.mark.parametrize("n", [1, 2, 3, 4, 100, 4099])
def test_permutation(n: int) -> None:
    assert torch.equal(random.permutation(KEY, n).sort().values, torch.arange(n))


def test_every_permutation_of_four_is_equally_likely() -> None:
    orders = torch.vmap(lambda key: random.permutation(key, 4))(random.split(KEY, 4800))
    counts = torch.bincount((orders * torch.tensor([64, 16, 4, 1])).sum(1), minlength=256)
    index = [64 * a + 16 * b + 4 * c + d for a, b, c, d in itertools.permutations(range(4))]
    assert int(counts[index].sum()) == 4800 and abs(chi_square(counts[index].double())) < 4


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 97, 1023, 1024, 1025, 1089, 1090, 2048, 4096, 4099, 65536, 99991])
def test_shuffled_index_is_a_bijection(n: int) -> None:
    x = random.shuffled_index(KEY, n, torch.arange(n))
    assert torch.equal(x.sort().values, torch.arange(n))
    assert n < 7 or not torch.equal(x, torch.arange(n))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(1025, 6000), seed=st.integers(0, 2**64 - 1))
def test_shuffled_index_is_a_bijection_for_any_key(n: int, seed: int) -> None:
    x = random.shuffled_index(random.key(seed), n, torch.arange(n))
    assert torch.equal(x.sort().values, torch.arange(n))


def test_shuffled_index_at_single_positions() -> None:
    whole = random.shuffled_index(KEY, 5000, torch.arange(5000))
    at = torch.tensor([[0, 17], [4999, 17]])
    assert torch.equal(random.shuffled_index(KEY, 5000, at), whole[at])
    assert int(random.shuffled_index(KEY, 5000, torch.tensor(17))) == int(whole[17])


def test_shuffled_index_of_many() -> None:
    n = 2**40 - 87
    x = random.shuffled_index(KEY, n, torch.arange(n - 4096, n))
    assert x.unique().numel() == 4096 and 0 <= int(x.min()) and int(x.max()) < n
    assert abs(chi_square(torch.histc(x.double() / n, 64, 0, 1))) < 4


def test_shuffled_index_forgets_the_order() -> None:
    n = 1025
    x = torch.stack([random.shuffled_index(key, n, torch.arange(n)) for key in random.split(KEY, 100)])
    fixed, adjacent = (x == torch.arange(n)).sum(), ((x[:, 1:] - x[:, :-1]) % n == 1).sum()
    assert abs(int(fixed) - 100) < 40 and abs(int(adjacent) - 100) < 40  # Poisson, 4 standard deviations
    for lag in (1, 33):
        pairs = (x[:, lag:] % 33) * 33 + x[:, :-lag] % 33
        assert abs(chi_square(torch.bincount(pairs.flatten(), minlength=33 * 33).double())) < 4


def test_shuffled_index_refuses_positions_outside() -> None:
    with pytest.raises(ValueError, match="n=0 must be between 1 and"):
        random.shuffled_index(KEY, 0, torch.arange(0))
    with pytest.raises(ValueError, match=r"positions 0 to 10 are not all in range\(10\)"):
        random.shuffled_index(KEY, 10, torch.arange(11))


# the dropout mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dims=st.integers(1, 4), tensors=st.booleans())
def test_any_part_of_a_mask_is_that_part(data: st.DataObject, dims: int, tensors: bool) -> None:
    shape = [data.draw(st.integers(1, 6)) for _ in range(dims - 1)] + [data.draw(st.integers(1, 40))]
    start = [data.draw(st.integers(0, size - 1)) for size in shape]
    stop = [data.draw(st.integers(first + 1, size)) for first, size in zip(start, shape, strict=True)]
    whole = keep_mask(KEY, 0.5, shape)
    offset = [torch.tensor(first) for first in start] if tensors else start
    part = keep_mask(KEY, 0.5, [b - a for a, b in zip(start, stop, strict=True)], offset)
    assert torch.equal(part, whole[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))])


def test_ranks_together_hold_one_mask() -> None:
    whole = keep_mask(KEY, 0.3, (4, 6, 5, 24))
    rows = [
        torch.cat([keep_mask(KEY, 0.3, (2, 3, 5, 24), (2 * batch, 3 * head, 0, 0)) for head in range(2)], 1)
        for batch in range(2)
    ]
    assert torch.equal(torch.cat(rows), whole)


def test_offsets_far_away() -> None:
    far = 2**28 - 2, 2**32 - 3, 2**32 - 4, 2**34
    part = keep_mask(KEY, 0.5, (2, 3, 4, 16), far)
    assert torch.equal(
        part[1:, 2:, 3:, 5:], keep_mask(KEY, 0.5, (1, 1, 1, 11), (2**28 - 1, 2**32 - 1, 2**32 - 1, 2**34 + 5))
    )
    assert not torch.equal(part, keep_mask(KEY, 0.5, (2, 3, 4, 16)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_statistics(p: float) -> None:
    shape = 16, 64, 96
    mask = keep_mask(KEY, p, shape)
    n = mask.numel()
    kept, scale = (mask != 0).double(), float(mask.max())
    assert set(mask.unique().tolist()) == {0.0, scale} and scale == pytest.approx(1 / (1 - p), rel=2**-15 / (1 - p))
    assert abs(float(kept.mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    assert scale * (1 - round(p * 2**16) / 2**16) == pytest.approx(1, abs=1e-7)
    for dim, lag in itertools.product(range(3), (1, 2, 3, 4, 8)):
        size = shape[dim] - lag
        assert abs(correlation(kept.narrow(dim, lag, size), kept.narrow(dim, 0, size))) < 4
    neighbours = [random.fold_in(KEY, i) for i in range(3)] + [random.key(20240608), KEY + torch.tensor([0, 1])]
    others = [kept] + [(keep_mask(key, p, shape) != 0).double() for key in neighbours]
    assert all(abs(correlation(a, b)) < 4 for a, b in itertools.combinations(others, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    mask = keep_mask(KEY, 0.5, (40, 50), dtype=dtype)
    assert mask.dtype == dtype and torch.equal(mask != 0, keep_mask(KEY, 0.5, (40, 50)) != 0)
    assert float(mask.max()) == (1 if dtype == torch.bool else 2)


def test_no_dropout_is_ones() -> None:
    assert torch.equal(keep_mask(KEY, 0.0, (3, 5)), torch.ones(3, 5))
    assert keep_mask(KEY, 0.0, (3, 5), dtype=torch.bool).all()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_mask_refuses_p(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout p={p} must be at least 0 and less than 1"):
        keep_mask(KEY, p, (3, 5))


def test_mask_refuses_shapes() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 1, 1, 1, 1\) must have 1 to 4 dims"):
        keep_mask(KEY, 0.5, (1,) * 5)
    with pytest.raises(ValueError, match=r"offset \(1,\) as many"):
        keep_mask(KEY, 0.5, (2, 2), (1,))
