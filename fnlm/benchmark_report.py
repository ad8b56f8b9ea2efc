"""What the step benchmark's timings mean: shapes and their FLOPs, ratios, the check of equal work, the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

CHECKED_STEP = 4

Report = dict[str, Any]
Turn = dict[str, list[float]]


class Shape(NamedTuple):
    """A model and batch to time, and how often: `rounds` turns of `steps` recorded steps each."""

    n_layers: int
    n_heads: int
    d_model: int
    seq_len: int
    batch_size: int
    vocab_size: int
    rounds: int
    steps: int

    def sizes(self) -> dict[str, int]:
        """The fields that make up the job, without the schedule."""
        return {k: v for k, v in self._asdict().items() if k not in ("rounds", "steps")}


def model_flops(shape: Shape) -> float:
    """FLOPs of one step, without rematerialisation.

    6 per matrix weight and token, and 6 T D per layer and token for attention: PaLM (2022, App. B), there halved as
    the causal mask leaves half of the products.
    """
    weights = 12 * shape.n_layers * shape.d_model**2 + shape.vocab_size * shape.d_model
    attention = shape.n_layers * shape.seq_len * shape.d_model
    return 6.0 * shape.batch_size * shape.seq_len * (weights + attention)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def speed_ratios(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times as fast as the other: per round the ratio of the two medians; then their spread."""
    return spread([median(theirs) / median(mine) for mine, theirs in zip(own, other, strict=True)])


def unequal_work(results: dict[str, Report], device: str = "cpu") -> list[str]:
    """What differs from the first fp32 contestant (or the first of all) after the same four steps; empty if nothing.

    Two fp32 contestants on a CPU must agree within 1e-5 in the loss and 1e-6 (relative) in the norms of the weights,
    any other pair within 5e-3 and 5e-5: TF32 and bf16 round to 10 and 7 bits. The norms see what the loss of step four
    does not: four steps of the weight decay are 2.4e-4.
    """
    exact = [name for name, r in results.items() if r["precision"] == "fp32"]
    reference = (exact or list(results))[0]
    problems = []
    for name, r in results.items():
        close = device == "cpu" and r["precision"] == results[reference]["precision"] == "fp32"
        for what, tolerance, scale in (
            ("loss", 1e-5 if close else 5e-3, 1.0),
            ("matrix_norm", 1e-6 if close else 5e-5, results[reference]["matrix_norm"]),
            ("vector_norm", 1e-6 if close else 5e-5, results[reference]["vector_norm"]),
        ):
            gap = abs(r[what] - results[reference][what]) / scale
            if not gap <= tolerance:  # also when it is not a number
                values = f"{r[what]:.6f} is not {results[reference][what]:.6f} of {reference}"
                problems.append(f"{name}: {what} {values} within {tolerance:g} after step {CHECKED_STEP}")
    return problems


def add_speed(result: Report, turns: list[Turn], shape: Shape, gflops: float | None) -> None:
    """Add the step's time, throughput and model FLOPs utilisation; `gflops` is the measured peak."""
    step_s = median(s for turn in turns for s in turn["seconds"])
    mfu = None if gflops is None else model_flops(shape) / step_s / (gflops * 1e9)
    result["step_ms"] = 1e3 * step_s
    result["step_ms_by_round"] = [1e3 * median(turn["seconds"]) for turn in turns]
    result["cpu_ms"] = 1e3 * median(s for turn in turns for s in turn["cpu"])
    result["tokens_per_s"] = shape.batch_size * shape.seq_len / step_s
    # a step cannot beat the machine: above 1 the probe has not found the peak, so none is known
    result["mfu"] = mfu if mfu is not None and mfu <= 1 else None


def compare(results: dict[str, Report], turns: dict[str, list[Turn]], yardsticks: Iterable[str]) -> None:
    """Add to each result how it stands against each yardstick: speed as a factor, the rest as a fraction of theirs."""
    for name, result in results.items():
        result["against"] = {}
        for other in yardsticks:
            base = results[other]
            sides = ([turn["seconds"] for turn in turns[n]] for n in (name, other))
            known = result["peak_mb"] is not None and base["peak_mb"] is not None
            result["against"][other] = {
                "speed": speed_ratios(*sides),
                "peak_memory": result["peak_mb"] / base["peak_mb"] if known else None,
                "first_step": result["first_step_s"] / base["first_step_s"],
                "first_loss": result["first_loss_s"] / base["first_loss_s"],
            }


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _row(name: str, r: Report, yardsticks: Sequence[str]) -> list[str]:
    cells = [name, r["precision"], _cell(r["step_ms"], ".1f"), _cell(r["tokens_per_s"], ".0f")]
    for other in yardsticks:
        s = r["against"][other]["speed"]
        cells.append(f"{s['median']:.2f}x ({s['min']:.2f}-{s['max']:.2f})")
    cells += [_cell(r["first_step_s"], ".2f"), _cell(r["first_loss_s"], ".2f"), _cell(r["peak_mb"], ".0f")]
    cells += [_cell(r["against"][other]["peak_memory"], ".2f") for other in yardsticks]
    return [*cells, _cell(r["life_mb"], ".0f"), _cell(r["loss"], ".5f"), _cell(r["mfu"], ".0%")]


def table(report: Report) -> str:
    """The report as aligned text: speed against each yardstick as median (smallest-largest round)."""
    m, v = report["machine"], report["versions"]
    lines = [f"{report['date']}  {v.get('gpu', m['cpu'])}, {m['threads']} of {m['cores']} cores, torch {v['torch']}"]
    for name, part in report["shapes"].items():
        yardsticks = list(next(iter(part["contestants"].values()))["against"])
        head = ["contestant", "precision", "step ms", "tok/s", *(f"speed / {y}" for y in yardsticks), "first step s"]
        head += ["start to loss s", "peak MB", *(f"peak / {y}" for y in yardsticks), "whole life MB"]
        rows = [[*head, f"loss {CHECKED_STEP}", "MFU"]]
        rows += [_row(who, r, yardsticks) for who, r in part["contestants"].items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", f"{name}: {part['model_gflop']:.1f} GFLOP a step"]
        for row in rows:
            texts, numbers = zip(row[:2], widths[:2], strict=True), zip(row[2:], widths[2:], strict=True)
            lines.append("  ".join([*(c.ljust(w) for c, w in texts), *(c.rjust(w) for c, w in numbers)]))
        if (part["others_cores"] or 0) > 0.1:
            lines.append(
                f"others kept {part['others_cores']:.1f} cores busy meanwhile: time it again on a quiet machine"
            )
        lines += [f"UNEQUAL WORK, these figures mean nothing: {problem}" for problem in part["unequal_work"]]
    return "\n".join(lines)
