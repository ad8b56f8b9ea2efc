"""What `fnlm train` and `fnlm finetune` share: what is wanted, the data and the machine to a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from cli import ranks
from cli import settings as gather
from cli.carrying import carry_out
from cli.options import NAMES, Wish
from cli.settings import Pair
from fnlm import __version__, checkpoint, data, interop, loop
from fnlm.config import ModelConfig, TrainConfig, did_you_mean, override
from fnlm.data import DataError, Dataset
from fnlm.environment import memory_available
from fnlm.growing import grown
from fnlm.loop import Job, RunConfig, Settings, memory
from fnlm.loop.folder import held
from fnlm.params import init_params, shapes
from fnlm.presets import optimizer_of, windowed
from fnlm.sharding import processes
from fnlm.track import require_trackers
from fnlm.trainable import subset_of
from fnlm.trained import Trained
from fnlm.types import Params


def paced(run: RunConfig, steps: int, pairs: list[Pair]) -> RunConfig:
    """Intervals that suit the length of the run, where none are given: ten evaluations, a hundred lines."""
    given = [value for key, value in pairs if gather.names(key) == "eval_every" and value and value.isdecimal()]
    every = int(given[-1]) if given else min(1000, max(1, steps // 10))
    suited = {
        "eval_every": every, "save_every": every, "sample_every": every,
        "log_every": min(10, max(1, steps // 100)), "health_every": min(100, max(1, steps // 20)),
    }  # fmt: skip
    return override(run, **{name: value for name, value in suited.items() if not gather.given(pairs, name)})


def shortened(train: TrainConfig, pairs: list[Pair]) -> list[Pair]:
    """A warm-up and a decay for a run too short for the preset's, where none are given: a tenth, and in proportion."""
    steps = gather.steps_in(pairs)
    if steps is None or steps >= train.steps:
        return []
    decay = train.decay_steps or 0
    found = [("warmup", str(steps // 10))] if train.warmup > steps // 2 else []
    return found + ([("decay_steps", str(max(1, decay * steps // train.steps)))] if decay > steps // 2 else [])


def fresh(base: Settings, wish: Wish, dataset: Dataset, say: Callable[[str], None], adapt: bool) -> Settings:
    """The settings of a new run: the base, what was given, and what the machine and, to `adapt`, the data decide."""
    pairs, auto = gather.set_to_auto(wish.pairs, "batch_size")
    pairs = [*shortened(base[1], pairs), *pairs]
    model, train, run, compute = gather.applied(base, pairs, NAMES)
    run = paced(run, train.steps, pairs)
    model = with_vocabulary(model, dataset, not adapt or gather.given(pairs, "vocab_size"), say)
    check(model, train)
    if auto:
        whole = override(train, batch_size=train.batch_size * train.micro_batches, micro_batches=1)
        train = fitted(windowed(model, train), train, run, compute, say, crew_of(model, whole, run, wish))
    elif device_of(run).type == "cpu":
        memory.check(windowed(model, train), train, memory_available(), crew_of(model, train, run, wish))
    return model, train, run, compute


def check(cfg: ModelConfig, train: TrainConfig) -> None:
    """Raises ValueError, before anything is made, where what is to be trained is not in the model."""
    windowed(cfg, train)
    subset_of(cfg, train)
    optimizer_of(train, cfg)


def with_vocabulary(cfg: ModelConfig, dataset: Dataset, chosen: bool, say: Callable[[str], None]) -> ModelConfig:
    """The model with the data's vocabulary, unless one was chosen. Raises DataError where that is too small."""
    size = dataset.manifest["vocab_size"]
    if chosen and cfg.vocab_size < size:
        raise DataError(
            f"vocab_size={cfg.vocab_size} is too small for {dataset.folder}, whose tokenizer has {size} tokens"
        )
    if chosen or cfg.vocab_size == size:
        return cfg
    say(f"vocab_size={size}, that of {dataset.folder}'s tokenizer, instead of the preset's {cfg.vocab_size}")
    return replace(cfg, vocab_size=size)


def crew_of(cfg: ModelConfig, train: TrainConfig, run: RunConfig, wish: Wish) -> memory.Crew | None:
    """The ranks of a run, as far as memory goes; None for one process. ValueError for a mesh that does not fit."""
    if wish.world == 1:
        return None
    shape = loop.mesh_of(cfg, train, run, wish.world, threads=wish.simulate is not None)
    here = processes.place()
    if here is None:
        return memory.Crew(run.strategy, shape, wish.world, processes=False)
    sharing = here.local_world
    if device_of(run).type == "cuda":
        sharing = -(-sharing // torch.cuda.device_count())
    return memory.Crew(run.strategy, shape, sharing)


def fitted(
    cfg: ModelConfig,
    train: TrainConfig,
    run: RunConfig,
    compute: Any,
    say: Callable[[str], None],
    crew: memory.Crew | None = None,
) -> TrainConfig:
    """`batch=auto`: the largest micro-batch that fits, the global batch kept; estimated on a CPU and for several ranks,
    else tried.
    """
    device = device_of(run)
    if device.type == "cpu" or crew is not None:
        found = memory.largest(cfg, train, memory_available(device), crew)
    else:
        found = memory.tried(train, lambda choice: memory.one_step(cfg, choice, compute, device))
    say(f"batch=auto: batch_size={found.batch_size} micro_batches={found.micro_batches}")
    return found


def device_of(run: RunConfig) -> torch.device:
    """The device that a run names; "auto" is a GPU where there is one."""
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(run.device)
    except RuntimeError as error:
        raise ValueError(f"device={run.device!r} is unknown; choose auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise memory.DoesNotFit(f"device={run.device}: torch sees no GPU here; 'fnlm doctor' says why")
    return device


def fingerprint(dataset: Dataset) -> str:
    """The sha256 of the training tokens, as the manifest has it."""
    return str(dataset.manifest["splits"]["train"]["sha256"])


def initial(model: Trained, settings: Settings, partial: bool) -> Params:
    """The model's parameters in the shapes that the settings want; `partial`: what does not fit is drawn anew."""
    cfg, train = settings[:2]
    anew = init_params(cfg, loop.keys_of(train)[0]) if partial else None
    outline = {k: torch.empty(shape, device="meta") for k, shape in shapes(cfg).items()}
    return checkpoint.fitted(model.params, anew or outline, model.path, partial)


def described(settings: Settings, dataset: Dataset, **more: Any) -> dict[str, Any]:
    """The run's config.json. `template`: how the conversations that it is trained on are written, None: as ChatML."""
    tokenizer = dataset.manifest["tokenizer"]
    if dataset.manifest["kind"] == "chat":
        more = {"template": dataset.manifest.get("template"), **more}
    return loop.described(
        settings, data=str(dataset.folder), data_sha256=fingerprint(dataset), kind=dataset.manifest["kind"],
        tokenizer=tokenizer, **more, fnlm=__version__,
    )  # fmt: skip


def job_of(settings: Settings, dataset: Dataset, folder: Path, config: dict[str, Any], **more: Any) -> Job:
    """The job that settings make."""
    model, train, run, compute = settings
    return Job(
        cfg=windowed(model, train), train=train, run=run, compute=compute, dataset=dataset, folder=folder,
        config=config, device=device_of(run), **more,
    )  # fmt: skip


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """Lines on stderr, unless quiet."""
    quiet = quiet or not ranks.is_lead()
    return lambda line: None if quiet else click.echo(line, err=True)


def with_new_tokens(
    model: Trained, base: Settings, dataset: Dataset, say: Callable[[str], None]
) -> tuple[Trained, Settings]:
    """The model and settings with rows for the special tokens that the data's tokenizer has behind the model's."""
    more = grown(model, dataset.tokenizer)
    if new := [token for token in more.tokenizer.special if token not in model.tokenizer.special]:
        say(f"new to the model: {' '.join(new)}; their rows begin near the mean of the others")
    return more, (replace(base[0], vocab_size=more.cfg.vocab_size), *base[1:])


def begun(base: Settings, wish: Wish, folder: Path, dataset: Dataset, model: Trained | None, **more: Any) -> int:
    """Start a run, from nothing or from a model."""
    say = say_to_stderr(wish.quiet)
    if model:
        model, base = with_new_tokens(model, base, dataset, say)
        data.require_same_tokenizer(dataset, model.tokenizer.sha256, str(model.path))
        if folder.exists() and folder.resolve() in (model.path.resolve(), *model.path.resolve().parents):
            raise ValueError(f"{folder} holds the model to start from; choose another --out")
    settings = fresh(base, wish, dataset, say, adapt=model is None)
    if settings[1].documents == "apart":
        data.boundary(dataset)  # or says, before anything is written, why they cannot be told apart
    params = initial(model, settings, wish.partial) if model else None
    loop.mesh_of(*settings[:3], wish.world, threads=wish.simulate is not None)
    about = dataset.manifest
    came = interop.carried(model.config, about["kind"], about.get("template")) if model else {}
    config = described(settings, dataset, init_from=str(model.path) if model else None, **came, **more)
    if wish.dry_run:
        click.echo(json.dumps(config, indent=2))
        return 0
    require_trackers(settings[2].trackers)
    with held(folder) if ranks.is_lead() else nullcontext():
        if ranks.is_lead():
            loop.claim(folder, wish.force)
        return carry_out(job_of(settings, dataset, folder, config, params=params), wish, say)


def preset_and_data(plain: list[str], presets: list[str]) -> tuple[str | None, Path | None]:
    """The preset and the data folder among the words that are no settings."""
    name, folder = None, None
    for word in plain:
        if word in presets and name is None:
            name = word
        elif Path(word).exists() and folder is None:
            folder = Path(word)
        elif "/" in word:
            raise DataError(f"{word} does not exist; make it with 'fnlm prepare PATH --out {word}'")
        else:
            raise ValueError(f"there is no preset {word!r}{did_you_mean(word, presets)}")
    return name, folder


def open_data(folder: Path | None, default: Path) -> Dataset:
    """The data of a run. Raises DataError that says how to make them."""
    if folder is None and not (default / "manifest.json").is_file():
        how = "fnlm prepare demo" if default.name.startswith("demo") else "fnlm prepare PATH"
        raise DataError(f"which data? give --data FOLDER, a folder made by '{how}' (there is no {default})")
    return data.open(folder or default)
