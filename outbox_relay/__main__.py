"""Entry point of the command `outbox-relay` and of `python -m outbox_relay`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install when the daemon's packages are missing."""
    try:
        from outbox_relay.cli import cli  # noqa: PLC0415 -- the base install has no click
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


if __name__ == "__main__":
    main()
