"""`fnlm chat`: talk with a trained model in the terminal, or through a pipe, a line a turn."""

from __future__ import annotations

import contextlib
import importlib
import json
import secrets
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cli import bits, speculation
from cli.main import INTERRUPTED
from fnlm import trained
from fnlm.checkpoint import CheckpointError
from fnlm.sampling import Settings
from webui.engine import Engine, Failure, Job, Refused
from webui.models import About, Models, Precision, dtype_of

HELP = """\
/regen          the last answer again, otherwise
/clear          begin anew
/system TEXT    instructions that precede the conversation; without TEXT, none
/temp X         temperature: 0 takes the likeliest token, 0.8 is usual, 1 as trained
/topk N         draw from the N likeliest tokens; 0: from all
/tokens N       at most N tokens an answer; 0: as many as fit
/save FILE      write the conversation as JSON; /save! FILE over one that is there
/help, /exit    Ctrl-C stops an answer, a second one leaves; // begins a line with a slash"""


@click.command(cls=bits.Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--temperature", default=0.8, show_default=True, metavar="X", help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), metavar="N", help="Draw from the N likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest tokens that together have P.")
@click.option("--min-tokens", default=0, type=click.IntRange(0), metavar="N", help="At least N tokens an answer.")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="At most N tokens an answer.")
@click.option("--slide", is_flag=True, help="An answer may outgrow the context: it goes on from its newest half.")
@speculation.option
@click.option("--system", metavar="TEXT", help="Instructions that precede the conversation.")
@click.option("--seed", type=int, metavar="N", help="The same answers again. [default: others each time]")
@click.option("--precision", default="auto", type=click.Choice(["auto", "fp32", "bf16"]), help="Of the parameters.")
@bits.option("Matrices in int8 (or int4): a half (a quarter) of bf16, for speed and large models on a CPU.")
def command(
    model: Path,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_tokens: int,
    max_new_tokens: int | None,
    slide: bool,
    speculate: str | None,
    system: str | None,
    seed: int | None,
    precision: Precision,
    quantize: bits.Quantized | None,
) -> None:
    """Talk with a trained model in the terminal.

    MODEL is a run or a checkpoint. A model that was trained on plain text continues what is written instead. Where
    stdin is no terminal, each line of it is a turn. /help lists what else can be said.
    """
    given = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "min_tokens": min_tokens}
    settings: dict[str, Any] = {k: v for k, v in {**given, "max_tokens": max_new_tokens}.items() if v is not None}
    Settings(**{"max_tokens": None, **settings})  # what is wrong is said before the model is loaded
    about, models = only(model, precision, quantize)
    begin = speculation.begin_of(
        speculate, "cpu", lambda n: dtype_of(precision, "cpu", n), models.reader(about.name).tokenizer
    )
    engine = Engine(models, streams=1, draft=lambda _: begin)
    talk = Talk(about, engine.start(), settings, system, seed, slide=slide)
    try:
        code = talk.run()
    finally:
        talk.engine.stop()
    click.get_current_context().exit(code)


def only(path: Path, precision: Precision, quantize: bits.Quantized | None) -> tuple[About, Models]:
    """The one model at a path. Raises CheckpointError where there is none, or several: they are named."""
    if not path.exists():
        trained.locate(path)
    models = Models([path], precision=precision, quantize=quantize and bits.BITS[quantize])
    about = list(models.about().values())
    if not about:
        if (path / "checkpoints").is_dir():
            trained.locate(path)  # says how far it is
        raise CheckpointError(f"{path} holds no model; train one with 'fnlm train' first")
    if len(about) > 1:
        names = ", ".join(str(path / a.name) for a in about[:20])
        raise CheckpointError(f"{path} holds {len(about)} models; choose one of {names}")
    models.get(about[0].name)  # what cannot be read is said now, in one line
    return about[0], models


