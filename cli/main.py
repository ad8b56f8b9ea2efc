"""`fnlm`: finds the command, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from cli.group import Group

# name: what it does. The module cli.NAME holds the click command as `command`; it is imported only to run it or to
# show its help, since torch alone takes a second.
COMMANDS = {
    "prepare": "Turn text or conversations into tokens to train on.",
    "train": "Train a model on prepared data.",
    "finetune": "Train a trained model further, on other data.",
    "tune": "Find a learning rate and a number of steps.",
    "sample": "Continue prompts with a trained model.",
    "chat": "Talk with a trained model in the terminal.",
    "serve": "Open a chat page and an OpenAI-compatible API.",
    "eval": "Measure models on a text, or on tasks.",
    "bench": "Time the library beside others.",
    "plan": "Say what a training step will hold and send on a mesh.",
    "inspect": "Show a model's parameters, FLOPs and memory.",
    "export": "Write a model in the files of other software.",
    "import": "Make a run of a model that other software wrote.",
    "merge": "Make one model of several of one shape.",
    "diff": "Say how far each parameter of B lies from A's.",
    "report": "Show runs as one HTML page.",
    "doctor": "Check what this machine and installation can do.",
}
FAILURE, USAGE, INTERRUPTED = 1, 2, 128 + signal.SIGINT


class Commands(Group):
    """The commands of `COMMANDS`, imported on demand, and the end of every error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, *unused: Any, **extra: Any) -> NoReturn:
        """Run, print errors as `error: ...` on stderr, and leave with the exit code. Only a bug shows its traceback."""
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # before or after the command
        words = [word for word in words if word != "--debug"]
        color = False if os.environ.get("NO_COLOR") else None
        try:
            code = super().main(
                words, **{"obj": tuple(words), "prog_name": "fnlm", "color": color, **extra, "standalone_mode": False}
            )
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush complains too
            sys.exit(FAILURE)
        except (click.ClickException, click.Abort, ValueError, OSError) as error:
            if debug:
                traceback.print_exception(error)
            message, code = explained(error)
            for row in table_of(error):
                click.echo(row, err=True)
            click.echo(click.style("error:", fg="red", bold=True) + f" {message}", err=True, color=color)
        sys.exit(code if isinstance(code, int) else 0)


def explained(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of an error that is the user's to mend."""
    if isinstance(error, click.UsageError):
        message = error.format_message().rstrip(".")
        page = f"see '{error.ctx.command_path} --help'" if error.ctx else ""
        return message + (page and (f" {page.capitalize()}" if message.endswith("?") else f"; {page}")), USAGE
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, click.Abort):
        return "interrupted", INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else FAILURE
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, FAILURE
    lines = str(error).splitlines()
    lines = [f"{lines[0]};", lines[-1]] if table_of(error) else lines
    message = " ".join(" ".join(lines).split()) or type(error).__name__
    # An error of fnlm's may say more than that the user can mend it: bad data, a bad checkpoint.
    return message, getattr(error, "exit_code", USAGE) if isinstance(error, ValueError) else FAILURE


def table_of(error: BaseException) -> list[str]:
    """The rows between the first and the last line of a message, such as the differences of a checkpoint."""
    return str(error).splitlines()[1:-1] if isinstance(error, ValueError) else []


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    """`--version`: of the installed package, without importing it."""
    if wanted and not ctx.resilient_parsing:
        from importlib import metadata

        try:
            number = metadata.version("fnlm")
        except metadata.PackageNotFoundError:  # run from a folder
            from fnlm import __version__ as number
        click.echo(f"fnlm {number}")
        ctx.exit()


@click.command("fnlm", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show an error's traceback; also after a command.")
def cli() -> None:
    """Language models as pure functions of an explicit dict of parameters.

    Results go to stdout, logs and errors to stderr. Exit codes: 0 done, 1 failure, 2 wrong usage or configuration,
    3 does not work or fit on this machine, 4 bad data or checkpoint, 5 loss not finite, 130 or 143 interrupted.
    """


def main() -> None:
    """The entry point of the `fnlm` script and of `python -m cli`."""
    cli.main()
