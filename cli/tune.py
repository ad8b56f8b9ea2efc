"""`fnlm tune`: a learning rate and a number of steps, found by training a few and going on with the better ones."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cli import settings as gather
from cli.finetune import settings_for
from cli.options import Options, Wish, wished
from cli.tables import columns
from cli.training import described, fingerprint, fresh, initial, job_of, open_data, say_to_stderr, with_new_tokens
from fnlm import PRESETS, TRAINING, data, interop, loop, trained
from fnlm.config import Compute, TrainConfig
from fnlm.data import Dataset
from fnlm.loop import Outcome, RunConfig, Settings, folder
from fnlm.loop.halving import LEDGER, Candidate, Ledger, Result, cost, rounds, search
from fnlm.machine import tune_cpu
from fnlm.track import Many, Progress
from fnlm.trained import Trained

FACTORS = (1 / 3, 1.0, 3.0, 10.0)  # of the usual rate, where none are given


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODEL [FOLDER] [KEY=VALUE]...")
@click.option("--lrs", metavar="LR,...", help="Learning rates. [default: the usual one times 1/3, 1, 3 and 10]")
@click.option("--lengths", metavar="STEPS,...", help="Numbers of steps, each with each rate. [default: steps=]")
@click.option("--budget", type=click.IntRange(1), metavar="STEPS", help="Of all candidates together: sets the steps.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FOLDER", help="Prepared data.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="[default: runs/NAME-tune]")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="TOML or YAML.")
@click.option("--resume", is_flag=True, help="Go on with the search in --out, where there is one.")
@click.option("--force", is_flag=True, help="Replace the search that is in the folder.")
@click.option("--keep-all", is_flag=True, help="Keep the checkpoints of those that do not go on.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.option("--json", "as_json", is_flag=True, help="What was found, as JSON.")
def command(
    words: tuple[str, ...],
    lrs: str | None,
    lengths: str | None,
    budget: int | None,
    resume: bool,
    keep_all: bool,
    **rest: Any,
) -> int:
    """Find a learning rate and a number of steps.

    MODEL is what `fnlm finetune` takes, or a preset to train from nothing. All candidates are trained a little; the
    better half by validation loss goes on twice as far, until the last one is trained whole: it is a run as any.
    Of the others stay the curves and settings. A search that was killed goes on with --resume.

        fnlm tune runs/demo data/demo-chat --lrs 1e-4,3e-4,1e-3
    """
    options = Options(
        resume="auto" if resume else None, track=(), strategy=None, mesh=None, simulate=None, partial=False,
        dry_run=False, **rest,
    )  # fmt: skip
    plain, _, wish = wished(words, options)
    if not plain:
        raise click.UsageError("which model? name a run or a preset, such as demo", click.get_current_context())
    if len(plain) > 1 and wish.data is None:
        wish = wish._replace(data=Path(plain.pop(1)))
    if len(plain) > 1:
        raise ValueError(f"{plain[1]!r} is one word too many; a change is written key=value, for example batch_size=8")
    model = None if plain[0] in PRESETS and not Path(plain[0]).exists() else trained.load(plain[0])
    model, settings, dataset = common(plain[0], model, wish)
    found = candidates(settings[1], lrs, lengths, budget)
    where = wish.out or Path("runs") / f"{dataset.folder.name}-tune"
    given = [f"{key}={value}" for key, value in wish.pairs]
    about = {"model": plain[0], "data": str(dataset.folder), "sha256": fingerprint(dataset), "settings": given}
    ledger = opened(Ledger(where, about, found), wish)
    with folder.held(where):
        ledger.write()
        trainer = Trainer(where, settings, dataset, model, wish)
        winner = search(ledger, trainer, (lambda name: None) if keep_all else trainer.drop)
    if winner is None:
        click.echo(f"interrupted; go on with the same words and --resume (in {where})", err=True)
        return 128 + (trainer.signal or 0)
    report(ledger, winner, line_of(plain[0], wish, found, winner, settings[1], dataset), wish.as_json)
    return 0


def common(name: str, model: Trained | None, wish: Wish) -> tuple[Trained | None, Settings, Dataset]:
    """The model, with the data's new tokens, the settings that all candidates share, and the data."""
    own = PRESETS[name] if model is None else model.cfg
    train = TRAINING.get(name) or TrainConfig(steps=1000, batch_size=16)
    if model is not None:
        train = settings_for(model, adapters=gather.given(wish.pairs, "lora"))
    dataset = open_data(wish.data, Path("data") / (name if model is None else f"{Path(name).name}-chat"))
    base = own, train, RunConfig(keep=1), Compute()
    if model is not None:
        model, base = with_new_tokens(model, base, dataset, say_to_stderr(wish.quiet))
        data.require_same_tokenizer(dataset, model.tokenizer.sha256, str(model.path))
    return model, fresh(base, wish, dataset, say_to_stderr(wish.quiet), adapt=model is None), dataset


