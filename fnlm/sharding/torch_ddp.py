"""PyTorch's own reducer behind the same step: DistributedDataParallel, as the yardstick for ours.

DDP listens where a module's parameters collect their gradients, which our step never lets happen. So it is given a
module that has the shapes and computes nothing, and each group's gradients are put into it as they come.

Annotations are evaluated here, as DDP looks at those of its hook.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fnlm.collectives import Dist, Wire
from fnlm.sharding.layout import Layout
from fnlm.sharding.strategy import MOST
from fnlm.sharding.wires import Counted
from fnlm.types import Params


class _Shapes(nn.Module):
    """Parameters whose values nobody reads."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.own = nn.ParameterList(nn.Parameter(p.detach()) for p in params.values())

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(p.view_as(p) for p in self.own)


def _process_group(wire: Wire) -> Any:
    while isinstance(wire, Counted):
        wire = wire.wire
    if not isinstance(wire, Dist):
        raise ValueError("strategy ddp is PyTorch's reducer and needs torch.distributed; here choose ddp_bucketed")
    return wire.group


def _counted(wire: Counted, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook; the wire writes it down."""
    flat = bucket.buffer()
    wire.note("all_reduce", flat)
    return allreduce_hook(_process_group(wire), bucket)


class TorchReducer:
    """DDP's buckets and hooks for parameters of these shapes; made once, for all steps."""

    def __init__(self, layout: Layout, params: Params) -> None:
        assert layout.copies is not None
        size = layout.strategy.bucket_bytes
        cap = (MOST if size == "auto" else size or 1) / (1 << 20)
        self.layout, self.names, self.shapes = layout, list(params), _Shapes(params)
        self.ddp = DistributedDataParallel(
            self.shapes,
            process_group=_process_group(layout.copies.wire),
            bucket_cap_mb=cap,
            gradient_as_bucket_view=True,
            init_sync=False,
        )
        wire = layout.copies.wire
        if isinstance(wire, Counted):
            self.ddp.register_comm_hook(wire, _counted)

    def link(self) -> "TorchLink":
        """The traffic of one step."""
        return TorchLink(self)


class TorchLink:
    """One step with DDP; as `fnlm.sharding.Link`."""

    def __init__(self, reducer: TorchReducer) -> None:
        self.reducer = reducer
        self.into: dict[str, Tensor] = {}
        self.last = True

    @contextmanager
    def forward(self, params: Params, last: bool = True) -> Iterator[None]:
        ddp, self.last = self.reducer.ddp, last
        if last:
            out = ddp()
        else:
            with ddp.no_sync():
                out = ddp()
        self.into = dict(zip(self.reducer.names, out, strict=True))
        yield

    def use(self, group: str, params: Params) -> Params:
        layout = self.reducer.layout
        names = [slot.name for slot in layout.groups[group].slots]
        used = dict(zip(names, params.values(), strict=True))
        own = {k: p for k, p in used.items() if k in layout.trained}
        if own:
            out: tuple[Tensor, ...] = _Shadow.apply(self, tuple(own), *own.values())  # type: ignore[no-untyped-call]
            used |= dict(zip(own, out, strict=True))
        made = layout.made(used) if layout.made else used
        return {k: made[name] for k, name in zip(params, names, strict=True) if name in made}

    def arrive(self, names: tuple[str, ...], grads: tuple[Tensor, ...]) -> None:
        """Let DDP see the gradients of some of a group, as if its module had computed them."""
        outs = [self.into.pop(name) for name in names]
        torch.autograd.backward(outs, [g.to(x.dtype).contiguous() for g, x in zip(grads, outs, strict=True)])

    def finish(self, grads: dict[str, Tensor | None]) -> Params:
        if not self.last:
            return {}
        axis, own = self.reducer.layout.copies, list(self.reducer.shapes.own)
        assert axis is not None
        found = [p.grad for p in own if p.grad is not None]
        torch._foreach_mul_(found, float(axis.size))  # DDP has divided by the number of ranks; ours are sums
        for p in own:
            p.grad = None
        return dict(zip(self.reducer.names, found, strict=True))


class _Shadow(torch.autograd.Function):
    """Parameters as they are; their gradients go to DDP."""

    @staticmethod
    def forward(ctx: Any, link: TorchLink, names: tuple[str, ...], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.link, ctx.names = link, names
        return tuple(p.view_as(p) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        with torch.enable_grad():
            ctx.link.arrive(ctx.names, grads)
        return None, None, *[None] * len(grads)
