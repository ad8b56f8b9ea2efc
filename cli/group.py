"""A command with commands below it: listed in the order of the work, and a mistyped name gets the nearest one."""

from __future__ import annotations

import difflib

import click


class Group(click.Group):
    """Its commands are listed as they were added; without a command it prints its help and succeeds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if not ctx.resilient_parsing and not args[0].startswith("-") and args[0] not in known:
            near = difflib.get_close_matches(args[0], known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise click.UsageError(f"there is no command {args[0]!r}; {remedy}", ctx)
        return super().resolve_command(ctx, args)
