"""Every strategy beside one process: the same run, how far apart they end, what each rank holds and sends.

Ranks are threads of this process, or the processes that torch.distributed has joined. Float64 proves that the runs are
the same; float32 is what is timed and weighed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fnlm import random, tree
from fnlm.collectives import Axes
from fnlm.config import Compute, ModelConfig, TrainConfig
from fnlm.forecast import bytes_of, forecast
from fnlm.losses import make_lm_loss
from fnlm.params import init_params
from fnlm.presets import optimizer_of
from fnlm.sharded import axes_of, layout_of, make_sharded_step, sharded_state
from fnlm.sharding import Book, Mesh, Ranks, check_copies, planned, simulate, strategy, unshard
from fnlm.sharding.memory import Peak
from fnlm.sharding.mesh import Shape, describe
from fnlm.sharding.traffic import sent
from fnlm.step import Loss, Plan, init_state, make_step, value_and_grad
from fnlm.types import Batch, Params, TrainState

Run = Callable[[Shape, Callable[[Mesh], Any]], Any]
"""Run fn(mesh) on every rank of a mesh and give back what rank 0 says."""

CFG = ModelConfig(vocab_size=65, n_layers=4, n_heads=4, d_model=64, d_ff=256, seq_len=32, bias=False,
                  dropout_residual=0.1)  # fmt: skip
TRAIN = TrainConfig(steps=100, batch_size=2, micro_batches=2, warmup=0, lr=1e-3, precision="fp32")
MOST_HEADS = 4


class Row(NamedTuple):
    """A strategy on a mesh.

    `gap`: the largest difference of a parameter from the single process' after the steps in float64; `in_sync`: "yes",
    or which tensor differs where its spec says copies. `held` at rest and `peak` (None: not measured) in bytes, of rank
    0, float32. `sent` and `planned`: bytes that leave rank 0 in a step.
    """

    strategy: str
    mesh: str
    gap: float
    in_sync: str
    loss: float
    held: int
    peak: int | None
    sent: float
    planned: float
    tokens_per_s: float


def cases(world: int, processes: bool = False) -> list[tuple[str, Shape]]:
    """What is run on so many ranks; PyTorch's DDP needs processes."""
    split = max(n for n in range(1, MOST_HEADS + 1) if world % n == 0)
    rows = {"data": world // split} if world > split else {}
    data = (*(("ddp",) if processes else ()), "ddp_flat", "ddp_bucketed", "zero1", "zero2", "zero3")
    found: list[tuple[str, Shape]] = [(how, {"data": world}) for how in data]
    found.append(("hsdp", {"replica": 2, "shard": world // 2} if world % 2 == 0 and world > 2 else {"shard": world}))
    found += [("tensor_parallel", rows | {"tensor": split}), ("context", rows | {"context": split})]
    return [*found, ("zero3", {"data": world // 2, "tensor": 2})] if world % 2 == 0 and world > 2 else found


def strategies_benchmark(world: int, run: Run | None = None, quick: bool = False) -> Iterator[Row]:
    """A row for each strategy on `world` ranks, and before them the single process."""
    steps, timed = (3, 2) if quick else (10, 10)
    rows = TRAIN.batch_size * TRAIN.micro_batches * world
    want, loss = alone(steps, rows)
    for how, shape in [("single", {}), *cases(world, run is not None)]:

        def rank(mesh: Mesh, how: str = how) -> tuple[float, str, float, Book, int, float]:
            return _proof(mesh, how, steps, rows, want) + _weight(mesh, how, timed, rows)

        alone_here = how == "single"
        gap, in_sync, loss, book, held, speed = (threads if run is None or alone_here else run)(shape, rank)
        per_rank = rows // TRAIN.micro_batches // planned(shape).size("data", "replica", "shard")
        plan = forecast(CFG, replace(TRAIN, batch_size=per_rank), how, shape)
        peak = _peak(how, shape, rows)
        yield Row(how, describe(shape) if shape else "", gap, in_sync, loss, held, peak, sum(sent(book).values()),
                  sum(plan.sent.values()), speed)  # fmt: skip


def fsdp_row(world: int, quick: bool = False) -> Row:
    """PyTorch's FSDP2 on the same run; every process of torch.distributed calls it.

    What it sends is counted at torch.distributed's gathers and scatters; planned is what zero3 would send.
    """
    from fnlm.benchmark_peers import FsdpStep, counted

    steps, timed = (3, 2) if quick else (10, 10)
    rows = TRAIN.batch_size * TRAIN.micro_batches * world
    want, _ = alone(steps, rows)

    def made(dtype: torch.dtype) -> FsdpStep:
        optimizer = optimizer_of(replace(TRAIN, clip=None), CFG)
        return FsdpStep(_start(dtype), CFG, optimizer, TRAIN.clip or float("inf"), TRAIN.micro_batches)

    run, loss, key = made(torch.float64), float("nan"), random.key(1)
    for i in range(steps):
        loss = run(_batch(i, rows), random.fold_in(key, torch.tensor(i)))
    gap = max(float((p.full_tensor().detach() - want[k]).abs().max()) for k, p in run.own.items())
    run, book = made(torch.float32), Book()
    with counted(book):
        run(_batch(0, rows), key)
    held = bytes_of(run.local().values()) + bytes_of(tree.flatten(run.state).values())
    begun = time.perf_counter()
    for i in range(timed):
        run(_batch(i, rows), key)
    speed = timed * rows * CFG.seq_len / (time.perf_counter() - begun)
    plan = forecast(CFG, replace(TRAIN, batch_size=rows // TRAIN.micro_batches // world), "zero3", {"data": world})
    return Row("FSDP2", f"data={world}", gap, "yes", loss, held, None, sum(sent(book).values()),
               sum(plan.sent.values()), speed)  # fmt: skip


def threads(shape: Shape, rank: Callable[[Mesh], Any]) -> Any:
    """What rank 0 says, where ranks are threads."""
    return simulate(shape, rank)[0]


def alone(steps: int, rows: int) -> tuple[Params, float]:
    """The parameters and the last loss of one process."""
    optimizer, plan = optimizer_of(TRAIN, CFG), Plan("fp32", TRAIN.micro_batches)
    state = init_state(_start(torch.float64), optimizer, plan, random.key(1))
    step = make_step(make_lm_loss(CFG), optimizer, plan)
    return _go(step, state, steps, rows)


def _proof(mesh: Mesh, how: str, steps: int, rows: int, want: Params) -> tuple[float, str, float]:
    step, state = _made(mesh, how, torch.float64)
    layout = layout_of(CFG, how, mesh)
    params, loss = _go(step, state, steps, rows)
    whole = unshard(params, layout)
    gap = max(float((whole[k] - want[k]).abs().max()) for k in want)
    try:
        check_copies(params, layout)
    except ValueError as error:
        return gap, str(error), loss
    return gap, "yes", loss


def _weight(mesh: Mesh, how: str, timed: int, rows: int) -> tuple[Book, int, float]:
    """What is sent in a step, bytes of parameters and optimizer at rest, tokens a second of all ranks."""
    book = Book()
    step, state = _made(mesh.counted(book), how, torch.float32)
    state, metrics = step(state, _batch(0, rows))
    one, held = Book(book), bytes_of(state.params.values()) + _state_bytes(state)
    begun = time.perf_counter()
    for i in range(timed):
        state, metrics = step(state, _batch(i, rows))
        float(metrics["train/loss"])
    return one, held, timed * rows * CFG.seq_len / (time.perf_counter() - begun)


def _peak(how: str, shape: Shape, rows: int) -> int:
    """The most that rank 0 holds at once: real tensors, nobody at the other end."""
    mesh = planned(shape)
    layout = layout_of(CFG, replace(strategy(how), reducer="own"), mesh)
    optimizer, plan = optimizer_of(TRAIN, CFG), Plan("fp32", TRAIN.micro_batches, ranks=Ranks(layout))
    state = sharded_state(_start(torch.float32), optimizer, layout)
    batch, run = _batch(0, rows), value_and_grad(make_lm_loss(CFG, axes=axes_of(layout)), plan)
    with Peak([*state.params.values(), *batch]) as seen:
        run(state.params, batch, random.key(1))
    return int(seen.peak) + bytes_of(state.params.values()) + _state_bytes(state)


def _made(mesh: Mesh, how: str, dtype: torch.dtype) -> tuple[Any, TrainState]:
    layout, optimizer = layout_of(CFG, how, mesh), optimizer_of(TRAIN, CFG)
    plan = Plan("fp32", TRAIN.micro_batches)

    def build(axes: Axes) -> Loss:
        return make_lm_loss(CFG, Compute(), axes)

    state = sharded_state(_start(dtype), optimizer, layout, plan, random.key(1))
    return make_sharded_step(build, optimizer, layout, plan), state


def _go(step: Any, state: TrainState, steps: int, rows: int) -> tuple[Params, float]:
    loss = float("nan")
    for i in range(steps):
        state, metrics = step(state, _batch(i, rows))
        loss = float(metrics["train/loss"])
    return state.params, loss


def _start(dtype: torch.dtype) -> Params:
    return {k: p.to(dtype) for k, p in init_params(CFG, random.key(0)).items()}


def _batch(step: int, rows: int) -> Batch:
    where = torch.Generator().manual_seed(step)
    tokens = torch.randint(CFG.vocab_size, (rows, CFG.seq_len + 1), generator=where)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(rows, CFG.seq_len))


def _state_bytes(state: TrainState) -> int:
    return bytes_of(tree.flatten(state.opt_state).values())
