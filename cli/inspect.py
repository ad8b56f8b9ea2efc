"""`fnlm inspect`: what a model is made of and what it costs; without a name, all presets."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any, get_args

import click
from click.shell_completion import CompletionItem

from cli.inspect_text import presets_text, text
from fnlm import FINETUNING, PRESETS, TRAINING, budget, flops_per_token, override, overrides, shapes
from fnlm.config import ModelConfig, Optimizer, Precision, TrainConfig, did_you_mean

OPTIONS = ("--json", "--all", "--batch", "--seq-len", "--precision", "--optimizer", "--strategy", "--mesh", "--rank")
PRESETS_OWN = "[default: the preset's]"


def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Presets and fields, for the shell."""
    names = [*PRESETS, *(f"{f.name}=" for f in fields(ModelConfig))]
    return [CompletionItem(name) for name in names if name.startswith(begun)]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[PRESET] [KEY=VALUE]...", shell_complete=complete)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, each tensor by itself.")
@click.option("--all", "every", is_flag=True, help="Each block's tensors by name, instead of one block for all.")
@click.option(
    "--batch", type=click.IntRange(1), metavar="N", help=f"Sequences in a micro-batch, for memory. {PRESETS_OWN}"
)
@click.option(
    "--seq-len",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens in a sequence, for memory and FLOPs. [default: the model's; seq_len=N changes the model]",
)
@click.option("--precision", type=click.Choice(get_args(Precision)), help=f"Of training. {PRESETS_OWN}")
@click.option("--optimizer", type=click.Choice(get_args(Optimizer)), help=f"Of training. {PRESETS_OWN}")
@click.option("--strategy", "how", metavar="NAME", help="Where each parameter lies under it, instead; with --mesh.")
@click.option("--mesh", metavar="AXIS=N,...", help="For example data=4,tensor=2.")
@click.option("--rank", type=click.IntRange(0), metavar="N", help="Whose part, with --strategy. [default: 0]")
def command(
    words: tuple[str, ...],
    as_json: bool,
    every: bool,
    batch: int | None,
    seq_len: int | None,
    precision: str | None,
    optimizer: str | None,
    how: str | None,
    mesh: str | None,
    rank: int | None,
) -> None:
    """Show a model's parameters, FLOPs and memory.

    PRESET is a name from the table that `fnlm inspect` prints by itself. KEY=VALUE, or --KEY VALUE, changes any field
    of the model's config, by our names or nanoGPT's (n_layer, n_head, n_embd, block_size, dropout):

        fnlm inspect gpt2 n_layers=6 --n_kv_heads 4
    """
    names, changes = overrides.split(words)
    if not names and not changes:
        show_presets(as_json)
        return
    name = preset_named(names, changes)
    cfg = overrides.apply(changes, ModelConfig, PRESETS[name], also=OPTIONS)
    if how is not None or mesh is not None or rank is not None:
        click.echo(placement(cfg, how, mesh, rank or 0, as_json))
        return
    if seq_len is not None and seq_len > cfg.seq_len:
        raise ValueError(f"--seq-len {seq_len} is more than the model's seq_len={cfg.seq_len}; add seq_len={seq_len}")
    train = TRAINING.get(name, TrainConfig(steps=1, batch_size=1))
    given = {"batch_size": batch, "precision": precision, "optimizer": optimizer}
    train = override(train, **{field: value for field, value in given.items() if value is not None})
    report = account(name, cfg, train, seq_len or cfg.seq_len)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(text(report, cfg, every)))


def placement(cfg: ModelConfig, how: str | None, mesh: str | None, rank: int, as_json: bool) -> str:
    """Where a rank holds each parameter. Raises ValueError for half of the question, and for a wrong mesh."""
    if how is None or mesh is None:
        raise ValueError("--strategy and --mesh go together; for example --strategy zero3 --mesh data=4")
    from fnlm.sharded import layout_of
    from fnlm.sharding import parse_mesh, planned

    layout = layout_of(cfg, how, planned(parse_mesh(mesh), rank))
    if not as_json:
        return str(layout)
    head = ("parameter", "shape", "spec", "here", "group", "bucket")
    rows = [dict(zip(head, row, strict=True)) for row in layout.rows()]
    return json.dumps(
        {"strategy": layout.strategy.name, "mesh": layout.mesh.shape, "rank": rank, "rows": rows}, indent=2
    )