@dataclass
class Talk:
    """A conversation, or a text that is continued. `messages` are the user's and the model's, without `system`."""

    about: About
    engine: Engine
    settings: dict[str, Any]
    system: str | None = None
    seed: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    slide: bool = False
    turns: int = 0
    code: int = 0
    terminal: bool = field(default_factory=lambda: sys.stdin.isatty())

    def run(self) -> int:
        """Turn by turn to the end of the input; returns the exit code."""
        if self.terminal:
            with contextlib.suppress(ImportError):  # not on Windows
                importlib.import_module("readline")  # arrows edit the line and recall earlier ones
        note(f"{self.about.name}, {self.about.parameters:,} parameters, step {self.about.step:,}. /help, /exit")
        if not self.about.chat:
            note("It was trained on plain text: it continues what you write; an empty line lets it go on.")
        while (line := self.read()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                if self.obey(*split(line)):
                    break
            elif line.strip() or (not self.about.chat and self.messages and self.terminal):
                self.take(line[1:] if line.startswith("//") else line)
            if self.code == INTERRUPTED:
                break
        return self.code

    def read(self) -> str | None:
        """The next line; None at the end, or after Ctrl-C."""
        try:
            line = input("> ") + "\n" if self.terminal else sys.stdin.readline()
            line.encode("utf-8")  # what is no UTF-8 may have been let through
            return line.rstrip("\r\n") if line else None
        except EOFError:
            click.echo()
        except KeyboardInterrupt:
            click.echo()
            self.code = INTERRUPTED
        except UnicodeError as error:
            raise ValueError("the input is not UTF-8") from error
        return None

    def take(self, line: str) -> None:
        """A turn of the user's, and the answer; one that failed is taken back."""
        if not self.about.chat:
            self.messages = [{"role": "text", "content": line or self.text()}]
        else:
            self.messages.append({"role": "user", "content": line})
        if not self.answer() and self.about.chat:
            self.messages.pop()

    def text(self) -> str:
        """What a plain model has read and written."""
        return "".join(m["content"] for m in self.messages)

    def answer(self) -> bool:
        """Let the model write, show it as it comes and keep it; Ctrl-C stops it. False: there is nothing to keep."""
        said, finish = "", None
        try:
            ticket = self.engine.submit([self.job()])
        except Refused as refused:
            self.fail(refused.failure)
            return False
        try:
            while (event := ticket.get()) is not None and event.kind not in ("end", "error"):
                if event.kind == "text":
                    said += event.value.text
                    click.echo(harmless(event.value.text), nl=False)
                    sys.stdout.flush()
                elif event.value.dropped:
                    note(self.outgrown(event.value.dropped))
            assert event is not None
            if event.kind == "error":
                self.fail(event.value)
                return False
            finish = event.value.finish
        except KeyboardInterrupt:
            ticket.cancel()
        click.echo()
        if finish is None:
            note("(stopped; Ctrl-C again leaves)")
        elif finish == "length" and self.about.chat:
            note("(cut off at the most tokens it may have)")
        self.messages.append({"role": "assistant" if self.about.chat else "text", "content": said})
        return True

    def outgrown(self, n: int) -> str:
        """What to say where not all that was said could be read."""
        if not self.about.chat:
            return f"(the text outgrew what the model can read: its first {n} tokens were left out)"
        what = "message was" if n == 1 else f"{n} messages were"
        return f"(the conversation outgrew what the model can read: its oldest {what} left out)"

    def job(self) -> Job:
        """What the engine is asked for. Each turn has a seed of its own."""
        self.turns += 1
        seed = secrets.randbits(32) if self.seed is None else self.seed + self.turns
        if not self.about.chat:
            return Job(self.about.name, None, self.text(), True, self.settings, seed, slide=self.slide)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Job(self.about.name, [*system, *self.messages], settings=self.settings, seed=seed, slide=self.slide)

    def fail(self, failure: Failure) -> None:
        """Say why there is no answer; through a pipe it decides the exit code."""
        click.echo(f"{click.style('error:', fg='red', bold=True)} {failure.message}", err=True)
        self.code = self.code if self.terminal else 1

    def obey(self, name: str, rest: str) -> bool:
        """A command; true: leave."""
        if name in ("exit", "quit"):
            return True
        changes = {"temp": ("temperature", float), "topk": ("top_k", int), "tokens": ("max_tokens", int)}
        if name in changes:
            self.change(*changes[name], rest)
        elif name == "help":
            note(HELP)
        elif name == "clear":
            self.messages = []
            note("(a new conversation)" if self.about.chat else "(a new text)")
        elif name == "system":
            self.system = rest or None
            note("(instructions set)" if rest else "(no instructions)")
        elif name == "regen":
            self.regenerate()
        elif name in ("save", "save!"):
            self.save(rest, over=name == "save!")
        else:
            note(f"there is no /{name}; /help lists what there is")
        return False

    def change(self, field_name: str, kind: type, rest: str) -> None:
        """A setting to another value, or shown; a wrong value is said and changes nothing."""
        try:
            value = kind(rest) if rest else None
        except ValueError:
            note(f"{rest} is not a {'whole ' if kind is int else ''}number")
            return
        wanted = self.settings if value is None else {**self.settings, field_name: value}
        wanted = {k: v for k, v in wanted.items() if v or k not in ("top_k", "max_tokens")}
        try:
            Settings(**{"max_tokens": None, **wanted})
        except ValueError as error:
            note(str(error))
            return
        self.settings = wanted
        note(f"({field_name} {wanted.get(field_name, 'not limited')})")

    def regenerate(self) -> None:
        """The last answer again; the old one stays where no new one comes."""
        if not self.messages or self.messages[-1]["role"] == "user" or len(self.messages) < 2:
            note("there is no answer yet")
            return
        old = self.messages.pop()
        if not self.answer():
            self.messages.append(old)

    def save(self, name: str, over: bool = False) -> None:
        """Write the conversation as a line of JSON that `fnlm prepare` reads; `over` a file that is there."""
        if not name:
            note("where to? /save FILE")
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"messages": [*system, *self.messages]} if self.about.chat else {"text": self.text()}
        try:
            with open(name, "w" if over else "x", encoding="utf-8") as file:
                file.write(json.dumps(body, ensure_ascii=False) + "\n")
        except FileExistsError:
            note(f"{name} is there already; /save! {name} writes over it")
            return
        except OSError as error:
            note(f"{name}: {error.strerror}")
            return
        note(f"(saved as {name})")


def split(line: str) -> tuple[str, str]:
    """`/temp 0.5` -> ('temp', '0.5')."""
    name, _, rest = line[1:].partition(" ")
    return name.strip().lower(), rest.strip()


def harmless(text: str) -> str:
    """What a model wrote, without the characters that steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def note(line: str) -> None:
    """What is not the model's goes to stderr."""
    click.echo(click.style(line, dim=True), err=True)
