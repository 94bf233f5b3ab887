"""`python -m examples.saga`: the demo, or one process of it, or a look at the sagas."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from examples.saga.demo import overview, run_demo
from examples.saga.service import PROCESSES, run
from outbox_relay.errors import OutboxRelayError


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m examples.saga", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        default="demo",
        choices=("demo", "overview", *PROCESSES),
        help="Default: demo, which needs nothing. The others read DATABASE_URL, of their service, and all but overview "
        "KAFKA_BOOTSTRAP_SERVERS.",
    )
    match parser.parse_args().what:
        case "demo":
            try:
                sys.exit(not run_demo(print))
            except (OutboxRelayError, TimeoutError) as error:
                sys.exit(str(error))
            except KeyboardInterrupt:
                sys.exit(128 + signal.SIGINT)
        case "overview":
            for name, number in overview(os.environ["DATABASE_URL"]).items():
                print(f"{name:12}{number:7,}")
        case process:
            run(process)


if __name__ == "__main__":
    main()
