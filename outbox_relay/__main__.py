"""Entry point of the command `outbox-relay` and of `python -m outbox_relay`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line, or say what to install when the daemon's packages are missing."""
    _end_at_sigterm()
    try:
        from outbox_relay.cli import cli  # noqa: PLC0415 -- the base install has no click
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("outbox_relay"):
            raise
        print(  # noqa: T201 -- there is no logger yet
            f"outbox-relay: the daemon needs the package {error.name!r}, which the base install leaves out.\n"
            'Install it with: pip install "outbox-relay[daemon]"',
            file=sys.stderr,
        )
        raise SystemExit(3) from error
    cli()


def _end_at_sigterm() -> None:
    """
    End the process at SIGTERM with the exit code 143, until a command takes the signal itself.

    The default would do as much, but the kernel ignores it for the first process of a container, which then stays until
    it is killed. Nothing is raised: an exception in the middle of an import would surface as another one, or be lost.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))


if __name__ == "__main__":
    main()
