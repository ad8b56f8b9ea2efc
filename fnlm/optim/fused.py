"""The donated form of any optimizer: parameters and moments are overwritten, gradients are used up.

The plan (see `fnlm.optim.lower`) is made once for given names, shapes and dtypes. A step then makes few calls on lists
of tensors; AdamW is one kernel, with the clip inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fnlm import clib
from fnlm.optim.adam import AdamState, ScaleByAdam
from fnlm.optim.clip import ClipState, global_norm
from fnlm.optim.lower import Chunk, Clip, Link, Part, Path, Plan, lower
from fnlm.optim.scale import ScaleBySchedule
from fnlm.tree import size
from fnlm.types import Params, Transform, Tree

SLICE = 4 << 20  # elements of one tensor whose gradient is converted at a time
InPlace: TypeAlias = Callable[..., Tree]
"""(grads, state, params, judge=None) -> state; all three are donated."""
Judge: TypeAlias = Callable[[Tensor, Params], bool]
"""(global norm of the gradients, gradients) -> whether they are applied."""


def in_place(optimizer: Transform, chunk: int = 8 << 20, norm: Callable[[Params], Tensor] = global_norm) -> InPlace:
    """The optimizer as `update(grads, state, params) -> state` on donated arguments.

    Equal to `optimizer.update` followed by `apply_updates`, up to rounding.

    Parameters are updated in place; the moments of the given state are overwritten and live on in the returned one; the
    gradients are overwritten and `grads` is emptied. Gradients may have a lower precision than the parameters: they are
    converted at most `chunk` elements (or one tensor) at a time. `judge` sees them and their global norm before
    anything is changed (`norm` computes it where no link does); where it says False, parameters and state stay as they
    are and None is returned. Raises ValueError if grads and params differ in names.
    """
    plans: dict[object, tuple[Plan, bool]] = {}

    @torch.no_grad()
    def update(grads: Params, state: Tree, params: Params, judge: Judge | None = None) -> Tree:
        if grads.keys() != params.keys():
            odd = sorted(grads.keys() ^ params.keys())
            raise ValueError(f"{len(odd)} names have no gradient or no parameter, first {odd[0]!r}; give both for each")
        key = tuple([(name, p.shape, p.dtype, p.device) for name, p in params.items()])
        if key not in plans:
            plans[key] = lower(optimizer, params, chunk), size(params) <= chunk
        plan, small = plans[key]
        if small and clib.library("adam").library is None:  # torch's norm is faster over float32, the copy small
            grads.update({k: _cast(g, params[k].dtype) for k, g in grads.items()})
        return _run(plan, grads, state, params, judge, norm)

    return update


def _run(
    plan: Plan,
    grads: Params,
    state: Tree,
    params: Params,
    judge: Judge | None,
    norm_of_all: Callable[[Params], Tensor] = global_norm,
) -> Tree:
    after: dict[Path, Tree] = {}
    norms = [_norm(clip, grads).to(_at(state, clip.path).norm.dtype) for clip in plan.clips]
    if judge is not None and not judge(_whole_norm(plan, norms, grads, norm_of_all), grads):
        return None
    divisors = []
    for clip, norm in zip(plan.clips, norms, strict=True):
        after[clip.path] = ClipState(norm)
        divisors.append(clip.rule.divisor(norm))
    rates = {path: _rate(rule, _at(state, path)) for path, rule in plan.rates.items()}
    after.update({path: _advanced(_at(state, path)) for path in plan.rates})
    for part in plan.parts:
        rate = 1.0
        for path in part.rates:
            rate *= rates[path]
        divisor = None if part.clip is None else divisors[part.clip]
        link = _run_part(part, grads, state, params, rate, divisor)
        if part.core:
            after[part.core[0]] = link
    if plan.average:
        after[plan.average[0]] = _average(*plan.average, state, params, plan.parts)
    for path, value in after.items():
        state = _put(state, path, value)
    return state


def _whole_norm(plan: Plan, norms: list[Tensor], grads: Params, norm_of_all: Callable[[Params], Tensor]) -> Tensor:
    """That of a clip over everything, or computed for the judge alone."""
    whole = [norm for clip, norm in zip(plan.clips, norms, strict=True) if len(clip.names) == len(grads)]
    if whole:
        return whole[0]
    return _norm_of(list(grads.values())) if norm_of_all is global_norm else norm_of_all(grads)


def _norm(clip: Clip, grads: Params) -> Tensor:
    if clip.rule.norm is not global_norm or not clip.names:
        return clip.rule.norm({k: grads[k] for k in clip.names})
    return _norm_of([grads[k] for k in clip.names])


def _norm_of(whole: list[Tensor]) -> Tensor:
    squares = clib.square_sum(whole)
    if squares is not None:
        return torch.tensor(squares**0.5)
    # in slices, as the norm of a bfloat16 tensor makes a float32 copy of it
    mine = [x for g in whole for x in (g.reshape(-1).split(SLICE) if g.numel() > SLICE else (g,))]
    norms = torch._foreach_norm(mine, 2, torch.promote_types(mine[0].dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _rate(rule: Any, state: Tree) -> float:
    # the count is on the CPU: no device is waited for
    return -float(rule.schedule(int(state.count)) if isinstance(rule, ScaleBySchedule) else state.value)


def _run_part(part: Part, grads: Params, state: Tree, params: Params, rate: float, divisor: Tensor | None) -> Tree:
    """Update the parameters of a part; returns the state of its core."""
    own: Any = _at(state, part.core[0]) if part.core else ()
    if part.core and not hasattr(part.core[1].rule, "update_"):
        return _run_pure(part, part.core, grads, own, params, rate, divisor)
    rule = part.core[1].rule if part.core else None
    for chunk in part.chunks:
        _run_chunk(rule, chunk, grads, own, params, rate, divisor)
    return _advanced(own)


def _run_chunk(
    rule: Any, chunk: Chunk, grads: Params, own: Any, params: Params, rate: float, divisor: Tensor | None
) -> None:
    ps = [params[k] for k in chunk.names]
    gs = [grads.pop(k) for k in chunk.names]
    if isinstance(rule, ScaleByAdam) and _has_kernel(chunk, own, ps[0]):
        mus, nus = [own.mu[k] for k in chunk.names], [own.nu[k] for k in chunk.names]
        if _adamw_by_library(rule, chunk, int(own.count) + 1, (ps, gs, mus, nus), rate, divisor):
            return
        for piece in _pieces(ps, gs, mus, nus):
            _adamw_(rule, chunk, int(own.count) + 1, piece, rate, divisor)
        return
    gs = [_cast(g, ps[0].dtype) for g in gs]
    _prepare_(gs, ps, chunk, divisor)
    us = rule.update_(chunk.names, gs, own) if rule else gs
    _add_(ps, us, rate * chunk.gain, rate * chunk.decay)


def _cast(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g if g.dtype == dtype else g.to(dtype)


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    # the kernel walks memory: it would silently mix up the elements of a transposed gradient
    return g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g)


def _run_pure(
    part: Part, core: Link, grads: Params, own: Tree, params: Params, rate: float, divisor: Tensor | None
) -> Tree:
    mine = {k: params[k] for k in part.names}
    gs = {k: _cast(grads.pop(k), p.dtype) for k, p in mine.items()}
    if divisor is not None and gs:
        torch._foreach_div_(list(gs.values()), divisor)
    updates, own = core[1].update(gs, own, mine)
    for chunk in part.chunks:
        us = [updates.pop(k) for k in chunk.names]
        _add_([params[k] for k in chunk.names], us, rate * chunk.gain, rate * chunk.decay)
    return own


def _has_kernel(chunk: Chunk, own: AdamState, p: Tensor) -> bool:
    narrow = own.mu[chunk.names[0]].dtype.itemsize < 4  # widened for the kernel, which wants one dtype
    return (narrow or own.mu[chunk.names[0]].dtype == p.dtype) and p.device.type in ("cpu", "cuda")


def _pieces(*columns: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Parameters, gradients and moments; one large tensor a slice at a time, to keep its float32 gradient small."""
    first, n = columns[0][0], columns[0][0].numel()
    if len(columns[0]) > 1 or n <= SLICE or not all(x.is_contiguous() for (x,) in columns):
        yield columns
        return
    for i in range(0, first.numel(), SLICE):
        yield tuple([x.view(-1)[i : i + SLICE]] for (x,) in columns)


