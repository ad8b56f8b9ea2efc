"""`fnlm doctor`: what this machine and installation can do, and what is wrong with them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from cli.examination import examination
from cli.tables import columns, heading, in_bytes

UNUSABLE = 3
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 11)
LITTLE_DISK = 2 << 30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@click.option("--dist", "ranks", is_flag=True, help="Under torchrun: do all ranks find each other, and who does not?")
@click.option("--mesh", metavar="AXIS=N,...", help="With --dist: each of its axes is tried. [default: data=ranks]")
@click.pass_context
def command(ctx: click.Context, as_json: bool, ranks: bool, mesh: str | None) -> None:
    """Check what this machine and installation can do.

    Takes a few seconds. The exit code is 3 if something essential fails: Python, torch, a package, a training step, or
    with --dist a rank that does not come.
    """
    if ranks:
        from cli.doctor_dist import meeting, meeting_text

        told = meeting(mesh)
        if told["rank"] == 0 or told["missing"]:
            click.echo(json.dumps(told) if as_json else "\n".join(meeting_text(told)))
        ctx.exit(UNUSABLE if told["missing"] else 0)
    found = examination()
    report = {"ok": not list(failures(found)), **found}
    report |= {"failures": list(failures(found)), "warnings": list(warnings(found))}
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(text(report)))
    ctx.exit(0 if report["ok"] else UNUSABLE)


def failures(report: dict[str, Any]) -> Iterator[str]:
    """What stops all work, with the remedy."""
    if sys.version_info < OLDEST_PYTHON:
        yield f"Python {report['versions']['python']} is too old; install 3.10 or later"
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(int(x) for x in re.findall(r"\d+", report["versions"]["torch"])[:2]) < OLDEST_TORCH:
        yield f"torch {report['versions']['torch']} is too old; install {oldest} or later"
    missing = [name for name, version in report["packages"].items() if version is None]
    if missing:
        yield f"not installed: {', '.join(missing)}; install fnlm with its dependencies again"
    for d in report["devices"]:
        if isinstance(d["gflops"]["fp32"], str):
            yield f"{d['device']} cannot multiply matrices: {d['gflops']['fp32']}"
        if d["training_step"] != "ok":
            yield f"{d['device']} cannot train: {d['training_step']}"


def warnings(report: dict[str, Any]) -> Iterator[str]:
    """What slows or limits work, with the remedy."""
    cores = report["threads"]
    most = min(cores["usable_cores"] or 1, cores["quota_cores"] or float("inf"))
    if cores["torch"] > most:
        yield f"torch uses {cores['torch']} threads on {most:g} cores; set OMP_NUM_THREADS={max(1, int(most))}"
    if report["disk"]["free_bytes"] < LITTLE_DISK:
        yield f"{in_bytes(report['disk']['free_bytes'])} free in {report['disk']['path']}; checkpoints need more"
    if not report["packages"]:
        yield "fnlm is not installed, only found in this folder: its packages were not checked"
    if not report["compiler"]["torch_compile"]["cpu"]:
        yield "torch.compile cannot work on the CPU: install a C++ compiler and Python's headers; all else works"
    if not report["compiler"]["native"]["works"]:
        yield f"the native decode step is not there: {report['compiler']['native']['says']}; texts are written by torch"
    for d in report["devices"]:
        gflops = d["gflops"]
        if isinstance(gflops["bf16"], str):
            yield f"{d['device']} cannot multiply in bf16: {gflops['bf16']}; train with precision=fp32"
        elif not isinstance(gflops["fp32"], str) and not d["bf16"]["fast"] and gflops["bf16"] < gflops["fp32"]:
            yield f"{d['device']}: bf16 is slower than fp32 here; train with precision=fp32"


def text(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    versions, cores, made = report["versions"], report["threads"], report["compiler"]
    quota = "" if cores["quota_cores"] is None else f", a quota of {cores['quota_cores']:g}"
    usable = ", ".join(k for k, yes in made["torch_compile"].items() if yes) or "no"
    cxx = made["cxx"] or "no C++ compiler"
    headers = "Python.h found" if made["python_headers"] else "no Python.h"
    triton = "triton" if made["triton"] else "no triton"
    rows = [(name, version) for name, version in versions.items()]
    rows += [("system", report["system"])]
    rows += [("threads", f"{cores['torch']} of torch, {cores['usable_cores']} cores{quota}")]
    rows += [("torch.compile", f"{usable}: {cxx}, {headers}, {triton}")]
    rows += [("native decode", made["native"]["says"])]
    rows += [("disk", f"{in_bytes(report['disk']['free_bytes'])} free in {report['disk']['path']}")]
    lines = columns(rows, left=(0, 1), indent="")
    for d in report["devices"]:
        lines += heading(d["device"]) + columns(list(_device_rows(d)), left=(0, 1))
    lines += heading("extras") + columns(
        [(e, _extra_text(found)) for e, found in report["extras"].items()], left=(0, 1)
    )
    found = [("failure", "red", line) for line in report["failures"]]
    found += [("warning", "yellow", line) for line in report["warnings"]]
    marks = [f"{click.style(kind + ':', fg=color, bold=True)} {line}" for kind, color, line in found]
    return [*lines, "", *marks] if marks else [*lines, "", "all is well"]


def _device_rows(d: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "name", d["name"]
    yield "memory", "unknown" if d["memory_bytes"] is None else in_bytes(d["memory_bytes"])
    yield "bf16", f"{'fast' if d['bf16']['fast'] else 'not fast'}: {d['bf16']['why']}"
    for precision, gflops in d["gflops"].items():
        yield f"{precision} product", gflops if isinstance(gflops, str) else f"{gflops:,.0f} GFLOP/s"
    yield "training step", d["training_step"]


def _extra_text(found: dict[str, str | None]) -> str:
    missing = [name for name, version in found.items() if version is None]
    return f"not installed: {', '.join(missing)}" if missing else "installed"
