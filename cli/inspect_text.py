"""What `fnlm inspect` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import click

from cli.tables import columns, heading, in_bytes, in_si, wrapped
from fnlm.config import ModelConfig

Report = dict[str, Any]
Row = tuple[str, str, str]

# The fields that the two summary lines say in words; of the others, those that are not at their defaults are shown.
_IN_WORDS = {"n_kv_heads", "d_head", "d_ff", "norm", "mlp", "positions", "tied", "bias", "init"}


def text(report: Report, cfg: ModelConfig, every: bool) -> list[str]:
    """The report of one model; `every`: each block by itself."""
    return [
        *_architecture(report, cfg),
        *heading("parameters"),
        *columns(_parameters(report["parameters"], every)),
        *_flops(report["flops_per_token"]),
        *_inference(report),
        *_training_memory(report["training_bytes"]),
        *(line for kind in ("training", "finetuning") for line in _settings(kind, report[kind])),
    ]


def presets_text(known: Sequence[Report]) -> list[str]:
    """One line for each preset, under a head."""
    head = ("preset", "parameters", "layers", "heads", "width", "context", "vocabulary", "traits")
    sizes = ("n_layers", "n_heads", "d_model", "seq_len", "vocab_size")
    rows = [(p["name"], in_si(p["parameters"]), *(f"{p[k]:,}" for k in sizes), " ".join(p["traits"])) for p in known]
    first, *others = columns([head, *rows], left=(0, 7), indent="")
    return [click.style(first, bold=True), *others]


def _architecture(report: Report, cfg: ModelConfig) -> list[str]:
    changed = " ".join(f"{k}={v}" for k, v in report["changed"].items())
    heads = f"{cfg.n_heads} heads of {cfg.head_dim}"
    heads += "" if cfg.kv_heads == cfg.n_heads else f" sharing {cfg.kv_heads} of keys and values"
    shape = [f"{cfg.n_layers} layers", f"width {cfg.d_model}", heads, f"{cfg.mlp} MLP of {cfg.ff_dim}"]
    shape += [f"context {cfg.seq_len:,}", f"vocabulary {cfg.vocab_size:,}"]
    kind = [cfg.norm, f"{cfg.positions} positions", "tied head" if cfg.tied else "untied head"]
    kind += ["biases" if cfg.bias else "no biases", f"{cfg.init} init"]
    rest = {f.name: f.default for f in fields(cfg) if f.default is not MISSING and f.name not in _IN_WORDS}
    kind += [f"{k}={v}" for k, v in asdict(cfg).items() if k in rest and v != rest[k]]
    title = click.style(report["preset"], bold=True) + (f" with {changed}" if changed else "")
    return [title, *wrapped(shape), *wrapped(kind)]


def _parameters(known: Report, every: bool) -> list[Row]:
    tensors = known["tensors"]
    blocks = [t for t in tensors if t["name"].startswith("blocks.")]
    first = [t for t in blocks if t["name"].startswith("blocks.0.")]
    rows = []
    for t in tensors:
        if every or t not in blocks:
            rows.append(_tensor(t, t["name"]))
        elif t == first[0]:
            n, each = len(blocks) // len(first), sum(t["parameters"] for t in first)
            rows.append((f"blocks.{{0..{n - 1}}}", f"{n} of {each:,}", f"{n * each:,}"))
            rows += [_tensor(t, "  " + t["name"].removeprefix("blocks.0")) for t in first]
    totals = {"total": "total", "without_embeddings": "without embeddings", "without_norms": "without norms"}
    totals |= {"hidden": "matrices of the blocks"}
    return [*rows, ("", "", ""), *((words, "", f"{known[what]:,}") for what, words in totals.items())]


def _tensor(tensor: Report, name: str) -> Row:
    return name, " x ".join(map(str, tensor["shape"])), f"{tensor['parameters']:,}"


def _flops(flops: Report) -> list[str]:
    rows = [
        ("training", in_si(flops["training"]), f"forward and backward, at {flops['seq_len']:,} tokens"),
        ("inference", in_si(flops["inference"]), "forward"),
    ]
    return [*heading("FLOPs per token"), *columns(rows, left=(0, 2))]


def _inference(report: Report) -> list[str]:
    cache = report["kv_cache_bytes"]
    rows = [(f"parameters, {precision}", in_bytes(n), "") for precision, n in report["inference_bytes"].items()]
    rows += [
        (f"KV cache, {cache['precision']}", in_bytes(cache["per_token"]), "a token"),
        ("", in_bytes(cache["full_context"]), f"a full context of {report['config']['seq_len']:,}"),
    ]
    return [*heading("memory for inference"), *columns(rows, left=(0, 2))]


def _training_memory(memory: Report) -> list[str]:
    notes = {
        "parameters": "fp32",
        "optimizer_state": memory["optimizer"],
        "low_precision_copy": memory["precision"] if memory["low_precision_copy"] else "not needed",
        "gradients": _gradients(memory),
        "activations": "estimate",
        "total": "",
    }
    rows = [(part.replace("_", " "), in_bytes(memory[part]), note) for part, note in notes.items()]
    size = f"{memory['batch_size']} x {memory['seq_len']:,} tokens"
    pieces = f", {memory['micro_batches']} micro-batches" if memory["micro_batches"] > 1 else ""
    return [
        *heading(f"memory for training, {size}{pieces}, {memory['precision']}, {memory['optimizer']}"),
        *columns(rows, left=(0, 2)),
        "  not in it: torch itself (0.2 GiB on a CPU), temporaries, the allocator's slack",
    ]


def _gradients(memory: Report) -> str:
    if memory["micro_batches"] > 1:
        return f"{memory['precision']} of one micro-batch, fp32 sums"
    return "fp16, and fp32 once unscaled" if memory["precision"] == "fp16" else memory["precision"]


def _settings(kind: str, settings: Report | None) -> list[str]:
    if settings is None:
        return [*heading(kind), "  the preset has no settings for it"]
    muon = settings["optimizer"] == "muon"
    shown = {k: v for k, v in settings.items() if v not in (None, ()) and (muon or not k.startswith("muon"))}
    totals = f"{in_si(shown.pop('tokens'))} tokens, {in_si(shown.pop('flops'))} FLOPs"
    return [*heading(f"{kind}: {totals}"), *wrapped([f"{k}={v}" for k, v in shown.items()], joint=" ")]
