"""Reading an optimizer as data: which chains the in-place form runs as few calls, and how.

A plan says `p <- p + rate * (gain * direction(g / clip + l2 * p) + decay * p)`, with gain, decay and l2 per name,
`direction` by a rule that has `update_`, and `rate` the product of the schedules and values. What cannot be said so is
run as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from fnlm.optim.base import Chain, Partition
from fnlm.optim.clip import ClipByGlobalNorm
from fnlm.optim.decay import AddDecayedWeights
from fnlm.optim.ema import EmaParams
from fnlm.optim.muon import ScaleByMuon
from fnlm.optim.scale import Scale, ScaleByName, ScaleBySchedule, ScaleByValue
from fnlm.types import Params, Transform

Path: TypeAlias = tuple[str, ...]
Link: TypeAlias = tuple[Path, Transform]
Rates: TypeAlias = dict[Path, ScaleBySchedule | ScaleByValue]
Branch: TypeAlias = tuple[Link | None, list[Link], list[Link], tuple[str, ...]]
"""The branch as one link (None: it is the whole optimizer), its links, the links after it, its names."""


class Chunk(NamedTuple):
    """Parameters with equal coefficients, dtype and device (and shape, for muon), few enough to be cast together."""

    names: tuple[str, ...]
    gain: float
    decay: float
    l2: float


class Clip(NamedTuple):
    """A global norm over `names`; `path` leads to its state."""

    path: Path
    rule: ClipByGlobalNorm
    names: tuple[str, ...]


class Part(NamedTuple):
    """One core and what follows it. Without a core the direction is the gradient.

    `clip` is an index into the plan's clips; `rates` are the paths of the schedules and values that scale this part.
    A core whose rule has no `update_` is run as the pure function it is, on `names`.
    """

    names: tuple[str, ...]
    core: Link | None
    clip: int | None
    rates: tuple[Path, ...]
    chunks: tuple[Chunk, ...]


class Plan(NamedTuple):
    """The whole optimizer for given parameters."""

    clips: tuple[Clip, ...]
    rates: Rates
    parts: tuple[Part, ...]
    average: tuple[Path, EmaParams] | None


class _Terms(NamedTuple):
    """The coefficients of each name."""

    core: Link | None
    gain: dict[str, float]
    decay: dict[str, float]
    l2: dict[str, float]
    rates: Rates


def _flat(link: Transform, path: Path = ()) -> list[Link]:
    if isinstance(link.rule, Chain):
        return [inner for name, child in link.rule.links for inner in _flat(child, (*path, name))]
    return [(path, link)]


def _core_at(links: Sequence[Link]) -> int | None:
    return next((i for i, (_, link) in enumerate(links) if hasattr(link.rule, "update_")), None)


def _terms(links: Sequence[Link], names: Sequence[str], core_at: int | None) -> _Terms | None:
    """The coefficients of [decay*, core, (decay | scale)*, rate*], or None for another chain."""
    core = None if core_at is None else links[core_at]
    gain, decay, l2 = dict.fromkeys(names, 1.0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    rates: Rates = {}
    for _, link in links[: core_at or 0]:
        if not isinstance(link.rule, AddDecayedWeights):
            return None
        l2 = {k: l2[k] + link.rule.of(k) for k in names}
    for path, link in links[0 if core_at is None else core_at + 1 :]:
        rule = link.rule
        if isinstance(rule, (ScaleBySchedule, ScaleByValue)):
            rates[path] = rule
        elif isinstance(rule, (Scale, ScaleByName)):
            factor = {k: rule.factor if isinstance(rule, Scale) else rule.factor(k) for k in names}
            gain, decay = ({k: x[k] * factor[k] for k in names} for x in (gain, decay))
        elif isinstance(rule, AddDecayedWeights) and not rates:
            decay = {k: decay[k] + rule.of(k) for k in names}
        else:
            return None
    return _Terms(core, gain, decay, l2, rates)


def _chunks(terms: _Terms, names: Sequence[str], params: Params, limit: int) -> Iterator[Chunk]:
    groups: dict[object, list[str]] = {}
    for k in names:
        shape = params[k].shape if terms.core and isinstance(terms.core[1].rule, ScaleByMuon) else None
        key = (terms.gain[k], terms.decay[k], terms.l2[k], params[k].dtype, params[k].device, shape)
        groups.setdefault(key, []).append(k)
    for group in groups.values():
        first = group[0]
        for few in _at_most(limit, group, params):
            yield Chunk(few, terms.gain[first], terms.decay[first], terms.l2[first])


def _at_most(limit: int, names: Sequence[str], params: Params) -> Iterator[tuple[str, ...]]:
    few: list[str] = []
    size = 0
    for k in names:
        if few and size + params[k].numel() > limit:
            yield tuple(few)
            few, size = [], 0
        few.append(k)
        size += params[k].numel()
    if few:
        yield tuple(few)


def _branches(links: list[Link], params: Params) -> Iterator[Branch]:
    """One for each part of a leading partition, or one for all."""
    if not links or not isinstance(links[0][1].rule, Partition):
        yield None, links, [], tuple(params)
        return
    (path, head), *tail = links
    assert isinstance(head.rule, Partition)
    names = head.rule.split(params)
    for label, part in head.rule.parts:
        inner = (*path, label)
        yield (inner, part), _flat(part, inner), tail, tuple(names[label])


def _pop(links: list[Link], at: int, kind: type) -> Link | None:
    return links.pop(at) if links and isinstance(links[at][1].rule, kind) else None


def lower(optimizer: Transform, params: Params, limit: int) -> Plan:
    """The plan for these parameters; `limit` bounds the elements of a chunk of more than one parameter."""
    links = _flat(optimizer)
    clips: list[Clip] = []
    rates: Rates = {}
    parts: list[Part] = []

    def clip(link: Link | None, names: tuple[str, ...]) -> int | None:
        if link is None:
            return None
        assert isinstance(link[1].rule, ClipByGlobalNorm)
        clips.append(Clip(link[0], link[1].rule, names))
        return len(clips) - 1

    last = _pop(links, -1, EmaParams)
    outer = clip(_pop(links, 0, ClipByGlobalNorm), tuple(params))
    for whole, own, tail, names in _branches(links, params):
        first = _pop(own, 0, ClipByGlobalNorm) if outer is None else None
        terms = _terms([*own, *tail], names, _core_at(own))
        if terms is None and whole:
            first, terms = None, _terms([whole, *tail], names, 0)
        if terms is None:
            return _as_it_is(optimizer, params, limit)
        index = outer if first is None else clip(first, names)
        rates.update(terms.rates)
        parts.append(Part(names, terms.core, index, tuple(terms.rates), tuple(_chunks(terms, names, params, limit))))
    average = (last[0], last[1].rule) if last and isinstance(last[1].rule, EmaParams) else None
    return Plan(tuple(clips), rates, tuple(parts), average)


def _as_it_is(optimizer: Transform, params: Params, limit: int) -> Plan:
    names = tuple(params)
    terms = _terms([((), optimizer)], names, 0)
    assert terms is not None
    return Plan((), {}, (Part(names, terms.core, None, (), tuple(_chunks(terms, names, params, limit))),), None)
