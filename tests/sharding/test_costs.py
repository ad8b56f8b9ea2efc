"""Bytes sent and bytes held: counted on the way, and by formula."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch

import fnlm
from fnlm.sharded import axes_of, layout_of
from fnlm.sharding import Book, Call, Layout, Mesh, Ranks, parse_mesh, planned, shard, simulate, strategy
from fnlm.sharding.memory import Peak
from fnlm.sharding.traffic import parameter_calls, sent
from tests.sharding.cases import adamw, batch, config, together

TINY = fnlm.ModelConfig(vocab_size=64, seq_len=2, n_layers=12, n_heads=4, d_model=64, d_ff=256, bias=True)
FEW = 8  # bytes of a total or a norm


def gradients(cfg: fnlm.ModelConfig, layout: Layout, micro: int, peak: bool = False) -> float:
    """One pass with nobody at the other end; the most bytes alive beyond parameters and batch, in parameters."""
    params = shard(fnlm.init_params(cfg, fnlm.key(0)), layout)
    plan = fnlm.Plan(ranks=Ranks(layout), micro_batches=micro, precision="fp32")
    run = fnlm.value_and_grad(fnlm.make_lm_loss(cfg, axes=axes_of(layout)), plan)
    rows = micro * layout.mesh.world
    tokens = torch.zeros(rows, cfg.seq_len, dtype=torch.long)
    one = fnlm.Batch(tokens, tokens, torch.ones(rows, cfg.seq_len))
    if not peak:
        run(params, one)
        return 0.0
    run(params, one)
    gc.collect()
    with Peak([*params.values(), *one]) as seen:
        kept = run(params, one)
    assert kept
    return seen.peak / sum(4 * p.numel() for p in fnlm.init_params(cfg, fnlm.key(0)).values())


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("schedule", [{}, {"bucket_bytes": 50_000}, {"reduce_dtype": "bf16"}])
@pytest.mark.parametrize(
    ("text", "how"),
    [("data=4", how) for how in ("ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3")]
    + [("data=3", "zero3"), ("replica=2,shard=2", "hsdp")],
)
def test_bytes_are_those_of_the_formula(text: str, how: str, schedule: dict[str, Any], micro: int) -> None:
    cfg, book = config(dropout_attn=0.0), Book()
    layout = layout_of(cfg, strategy(how, **schedule), planned(parse_mesh(text)).counted(book))
    gradients(cfg, layout, micro)
    counted = Counter(c for c in book if c.nbytes > FEW)
    assert counted == Counter(parameter_calls(layout, micro))
    assert counted


def test_bytes_of_the_papers() -> None:
    """With N bytes of parameters and n ranks, ddp and zero1 send 2 N (n-1)/n each, zero3 half as much again."""
    cfg = fnlm.ModelConfig(vocab_size=8, seq_len=4, n_layers=100, n_heads=1, d_model=8, d_ff=32, bias=False)
    n = 4 * fnlm.count(cfg)

    def cost(how: str) -> float:
        return sent(parameter_calls(layout_of(cfg, how, planned({"data": 4}))))["data"] / n

    assert [cost(how) for how in ("ddp_bucketed", "zero1", "zero2")] == [1.5] * 3
    assert 2.24 < cost("zero3") < 2.25
    assert Call("all_reduce", "data", 4, 100).sent == 150


def test_a_simulated_step_sends_what_is_planned() -> None:
    """With what comes beside the parameters: the weights' total, the loss, and one norm."""
    cfg = config()

    def rank(mesh: Mesh) -> Book:
        book = Book()
        together(mesh.counted(book), "zero2", cfg, adamw(), steps=1)
        return book

    layout = layout_of(cfg, "zero2", planned({"data": 2}))
    plan = Counter(parameter_calls(layout, rest=8, compute=8))
    for book in simulate(2, rank):
        counted = Counter(book[: -_after(layout)])
        assert counted - plan == Counter({Call("all_reduce", "data", 2, 8): 3})
        assert not plan - counted


def _after(layout: Layout) -> int:
    """What `together` does after the steps: compares copies (none are split off one axis), gathers the whole."""
    return 1


@pytest.mark.parametrize(
    ("how", "micro", "limit"),
    [("ddp_bucketed", 1, 1.1), ("zero2", 1, 1.2), ("zero3", 1, 0.55), ("ddp_bucketed", 3, 1.15), ("zero2", 3, 1.45),
     ("zero3", 3, 0.65)],
)  # fmt: skip
def test_peak_beyond_what_rests(how: str, micro: int, limit: float) -> None:
    """As they come. More micro-batches have a sum of gradients beside the parts that arrive."""
    assert gradients(TINY, layout_of(TINY, how, planned({"data": 4})), micro, peak=True) <= limit


def test_peak_counts_what_is_alive() -> None:
    kept = torch.ones(100)
    with Peak([kept]) as seen:
        a = torch.ones(1000)
        b = a.view(10, 100) + kept
        del a
        del b
        c = torch.ones(1500)
    assert seen.peak == 8000
    assert batch(config(), 0).tokens.shape[0] and c.numel()
