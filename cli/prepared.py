"""What `fnlm prepare` prints of a folder: what there is, what cleaning did, its first documents token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from cli.tables import columns, in_si
from fnlm.data import Dataset, Split


def summary(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What there is, a line for each split."""
    rows = [["split", "tokens", "documents", "text", "bytes a token"]]
    for name, split in manifest["splits"].items():
        per = split["bytes"] / max(1, split["tokens"])
        counts = [f"{split[what]:,}" for what in ("tokens", "documents")]
        size = in_si(split["bytes"]) + ("B" if split["bytes"] >= 1000 else " B")
        rows.append([name, *counts, size, f"{per:.2f}"])
        if split["mask"]:
            rows[-1].append(f"{100 * split['learnt'] / split['tokens']:.0f} %")
    if len(rows[-1]) > len(rows[0]):
        rows[0].append("learnt")
    kind, size = manifest["tokenizer"]["kind"], manifest["vocab_size"]
    head = f"{folder}: {manifest['kind']}, {kind} tokenizer of {size:,} tokens, {manifest['dtype']}"
    return [head, *columns(rows), *cleaned(manifest), *mixed(manifest)]


def cleaned(manifest: dict[str, Any]) -> list[str]:
    """A line for each step of cleaning: how many documents it saw, removed and why, and changed."""
    lines = []
    for split, steps in manifest.get("cleaned", {}).items():
        for name, count in steps.items():
            line = f"{split}: {name} saw {count['seen']:,} documents"
            if count.get("removed"):
                why = sorted(count["reasons"].items(), key=lambda item: -item[1])
                line += f", removed {count['removed']:,} ({', '.join(f'{reason} {n:,}' for reason, n in why)})"
            if count.get("changed"):
                line += f", masked {count['masked']:,} places in {count['changed']:,}"
            lines.append(line)
    return lines


def mixed(manifest: dict[str, Any]) -> list[str]:
    """A line for each part of a mixture: its tokens, and their share."""
    parts = [(split, part) for split, parts in manifest.get("mixture", {}).items() for part in parts]
    return [
        f"{split}: {p['tokens']:,} tokens ({100 * p['share']:.2f} %) from {p['path']}, {p['epochs']:.3g} times"
        for split, p in parts
    ]


def shown(dataset: Dataset, n: int) -> list[str]:
    """The first n documents, token by token between bars; of a chat, learnt tokens in brackets (and green)."""
    lines = []
    for number, (ids, mask) in enumerate(documents(dataset.train, dataset.tokenizer.eot_id, n), 1):
        lines += ["", click.style(f"document {number}: {len(ids)} tokens, {int(mask.sum())} learnt", bold=True)]
        words = [repr(dataset.tokenizer.decode([i]))[1:-1] for i in ids.tolist()]
        lines.append("|".join(marked(w) if m else w for w, m in zip(words, mask.tolist(), strict=True)))
    return lines


def marked(word: str) -> str:
    """A learnt token."""
    return click.style(f"[{word}]", fg="green")


def documents(split: Split, eot_id: int | None, n: int, most: int = 2000) -> Iterator[tuple[Any, Any]]:
    """Ids and mask (ones for text) of the first documents, at most `most` tokens of each."""
    start = 0
    while n and start < len(split.tokens):
        window = np.asarray(split.tokens[start : start + (1 << 20)])
        ends = np.flatnonzero(window == eot_id) if eot_id is not None else np.zeros(0, int)
        stop = int(ends[0]) + 1 if ends.size else len(window)
        ids = window[:stop][:most]
        yield ids, np.ones_like(ids) if split.mask is None else np.asarray(split.mask[start : start + len(ids)])
        start, n = start + stop, n - 1