def candidates(train: TrainConfig, lrs: str | None, lengths: str | None, budget: int | None) -> list[Candidate]:
    """Each rate with each number of steps. ValueError for what is no list of numbers above 0."""
    rates = numbers("--lrs", lrs) if lrs else [float(f"{train.lr * factor:.2g}") for factor in FACTORS]
    steps = [int(n) for n in numbers("--lengths", lengths, whole=True)] if lengths else [train.steps]
    if budget is not None:
        if lengths:
            raise ValueError("--budget sets the number of steps; leave --lengths out")
        share = cost(made(rates, [1 << 20])) / (1 << 20)
        steps = [max(1, int(budget / share))]
        if cost(made(rates, steps)) > budget and steps != [1]:
            steps = [steps[0] - 1]
    return made(rates, steps)


def made(rates: list[float], steps: list[int]) -> list[Candidate]:
    """The candidates by name."""
    many = len(steps) > 1
    return [Candidate(f"lr-{lr:g}" + (f"-steps-{n}" if many else ""), lr, n) for lr in rates for n in steps]


def numbers(option: str, text: str, whole: bool = False) -> list[float]:
    """The numbers between commas, each once. ValueError for others than such above 0."""
    try:
        found = [float(int(part) if whole else float(part)) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < x < float("inf") for x in found):
        raise ValueError(f"{option} {text} is no list of numbers above 0; write them as in 1e-4,3e-4,1e-3")
    return list(dict.fromkeys(found))


def opened(ledger: Ledger, wish: Wish) -> Ledger:
    """The ledger of a new search, or of one that goes on. ValueError where there is one, or something else."""
    where = ledger.folder
    there = (where / LEDGER).is_file()
    if there and wish.resume:
        ledger.read()
    elif there and not wish.force:
        raise ValueError(f"{where} holds a search; go on with --resume, choose another --out, or replace it: --force")
    elif where.exists() and not there and (not where.is_dir() or any(where.iterdir())):
        raise ValueError(f"{where} holds what no search has written; choose another --out")
    elif there:
        shutil.rmtree(where)
    return ledger