def _adamw_by_library(
    rule: ScaleByAdam, chunk: Chunk, count: int, lists: tuple[list[Tensor], ...], rate: float, divisor: Tensor | None
) -> bool:
    """Whether it was done: not where an l2 term comes before the moments, or nothing but decay is wanted."""
    ps, gs, mus, nus = lists
    if chunk.l2 or not chunk.gain:
        return False
    gs = [_laid_out(g, p) for g, p in zip(gs, ps, strict=True)]
    return clib.adamw_(
        ps, gs, mus, nus, rate=-rate * chunk.gain, b1=rule.b1, b2=rule.b2, eps=rule.eps,
        decay=chunk.decay / chunk.gain, count=count, divisor=1.0 if divisor is None else float(divisor),
    )  # fmt: skip


def _adamw_(
    rule: ScaleByAdam,
    chunk: Chunk,
    count: int,
    piece: tuple[list[Tensor], ...],
    rate: float,
    divisor: Tensor | None,
) -> None:
    ps, gs, *stored = piece
    gs = [_cast(_laid_out(g, p), p.dtype) for g, p in zip(gs, ps, strict=True)]
    mus, nus = ([_cast(m, ps[0].dtype) for m in moment] for moment in stored)
    if chunk.l2 or ps[0].dtype != torch.float32:  # the kernel reads the divisor as float32 and before any l2
        _prepare_(gs, ps, chunk, divisor)
        divisor = None
    decay = chunk.decay / chunk.gain if chunk.gain else 0.0
    if chunk.decay and not chunk.gain:
        torch._foreach_mul_(ps, 1 + rate * chunk.decay)
    step = torch.full((), float(count), device=ps[0].device)
    torch._fused_adamw_(
        ps, gs, mus, nus, [], [step] * len(ps),
        lr=-rate * chunk.gain, beta1=rule.b1, beta2=rule.b2, weight_decay=decay, eps=rule.eps,
        amsgrad=False, maximize=False, grad_scale=divisor,
        found_inf=None if divisor is None else torch.zeros_like(divisor),
    )  # fmt: skip
    if mus[0].dtype != stored[0][0].dtype:
        torch._foreach_copy_(stored[0], mus)
        torch._foreach_copy_(stored[1], nus)


