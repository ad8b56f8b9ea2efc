"""Sharding: a strategy is how parameters at rest become parameters in use; its transpose is how gradients come home.

It knows no model: shapes, groups and rules are given as data. `fnlm.sharded` joins it with the model and the step.
"""

from fnlm.sharding.layout import Layout, Pack, Slot
from fnlm.sharding.link import Link
from fnlm.sharding.mesh import Mesh, connect, parse_mesh, planned, single
from fnlm.sharding.ranks import Ranks, positions_of, rows_of
from fnlm.sharding.reductions import check_copies, everywhere, global_norm, largest, total
from fnlm.sharding.simulate import simulate
from fnlm.sharding.specs import P, Rules, local_shape, part, slices, span, spec_of
from fnlm.sharding.strategy import ALIASES, STRATEGIES, Strategy, mesh_for, strategy
from fnlm.sharding.whole import by_axis, gather_whole, scatter_whole, shard, specs_of, unshard
from fnlm.sharding.wires import Abandoned, Book, Call, Counted, Nobody, Threads

__all__ = [
    "Layout",
    "Pack",
    "Slot",
    "Link",
    "Mesh",
    "connect",
    "parse_mesh",
    "planned",
    "single",
    "Ranks",
    "positions_of",
    "rows_of",
    "check_copies",
    "everywhere",
    "global_norm",
    "largest",
    "total",
    "simulate",
    "P",
    "Rules",
    "local_shape",
    "part",
    "slices",
    "span",
    "spec_of",
    "ALIASES",
    "STRATEGIES",
    "Strategy",
    "mesh_for",
    "strategy",
    "by_axis",
    "gather_whole",
    "scatter_whole",
    "shard",
    "specs_of",
    "unshard",
    "Abandoned",
    "Book",
    "Call",
    "Counted",
    "Nobody",
    "Threads",
]