class Trainer:
    """Takes a candidate to a step: from the model, or from where its run is."""

    def __init__(self, where: Path, settings: Settings, dataset: Dataset, model: Trained | None, wish: Wish) -> None:
        self.where, self.settings, self.dataset, self.model, self.wish = where, settings, dataset, model, wish
        self.signal: int | None = None

    def __call__(self, candidate: Candidate, until: int) -> Result | None:
        outcome = self.trained(candidate, until)
        self.signal = outcome.signal
        if outcome.reason == "signal":
            return None
        loss = float("inf") if outcome.best is None or outcome.reason == "not finite" else outcome.best
        say_to_stderr(self.wish.quiet)(f"{candidate.name}: step {outcome.step}, best validation loss {loss:.4f}")
        return Result(loss, outcome.step, outcome.reason)

    def drop(self, name: str) -> None:
        """Take away what a candidate that does not go on has made, but for its curves and settings."""
        for made in (folder.CHECKPOINTS, folder.SAMPLES):
            shutil.rmtree(self.where / name / made, ignore_errors=True)

    def trained(self, candidate: Candidate, until: int) -> Outcome:
        """The candidate's run, begun or continued."""
        at = self.where / candidate.name
        settings = self.settings[0], train_of(self.settings[1], candidate), *self.settings[2:]
        resume = loop.resumable(at)
        came: dict[str, Any] = {"preset": None, "init_from": None}
        if self.model is not None:
            came = {"preset": self.model.config.get("preset"), "init_from": str(self.model.path)}
            about = self.dataset.manifest
            came |= interop.carried(self.model.config, about["kind"], about.get("template"))
        if resume is None:
            loop.claim(at, force=True)
        params = initial(self.model, settings, False) if self.model is not None and resume is None else None
        config = described(settings, self.dataset, **came)
        job = job_of(settings, self.dataset, at, config, params=params, resume=resume, until=until)
        if job.device.type == "cpu":
            tune_cpu()
        with Progress(until, quiet=self.wish.quiet) as progress:
            return loop.fit(job, Many([]), progress)


def train_of(train: TrainConfig, candidate: Candidate) -> TrainConfig:
    """The settings with a candidate's; what goes with the rate and the steps keeps its proportion to them."""
    ratio, longer = candidate.lr / train.lr, candidate.steps / train.steps
    warmup, decay = round(train.warmup * longer), train.decay_steps and max(1, round(train.decay_steps * longer))
    return replace(
        train, lr=candidate.lr, min_lr=train.min_lr * ratio, muon_lr=train.muon_lr * ratio, steps=candidate.steps,
        warmup=min(warmup, candidate.steps), decay_steps=decay,
    )  # fmt: skip


def line_of(
    name: str, wish: Wish, found: list[Candidate], winner: str, train: TrainConfig, dataset: Dataset
) -> list[str]:
    """The command that trains the winner alone."""
    chosen = next(c for c in found if c.name == winner)
    own, values = train_of(train, chosen), {"steps": chosen.steps, "lr": chosen.lr}
    moved = {k: getattr(own, k) for k in ("min_lr", "muon_lr", "warmup", "decay_steps") if getattr(own, k)}
    moved = {k: v for k, v in moved.items() if k != "muon_lr" or own.optimizer == "muon"}
    kept = [f"{key}={value}" for key, value in wish.pairs if gather.names(key) not in {*values, *moved}]
    verb = "train" if name in PRESETS and not Path(name).exists() else "finetune"
    return ["fnlm", verb, name, str(dataset.folder), *kept, *(f"{k}={v:g}" for k, v in {**values, **moved}.items())]


def report(ledger: Ledger, winner: str, line: list[str], as_json: bool) -> None:
    """The table of all candidates and rounds, the winner, and how to have it again."""
    last = ledger.results[-1][winner]
    if as_json:
        value = {"run": str(ledger.folder / winner), "best": last.loss, "command": shlex.join(line)}
        saved = json.loads((ledger.folder / LEDGER).read_text(encoding="utf-8"))
        click.echo(json.dumps({**value, "rounds": saved["rounds"]}, indent=2))
        return
    parts = [f"{part:.0%}" for part, _ in rounds(len(ledger.candidates))]
    rows = [["run", "lr", "steps", *parts]]
    for c in ledger.candidates:
        losses = [f"{r[c.name].loss:.4f}" if c.name in r else "" for r in ledger.results]
        rows.append([c.name, f"{c.lr:g}", str(c.steps), *losses])
    click.echo("\n".join(columns(rows)))
    click.echo(f"best: {ledger.folder / winner}, validation loss {last.loss:.4f}, trained whole; the same alone:")
    click.echo(f"  {shlex.join(line)}")
