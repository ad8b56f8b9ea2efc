"""Batches: every window once an epoch, for any batch size and any split of it; what they hold; prefetching."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fnlm
from fnlm import data
from fnlm.data import DataError, Split


def split_of(n: int, mask: np.ndarray | None = None, vocab_size: int | None = None) -> Split:
    """Token i is i."""
    return Split(np.arange(n, dtype=np.uint32), mask, 1, n, vocab_size)


@given(st.integers(2, 400), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
@example(n=3300, seq_len=3, batch_size=64, seed=1)  # more windows than are shuffled by sorting
@settings(max_examples=40)
def test_every_window_comes_once_an_epoch(n: int, seq_len: int, batch_size: int, seed: int) -> None:
    split, key = split_of(n), fnlm.key(seed)
    if n <= seq_len:
        with pytest.raises(DataError, match=f"needs {seq_len + 1} tokens, there are {n}"):
            data.batch_at(split, seq_len, batch_size, key, 0)
        return
    count, epochs = data.window_count(split, seq_len), 3
    steps = range(-(-epochs * count // batch_size))
    ids = torch.cat([data.sample_ids(split, seq_len, batch_size, key, s) for s in steps]).tolist()
    starts = torch.cat([data.window_starts(split, seq_len, batch_size, key, s) for s in steps]).tolist()
    for epoch in range(epochs):
        here = slice(epoch * count, (epoch + 1) * count)
        assert sorted(ids[here]) == list(range(count))
        offsets = {start - i * seq_len for start, i in zip(starts[here], ids[here], strict=True)}
        assert len(offsets) == 1
        assert min(offsets) >= 0
        assert max(starts[here]) + seq_len < n


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 40))
@settings(max_examples=40)
def test_the_samples_do_not_depend_on_how_they_are_grouped(a: int, b: int, start: int) -> None:
    split, key = split_of(1500), fnlm.key(3)
    one_by_one = [data.window_starts(split, 16, 1, key, s).item() for s in range(start * a * b, (start + 1) * a * b)]
    for size in (a, b, a * b):
        steps = range(start * a * b // size, (start + 1) * a * b // size)
        assert torch.cat([data.window_starts(split, 16, size, key, s) for s in steps]).tolist() == one_by_one
    whole = data.batch_at(split, 16, a * b, key, start)
    ranks = [data.batch_at(split, 16, a * b, key, start, rows=range(i * b, (i + 1) * b)) for i in range(a)]
    assert all(torch.equal(torch.cat(parts), x) for *parts, x in zip(*ranks, whole, strict=True))


PIECES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), max_size=4)


def sizes_from(gaps: list[tuple[int, int]], last: int) -> data.Sizes:
    steps = np.cumsum([gap for gap, _ in gaps]).tolist()
    return data.Sizes(tuple((until, size) for until, (_, size) in zip(steps, gaps, strict=True)), last)


@given(PIECES, st.integers(1, 9), st.integers(0, 300))
def test_sizes_are_counted(gaps: list[tuple[int, int]], last: int, step: int) -> None:
    sizes = sizes_from(gaps, last)
    assert sizes.first(step) == sum(sizes.at(s) for s in range(step))
    assert sizes.at(10**9) == last
    assert [sizes.at(until - 1) for until, _ in sizes.pieces] == [size for _, size in sizes.pieces]


@given(PIECES, st.integers(1, 9), st.integers(0, 150))
@settings(max_examples=20)
def test_a_ramp_meets_the_samples_of_any_other_size(gaps: list[tuple[int, int]], last: int, start: int) -> None:
    split, key, sizes = split_of(1500), fnlm.key(3), sizes_from(gaps, last)
    stop = start + 70  # more than one lookup
    batches = list(data.batches(split, 16, sizes, key, start, stop))
    assert [len(b.tokens) for b in batches] == [sizes.at(s) for s in range(start, stop)]
    one_by_one = data.window_starts(split, 16, 1, key, sizes.first(start), sizes.first(stop) - sizes.first(start))
    assert torch.equal(torch.cat([b.tokens[:, 0] for b in batches]), one_by_one)
    same = data.batch_at(split, 16, sizes, key, start + 65)
    assert all(torch.equal(a, b) for a, b in zip(same, batches[65], strict=True))
    assert len(data.sample_ids(split, 16, sizes, key, start)) == sizes.at(start)


def test_a_size_for_all_steps_is_a_number() -> None:
    split, key = split_of(700), fnlm.key(5)
    plain, sized = (data.batches(split, 9, n, key, 3, 80) for n in (4, data.Sizes((), 4)))
    assert all(torch.equal(a, b) for x, y in zip(plain, sized, strict=True) for a, b in zip(x, y, strict=True))


def test_ranks_share_a_batch_whose_size_changes() -> None:
    split, key, sizes = split_of(700), fnlm.key(5), data.Sizes(((3, 2), (5, 4)), 6)
    ranks = [list(data.batches(split, 9, sizes, key, 0, 9, slice(rank, None, 2))) for rank in range(2)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        whole = data.batch_at(split, 9, sizes, key, step).tokens
        assert torch.equal(torch.stack([p.tokens for p in parts], 1).flatten(0, 1), whole)


def test_batches_ahead_are_the_same() -> None:
    split, key = split_of(700), fnlm.key(5)
    ahead = data.batches(split, 9, 4, key, start=60, stop=70, rows=range(1, 3))
    for step, batch in zip(range(60, 70), ahead, strict=True):
        same = data.batch_at(split, 9, 4, key, step, rows=range(1, 3))
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))


def test_resumed_at_nine_tenths_every_document_counts_in_later_epochs() -> None:
    documents, split, key = 50, split_of(2000), fnlm.key(9)  # of 40 tokens each
    count = data.window_count(split, 20)
    met: list[Counter[int]] = [Counter() for _ in range(3)]
    halt = int(0.9 * count)  # of batches of one window
    for start, stop in ((0, halt), (halt, 3 * count)):
        for step, batch in enumerate(data.batches(split, 20, 1, key, start, stop), start):
            met[step // count].update((batch.targets // 40).flatten().tolist())
    assert all(set(epoch) == set(range(documents)) for epoch in met)
    assert [sum(epoch.values()) for epoch in met] == [count * 20] * 3


def test_over_epochs_every_token_is_met() -> None:
    split, seen = split_of(103), Counter()
    for step in range(400):
        seen.update(data.batch_at(split, 10, 3, fnlm.key(0), step).targets.flatten().tolist())
    assert set(seen) == set(range(1, 103))
    assert min(seen[i] for i in range(20, 83)) > 0.8 * max(seen.values())


def test_orders_differ_between_keys_and_epochs() -> None:
    split = split_of(2000)
    count = data.window_count(split, 8)

    def order(seed: int, epoch: int) -> list[int]:
        return data.sample_ids(split, 8, count, fnlm.key(seed), epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_targets_are_the_next_tokens_and_weights_the_mask() -> None:
    mask = (np.arange(500) % 3 == 0).astype(np.uint8)
    batch = data.batch_at(split_of(500, mask), 16, 4, fnlm.key(1), 5)
    assert [tuple(x.shape) for x in batch] == [(4, 16)] * 3
    assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.float32]
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert torch.equal(batch.weights, (batch.targets % 3 == 0).float())
    assert torch.equal(data.batch_at(split_of(500), 16, 4, fnlm.key(1), 5).weights, torch.ones(4, 16))


def test_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match=r"token \d+ is \d+, vocab_size is 50"):
        data.batch_at(split_of(500, vocab_size=50), 16, 64, fnlm.key(0), 0)
    assert data.batch_at(split_of(500, vocab_size=500), 16, 64, fnlm.key(0), 0).tokens.max() < 500


@pytest.mark.parametrize(("batch_size", "step"), [(0, 0), (1, -1)])
def test_impossible_batches_are_refused(batch_size: int, step: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        data.batch_at(split_of(50), 4, batch_size, fnlm.key(0), step)


@given(st.integers(0, 90), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_evaluation_counts_every_target_once(n: int, seq_len: int, batch_size: int, masked: bool) -> None:
    mask = (np.arange(n) % 2).astype(np.uint8) if masked else None
    batches = list(data.windows(split_of(n, mask), seq_len, batch_size))
    assert all(b.tokens.shape == (batch_size, seq_len) for b in batches)
    learnt = [t for b in batches for t, w in zip(b.targets.flatten().tolist(), b.weights.flatten(), strict=True) if w]
    assert learnt == [i for i in range(1, n) if not masked or i % 2]
    assert all(torch.equal((b.tokens + 1) * b.weights, b.targets * b.weights) for b in batches)


def test_a_memory_map_works_as_an_array(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "x.bin")
    split = Split(np.memmap(tmp_path / "x.bin", "<u2", "r"), None, 1, 1000)
    same = data.batch_at(split_of(1000), 32, 4, fnlm.key(2), 7)
    assert all(torch.equal(a, b) for a, b in zip(data.batch_at(split, 32, 4, fnlm.key(2), 7), same, strict=True))


def test_prefetched_is_in_order_and_ends() -> None:
    assert list(data.prefetch(lambda s: s * s, 3, 9)) == [9, 16, 25, 36, 49, 64]
    assert list(data.prefetch(lambda s: s, 4, 4)) == []
    assert list(islice(data.prefetch(lambda s: s), 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="depth=0"):
        data.prefetch(lambda s: s, depth=0)


def test_prefetching_stays_only_a_little_ahead() -> None:
    made: list[int] = []
    batches = data.prefetch(lambda s: made.append(s) or s, depth=2)
    assert next(batches) == 0
    assert next(batches) == 1
    batches.close()
    assert len(made) <= 5
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("error", [ValueError("bad"), StopIteration("early"), KeyboardInterrupt()])
def test_an_error_comes_where_the_batch_would_have(error: BaseException) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise error
        return step

    batches = data.prefetch(make, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    # A generator may not let StopIteration out.
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
