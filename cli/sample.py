"""`fnlm sample`: prompts and what a trained model makes of them."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from cli import bits, speculation
from cli.choosing import which_parameters
from cli.eval import checkpoint_of
from fnlm import random, trained
from fnlm.data import DataError
from fnlm.decode import prepare
from fnlm.generate import Generation, beginning, complete, encoded, stream, turns_of
from fnlm.quantize import quantize as small
from fnlm.sampling import Settings
from fnlm.tokens import SINKS
from fnlm.trained import Trained, Which

FILE = "FILE:"
LINE = "-" * 15  # between samples, as nanoGPT's
TOGETHER = 32  # samples made at once
SMALL = 5_000_000  # parameters; below, threads wait for each other longer than they work
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Prompt(NamedTuple):
    """What was asked for, and its ids."""

    text: str
    ids: list[int]


@click.command(cls=bits.Command)
@click.argument("model", metavar="MODEL")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="FILE:path: a file's text; -: stdin.")
@click.option(
    "--num-samples", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Of each prompt."
)
@click.option("--max-new-tokens", type=int, metavar="N", help="At most; 0: to the end of the context. [default: 256]")
@click.option("--min-tokens", type=int, default=0, show_default=True, metavar="N", help="Before a text may end.")
@click.option("--temperature", type=float, default=0.8, show_default=True, metavar="T", help="0 takes the likeliest.")
@click.option("--greedy", is_flag=True, help="The same as --temperature 0.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest that have P together.")
@click.option("--min-p", type=float, metavar="P", help="Drop what has less than P of the likeliest's.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, metavar="R", help="Above 1: less.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text.")
@click.option("--slide", is_flag=True, help="Past the context's end go on from its beginning and its newest half.")
@click.option("--keep", type=click.IntRange(0), metavar="N", help="First tokens that a text keeps then. [default: 4]")
@speculation.option
@click.option("--seed", type=int, metavar="N", help="The same seed, the same text. [default: a new one]")
@click.option("--chat/--plain", default=None, help="A user's message, or text to go on with. [default: as trained]")
@which_parameters
@click.option("--device", metavar="D", help="[default: cuda where there is one, else cpu]")
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of computing.")
@bits.option("Matrices in int8 (or int4), as 'fnlm serve --quantize' has them.")
@click.option("--json", "as_json", is_flag=True, help="Samples, settings and speed as JSON.")
def command(
    model: str,
    prompts: tuple[str, ...],
    num_samples: int,
    max_new_tokens: int | None,
    seed: int | None,
    chat: bool | None,
    slide: bool,
    keep: int | None,
    speculate: str | None,
    checkpoint: str,
    no_ema: bool,
    device: str | None,
    precision: str,
    quantize: bits.Quantized | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue prompts with a trained model.

    MODEL is a run or a checkpoint. One sample is written as it comes, several with a line between them; a chat's
    replies come without their prompts. Without a prompt the text begins as a document does.
    """
    seed = secrets.randbits(32) if seed is None else seed
    settings = settings_of(max_new_tokens, seed, **options)
    if slide and settings.max_tokens is None:
        raise ValueError("--slide has no end of its own; give --max-new-tokens above 0")
    texts = [text_of(prompt) for prompt in prompts]
    to = device_of(device)
    at = checkpoint_of(model, checkpoint)
    which: Which = "newest" if checkpoint == "newest" else "best"
    found = trained.load(at, which, average=not no_ema, device=to, dtype=DTYPES[precision])
    if quantize:
        found = found._replace(params=small(found.params, bits.BITS[quantize]))
    chat = found.is_chat if chat is None else chat
    settings = turns_of(settings, found.dialogue) if chat else settings
    asked = prompts_of(found, texts, chat, slide)
    begin = speculation.begin_of(speculate, to, lambda _: DTYPES[precision], found.tokenizer)
    how: dict[str, Any] = {"draft": begin, "slide": slide, "keep": SINKS if keep is None else keep}
    if to == "cpu" and sum(p.numel() for p in found.params.values()) < SMALL:
        torch.set_num_threads(1)
    start = time.perf_counter()
    rows = [prompt for prompt in asked for _ in range(num_samples)]
    made = samples(found, rows, settings, show=not as_json, echo=not chat, how=how)
    seconds = time.perf_counter() - start
    if as_json:
        click.echo(json.dumps(report(found, model, rows, made, settings, seconds), indent=2))
    count = sum(len(g.ids) for g in made)
    click.echo(
        f"{model}, step {found.step}: {count} tokens, {count / seconds:.0f} a second, seed {seed}, "
        f"ended by {', '.join(sorted({g.finish for g in made}))}{guessed(made) if speculate else ''}",
        err=True,
    )


def guessed(made: Sequence[Generation]) -> str:
    """How well drafts went."""
    return f"; {sum(g.accepted for g in made)} of {sum(g.drafted for g in made)} drafted tokens were right"


