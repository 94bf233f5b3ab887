"""`outbox-relay health`: ask the relay beside it how it is, for the health check of a container; cheap on purpose."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ssl import CERT_NONE, PROTOCOL_TLS_CLIENT, SSLContext

import click

from outbox_relay.cli.exits import ExitCode
from outbox_relay.errors import DependencyUnavailable

_TIMEOUT_SECONDS = 3.0


# These three alone of all settings: reading the others would cost ten times as much, every few seconds.
@click.command()
@click.option("--host", envvar="OUTBOX_RELAY_METRICS_HOST", default="127.0.0.1", show_envvar=True, help="Its address.")
@click.option(
    "--port",
    envvar="OUTBOX_RELAY_METRICS_PORT",
    type=click.IntRange(1, 65_535),
    metavar="N",
    required=True,
    show_envvar=True,
    help="Its port of metrics and probes.",
)
@click.option(
    "--certificate",
    envvar="OUTBOX_RELAY_METRICS_CERTIFICATE",
    metavar="PATH",
    default="",
    show_envvar=True,
    help="Its certificate; given any, it is asked over TLS.",
)
@click.option("--ready", "is_readiness", is_flag=True, help="Ask whether it publishes, not only whether it is alive.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def health(ctx: click.Context, *, host: str, port: int, certificate: str, is_readiness: bool, as_json: bool) -> None:
    """
    Ask a running relay whether it is alive, and print `ok` or the reasons why not.

    Exits with 5 when it is not, and with 4 when nobody answers.
    """
    connection = _connection(host, port, is_secure=bool(certificate))
    is_healthy, answer = _ask(connection, path="/readyz" if is_readiness else "/livez")
    if as_json:
        click.echo(json.dumps({"is_healthy": is_healthy, "reasons": [] if is_healthy else answer.splitlines()}))
    else:
        click.echo(answer, nl=False)
    if not is_healthy:
        ctx.exit(ExitCode.CHECK_FAILED)


def _connection(host: str, port: int, *, is_secure: bool) -> HTTPConnection:
    """Give a connection that is not open yet, and takes any certificate, as Kubernetes' own probes do."""
    if not is_secure:
        return HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
    # Nothing secret is sent or learnt, and a relay whose certificate has expired is no healthier after a restart.
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = CERT_NONE
    return HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context)


def _ask(connection: HTTPConnection, *, path: str) -> tuple[bool, str]:
    with closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status == 200, response.read().decode()  # noqa: PLR2004 -- HTTP's own
        except (OSError, HTTPException) as error:
            raise DependencyUnavailable(f"no relay answers at {connection.host}:{connection.port}: {error}") from error