def _prepare_(gs: list[Tensor], ps: list[Tensor], chunk: Chunk, divisor: Tensor | None) -> None:
    if divisor is not None:
        torch._foreach_div_(gs, divisor)
    if chunk.l2:
        torch._foreach_add_(gs, ps, alpha=chunk.l2)


def _add_(ps: list[Tensor], us: list[Tensor], gain: float, decay: float) -> None:
    if decay:
        torch._foreach_mul_(ps, 1 + decay)
    torch._foreach_add_(ps, us, alpha=gain)


def _average(path: Path, rule: Any, state: Tree, params: Params, parts: tuple[Part, ...]) -> Tree:
    own = _at(state, path)
    weight = float(rule.weight(own.count))
    for chunk in (chunk for part in parts for chunk in part.chunks):
        averages = [own.average[k] for k in chunk.names]
        new = [params[k].to(a.dtype) for k, a in zip(chunk.names, averages, strict=True)]
        torch._foreach_lerp_(averages, new, weight)
    return _advanced(own)


def _advanced(own: Tree) -> Tree:
    # a fresh count, not count += 1: whoever kept the last state's count for a log still reads what it was
    return own._replace(count=own.count + 1) if "count" in getattr(own, "_fields", ()) else own


def _at(state: Tree, path: Path) -> Any:
    for name in path:
        state = state[name]
    return state


def _put(state: Tree, path: Path, value: Tree) -> Tree:
    return {**state, path[0]: _put(state[path[0]], path[1:], value)} if path else value