def settings_of(max_new_tokens: int | None, seed: int, greedy: bool, **options: Any) -> Settings:
    """The settings of the options; ValueError in their own names."""
    most = 256 if max_new_tokens is None else max_new_tokens
    temperature = 0 if greedy else options.pop("temperature")
    options.pop("temperature", None)
    least = options.pop("min_tokens")
    if most < 0 or least < 0 or 0 < most < least:
        raise ValueError(
            f"--min-tokens {least} and --max-new-tokens {most} must be 0 or more, and the first the smaller"
        )
    return Settings(temperature=temperature, max_tokens=most or None, min_tokens=least, seed=seed, **options)


def device_of(name: str | None) -> str:
    """The device that is named, or the best there is. Raises ValueError for one that torch does not have."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(
            f"--device {name} is not there; choose cpu" + (" or cuda" if torch.cuda.is_available() else "")
        )
    return name


def text_of(prompt: str) -> str:
    """A prompt as it is meant: itself, a file's text, or what stdin has. Raises DataError where that is not UTF-8."""
    if prompt != "-" and not prompt.startswith(FILE):
        return prompt
    name = "stdin" if prompt == "-" else prompt.removeprefix(FILE)
    data = sys.stdin.buffer.read() if prompt == "-" else Path(name).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def prompts_of(found: Trained, texts: Sequence[str], chat: bool, slide: bool = False) -> list[Prompt]:
    """The ids of the prompts; the beginning of a document without any. Raises ValueError for those that do not fit."""
    if chat and not all(text.strip() for text in texts or [""]):
        raise ValueError("what to say to it? give --prompt TEXT, or --plain for text that begins by itself")
    asked = [Prompt(text, encoded(found.tokenizer, text, chat and found.dialogue)) for text in texts]
    for prompt in asked:
        if len(prompt.ids) >= found.cfg.seq_len and not slide:
            raise ValueError(
                f"the prompt {prompt.text[:20]!r}... has {len(prompt.ids)} tokens, the model's context only "
                f"{found.cfg.seq_len} for prompt and reply; shorten it to {found.cfg.seq_len - 1} at most"
            )
    return asked or [Prompt("", beginning(found.tokenizer))]


def samples(
    found: Trained, rows: Sequence[Prompt], settings: Settings, show: bool, echo: bool, how: dict[str, Any]
) -> list[Generation]:
    """A text for each row, the same whatever the others are, printed where `show`, behind its prompt where `echo`."""
    params = prepare(found.params, found.cfg)
    keys = random.fold_in(random.key(settings.seed or 0), torch.arange(len(rows)))
    settings = Settings(**{**vars(settings), "seed": None})
    if show and len(rows) == 1:
        if echo:
            click.echo(rows[0].text, nl=False)
        said = shown(stream(params, found.cfg, found.tokenizer, rows[0].ids, settings, keys[:1], **how))
        click.echo()
        return [said]
    made = []
    for at in range(0, len(rows), TOGETHER):
        part = rows[at : at + TOGETHER]
        ids = [prompt.ids for prompt in part]
        these = complete(params, found.cfg, found.tokenizer, ids, settings, keys[at : at + TOGETHER], **how)
        for i, (prompt, said) in enumerate(zip(part, these, strict=True), at):
            if show:
                click.echo((LINE + "\n" if i else "") + (prompt.text if echo else "") + said.text)
        made += these
    return made


def shown(pieces: Generator[str, None, Generation]) -> Generation:
    """Print the pieces as they come."""
    while True:
        try:
            click.echo(next(pieces), nl=False)
        except StopIteration as end:
            said: Generation = end.value
            return said


def report(
    found: Trained, model: str, rows: Sequence[Prompt], made: Sequence[Generation], settings: Settings, seconds: float
) -> dict[str, Any]:
    """Everything, fit for JSON."""
    both = zip(rows, made, strict=True)
    return {
        "model": model,
        "checkpoint": str(found.path),
        "step": found.step,
        "settings": {k: v for k, v in vars(settings).items() if k not in ("logit_bias", "forbidden", "stop_ids")},
        "samples": [
            {"prompt": p.text, "text": g.text, "finish": g.finish, "prompt_tokens": len(p.ids), "tokens": len(g.ids)}
            for p, g in both
        ],
        "seconds": seconds,
        "tokens_per_second": sum(len(g.ids) for g in made) / seconds,
    } | ({"speculation": acceptance(made)} if any(g.drafted for g in made) else {})


def acceptance(made: Sequence[Generation]) -> dict[str, float]:
    """Of drafts: how many tokens there were, how many of them the model says too, and their share."""
    drafted, accepted = sum(g.drafted for g in made), sum(g.accepted for g in made)
    return {"drafted": drafted, "accepted": accepted, "acceptance_rate": accepted / drafted}