def preset_named(names: list[str], changes: list[tuple[str, str | None]]) -> str:
    """The one preset among the words. Raises ValueError where there is none, an unknown one or several."""
    if not names:
        raise ValueError(f"{changes[0][0]} changes which model? name a preset first: {', '.join(PRESETS)}")
    if names[0] not in PRESETS:
        raise ValueError(f"there is no preset {names[0]!r}{did_you_mean(names[0], list(PRESETS))}")
    if len(names) > 1:
        raise ValueError(f"{names[1]!r} is one word too many; a change is written key=value, for example n_layers=6")
    return names[0]


def account(name: str, cfg: ModelConfig, train: TrainConfig, seq_len: int) -> dict[str, Any]:
    """Everything that is known about a model, fit for JSON. Bytes, FLOPs and tokens are whole numbers."""
    n, memory = budget.counts(cfg), budget.training_memory(cfg, train, seq_len)
    tensors = [{"name": k, "shape": list(s), "parameters": math.prod(s)} for k, s in shapes(cfg).items()]
    settings = {"training": TRAINING.get(name), "finetuning": FINETUNING.get(name)}
    return {
        "preset": name,
        "changed": {k: v for k, v in asdict(cfg).items() if v != getattr(PRESETS[name], k)},
        "config": asdict(cfg),
        "parameters": {
            **n._asdict(),
            "without_embeddings": n.without_embeddings,
            "without_norms": n.without_norms,
            "tensors": tensors,
        },
        "flops_per_token": {
            "seq_len": seq_len,
            "training": flops_per_token(cfg, seq_len),
            "inference": budget.inference_flops_per_token(cfg, seq_len),
        },
        "kv_cache_bytes": {
            "precision": "bf16",
            "per_token": budget.kv_cache_bytes(cfg),
            "full_context": budget.kv_cache_bytes(cfg, cfg.seq_len),
        },
        "inference_bytes": {p: budget.parameter_bytes(cfg, p) for p in ("fp32", "bf16")},
        "training_bytes": {
            "batch_size": train.batch_size,
            "seq_len": seq_len,
            "micro_batches": train.micro_batches,
            "precision": train.precision,
            "optimizer": train.optimizer,
            **memory._asdict(),
            "total": memory.total,
        },
        **{kind: None if s is None else settings_of(s, cfg) for kind, s in settings.items()},
    }


def settings_of(train: TrainConfig, cfg: ModelConfig) -> dict[str, Any]:
    """A preset's settings, with the tokens and FLOPs of the whole run."""
    totals = {"tokens": budget.training_tokens(cfg, train), "flops": budget.training_flops(cfg, train)}
    return asdict(train) | totals


def show_presets(as_json: bool) -> None:
    """One line for each preset."""
    known = [{"name": name, **summary(cfg)} for name, cfg in PRESETS.items()]
    click.echo(json.dumps({"presets": known}, indent=2) if as_json else "\n".join(presets_text(known)))


def summary(cfg: ModelConfig) -> dict[str, Any]:
    """A model in one line of a table."""
    sizes = {k: getattr(cfg, k) for k in ("n_layers", "n_heads", "d_model", "seq_len", "vocab_size")}
    return {"parameters": budget.counts(cfg).total, **sizes, "traits": traits(cfg)}


def traits(cfg: ModelConfig) -> list[str]:
    """How a model differs from GPT-2, a word each."""
    words = {
        cfg.positions: cfg.positions != "learned",
        cfg.norm: cfg.norm != "layernorm",
        cfg.mlp: not cfg.mlp.startswith("gelu"),
        "grouped": cfg.kv_heads < cfg.n_heads,
        "qk-norm": cfg.qk_norm,
        "untied": not cfg.tied,
        "ngrams": bool(cfg.ngrams),
        "biases": cfg.bias,
        "dropout": cfg.has_dropout,
        "mup": cfg.init == "mup",
        "window": cfg.window is not None,
        "parallel": cfg.parallel_residual,
    }
    return [word for word, true in words.items() if true]
