"""How much of the communication a schedule hides, in time that is counted and so the same everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fnlm
from fnlm.sharded import axes_of, layout_of
from fnlm.sharding import Ranks, Strategy, planned, strategy
from fnlm.sharding.modelled import Counting, Line, Worked, modelled
from fnlm.step import value_and_grad

DEEP = fnlm.ModelConfig(vocab_size=512, seq_len=256, n_layers=8, n_heads=4, d_model=256, d_ff=1024, bias=True)


def one_pass(how: Strategy, bandwidth: float, latency: float = 0.0) -> tuple[float, float, float]:
    """Seconds of the forward, of the whole pass, and of the line."""
    clock, ends = Counting(flops=1e9, nbytes=1e9), list[float]()
    line = Line(clock, bandwidth, latency)
    layout = layout_of(DEEP, how, modelled(planned({"data": 4}), line))
    plain = fnlm.make_lm_loss(DEEP, axes=axes_of(layout))

    def loss(*args: Any) -> torch.Tensor:
        value = plain(*args)
        ends.append(clock.now())
        return value

    params = {name: torch.empty(layout.local_shape(name), device="meta") for name in layout.shapes}
    tokens = torch.zeros(1, DEEP.seq_len, dtype=torch.long, device="meta")
    batch = fnlm.Batch(tokens, tokens, torch.ones(tokens.shape, device="meta"))
    run = value_and_grad(loss, fnlm.Plan(ranks=Ranks(layout, local=True), keep_memory=False))
    with clock:
        run(params, batch)
    return ends[0], clock.now(), line.busy


def hidden(name: str, **schedule: Any) -> float:
    """The share that costs nothing, on a link that talks as long as the backward pass computes."""
    how = strategy(name, **schedule)
    forward, alone, _ = one_pass(how, float("inf"))
    nbytes = one_pass(how, 1.0)[2]
    _, time, busy = one_pass(how, nbytes / (alone - forward))
    assert busy == pytest.approx(alone - forward)
    return 1 - (time - alone) / busy


@pytest.mark.parametrize(("name", "least"), [("ddp_bucketed", 0.8), ("zero2", 0.7), ("zero3", 0.65)])
def test_most_is_hidden(name: str, least: float) -> None:
    assert least < hidden(name) < 1


def test_nothing_is_hidden_where_nothing_overlaps() -> None:
    assert hidden("zero3", overlap=False, prefetch=0) == pytest.approx(0, abs=1e-6)
    assert hidden("ddp_bucketed", bucket_bytes=1 << 60) == pytest.approx(0, abs=1e-6)


def test_a_line_takes_one_after_the_other() -> None:
    clock = Counting()
    line = Line(clock, bandwidth=10.0, latency=1.0)
    assert [line.begin(20), line.begin(10)] == [3.0, 5.0]
    clock.wait_until(9.0)
    clock.wait_until(4.0)
    assert line.begin(0) == 10.0
    assert (line.busy, clock.now()) == (6.0, 9.0)


def test_what_a_thread_works_and_waits() -> None:
    clock = Worked()
    begun = clock.now()
    clock.wait_until(begun + 1000)
    assert 1000 <= clock.now() - begun < 1010
    clock.wait_until(begun)
    assert clock.waited < 1010
