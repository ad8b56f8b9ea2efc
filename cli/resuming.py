"""`--resume`: which checkpoint it means, the settings the run goes on with, and whether the data are the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click

from cli import ranks
from cli import settings as gather
from cli.carrying import carry_out
from cli.options import NAMES, Wish
from cli.training import check, described, fingerprint, job_of, say_to_stderr
from fnlm import data, loop
from fnlm.checkpoint import CheckpointError, describe
from fnlm.data import DataError, Dataset
from fnlm.loop import Settings
from fnlm.loop.folder import held


class Found(NamedTuple):
    """A checkpoint to go on from, the folder to go on in, and its config.json."""

    checkpoint: Path
    folder: Path
    config: dict[str, Any]
    chosen: bool = False  # by us, as the newest: where it is damaged the one before it will do


def to_resume(wish: Wish, default_out: Path) -> Found | None:
    """What `--resume` means, or None: a fresh run. Raises CheckpointError where a named PATH has nothing to resume."""
    if wish.resume is None:
        return None
    folder = wish.out or default_out if wish.resume == "auto" else Path(wish.resume)
    if wish.resume != "auto" and not folder.exists():
        raise CheckpointError(f"there is no {folder} to resume from")
    if (folder / "COMMITTED").is_file() or (folder / "MANIFEST.json").is_file():
        checkpoint, own = folder, folder.parent.parent
    else:
        # ranks read its bytes together, once they have met
        found = loop.resumable(folder, read=not ranks.is_rank())
        if found is None and wish.resume == "auto":
            return None
        if found is None:
            raise CheckpointError(f"{folder} has no whole checkpoint to resume from")
        checkpoint, own = found, folder
    return Found(checkpoint, wish.out or own, loop.read_config(checkpoint), chosen=own == folder)


def resumed(found: Found, wish: Wish) -> Settings:
    """The settings that the run had, with what is given now."""
    pairs, auto = gather.set_to_auto(wish.pairs, "batch_size")
    if auto:
        say_to_stderr(wish.quiet)("batch=auto is for a new run; this one goes on with the batch that it has")
    model, train, run, compute = loop.settings_of(found.config, found.checkpoint / "config.json")
    run = loop.for_world(run, wish.world, gather.given(pairs, "strategy"))
    settings = gather.applied((model, train, run, compute), pairs, NAMES)
    check(*settings[:2])
    loop.mesh_of(*settings[:3], wish.world, threads=wish.simulate is not None)
    return settings


def same_data(found: Found, dataset: Dataset) -> None:
    """Raises DataError where the data are not those that the run has been trained on."""
    before, now = found.config.get("data_sha256"), fingerprint(dataset)
    if before is not None and before != now:
        raise DataError(
            f"{dataset.folder} is not what {found.checkpoint} was trained on (its sha256 differs), so the run "
            "cannot go on as it was; start another one with --init-from"
        )


def further(found: Found, done: int) -> str:
    """The words that let a run that has finished go on, for half as long again."""
    return f"fnlm train --resume {found.folder} steps={done + max(1, done // 2)}"


def continued(found: Found, wish: Wish) -> int:
    """Go on with a run."""
    settings = resumed(found, wish)
    dataset = data.open(wish.data or found.config["data"])
    same_data(found, dataset)
    done, steps = int(describe(found.checkpoint)["step"]), settings[1].steps
    if done >= steps and ranks.is_lead():
        say_to_stderr(wish.quiet)(f"{found.folder} has done its {steps} steps; to go on: {further(found, done)}")
    kept = {key: found.config.get(key) for key in ("preset", "init_from")}
    kept |= {key: found.config[key] for key in ("interop",) if key in found.config}
    config = described(settings, dataset, **kept)
    if wish.dry_run:
        click.echo(json.dumps(config, indent=2))
        return 0
    more = {"resume": found.checkpoint, "partial": wish.partial, "or_older": found.chosen}
    with held(found.folder) if ranks.is_lead() else nullcontext():
        for name in ("checkpoints", "samples"):
            (found.folder / name).mkdir(exist_ok=True)
        return carry_out(job_of(settings, dataset, found.folder, config, **more), wish, say_to_stderr(wish.quiet))
