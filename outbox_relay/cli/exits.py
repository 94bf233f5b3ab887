"""How the command ends: the exit code and the last words for each kind of error."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import click

from outbox_relay.cli.terminal import printable
from outbox_relay.errors import ConfigurationError, DependencyUnavailable, InvalidMessage, OperationRefused

if TYPE_CHECKING:
    from outbox_relay.errors import OutboxRelayError


class ExitCode(IntEnum):
    """What a script may rely on; 0 stands for success, a drained SIGTERM included."""

    INTERNAL = 1
    USAGE = 2
    CONFIGURATION = 3
    UNAVAILABLE = 4
    CHECK_FAILED = 5
    INTERRUPTED = 130


def tell(error: OutboxRelayError) -> ExitCode:
    """Say on stderr what failed, each line after the command's name, and return the code to exit with."""
    for line in str(error).splitlines():
        click.echo(f"outbox-relay: {printable(line)}", err=True)
    match error:
        case ConfigurationError():
            return ExitCode.CONFIGURATION
        case DependencyUnavailable():
            return ExitCode.UNAVAILABLE
        case OperationRefused() | InvalidMessage():
            return ExitCode.USAGE
        case _:
            return ExitCode.INTERNAL
