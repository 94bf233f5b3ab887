"""The command line: the only place that reads settings and builds objects."""

from __future__ import annotations

from importlib import import_module

import click

from outbox_relay import __version__
from outbox_relay.cli.exits import ExitCode, tell
from outbox_relay.errors import OutboxRelayError

__all__ = ["cli"]

_COMMANDS = ("run", "migrate", "status", "health", "doctor", "parked", "prune", "reconcile", "replay", "config", "demo")


class _Commands(click.Group):
    """Sub-commands that are imported when they are used, so that a light one does not wait for librdkafka."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- the base class's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- the same
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"outbox_relay.cli.{cmd_name}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"outbox_relay.cli.{cmd_name}.{cmd_name} is no command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OutboxRelayError as error:
            ctx.exit(tell(error))
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="outbox-relay", prog_name="outbox-relay")
def cli() -> None:
    """Relay a transactional outbox in PostgreSQL to Kafka."""
