"""Metrics and probes over TLS: who is served, how the certificate is renewed, and what is refused."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import URLError

import pytest

from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.certificates import Authority
from tests.fixtures.daemon import AWAY, Daemon, outbox_relay
from tests.fixtures.probes import ask
from tests.fixtures.prometheus import Prometheus
from tests.fixtures.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fixtures.certificates import Certificate

pytestmark = pytest.mark.outside("it reads files of the test")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def certificate(authority: Authority) -> Certificate:
    return authority.issue("relay", address="127.0.0.1")


@pytest.fixture
def port() -> ReservedPort:
    return ReservedPort()


def variables(port: ReservedPort, certificate: Certificate) -> dict[str, str]:
    return AWAY | {
        "OUTBOX_RELAY_METRICS_PORT": str(port.number),
        "OUTBOX_RELAY_METRICS_CERTIFICATE": str(certificate.path),
        "OUTBOX_RELAY_METRICS_CERTIFICATE_KEY": str(certificate.key_path),
    }


@pytest.fixture
def relay(port: ReservedPort, certificate: Certificate) -> Iterator[Daemon]:
    """Alive, and without a database."""
    with Daemon(variables(port, certificate)) as relay:
        relay.wait_for_event("database_lost")
        yield relay


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.path)


def served(port: ReservedPort) -> str:
    """The certificate that a client is shown now."""
    return ssl.get_server_certificate(("127.0.0.1", port.number), timeout=5)


@pytest.mark.usefixtures("relay")
def test_whoever_trusts_the_authority_is_answered(port: ReservedPort, trusting: ssl.SSLContext) -> None:
    assert ask(port.number, "/livez", tls=trusting) == (200, "ok\n")
    status, metrics = ask(port.number, "/metrics", tls=trusting)
    assert (status, "outbox_relay_build_info" in metrics) == (200, True)


@pytest.mark.usefixtures("relay")
def test_prometheus_scrapes_it(port: ReservedPort, authority: Authority, tmp_path: Path) -> None:
    with Prometheus(tmp_path, targets={"relay": [port.number]}, authority=authority.path) as prometheus:
        eventually(lambda: prometheus.query("outbox_relay_build_info"), message="nothing is scraped")


def test_clients_that_speak_no_tls_or_an_old_one_or_nothing_disturb_nobody(
    port: ReservedPort, relay: Daemon, trusting: ssl.SSLContext
) -> None:
    with socket.create_connection(("127.0.0.1", port.number)):
        with pytest.raises((OSError, HTTPException)):
            ask(port.number, "/livez")
        with pytest.raises(URLError, match="PROTOCOL_VERSION"):
            ask(port.number, "/livez", tls=old_tls())
        assert ask(port.number, "/livez", tls=trusting) == (200, "ok\n")
    relay.terminate()
    assert (relay.wait(), relay.other_lines) == (0, [])


def old_tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or it would not even ask
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


@pytest.mark.usefixtures("relay")
def test_a_renewed_certificate_counts_from_the_next_connection_on(
    port: ReservedPort, authority: Authority, certificate: Certificate
) -> None:
    first = certificate.path.read_text()
    assert served(port) == first
    authority.issue("relay", address="127.0.0.1")
    assert served(port) == certificate.path.read_text() != first


def test_a_half_renewed_certificate_is_not_used_until_the_other_half_is_there(
    port: ReservedPort, relay: Daemon, authority: Authority, certificate: Certificate
) -> None:
    first, renewed = certificate.path.read_text(), authority.issue("renewed", address="127.0.0.1")
    shutil.copy(renewed.path, certificate.path)
    assert [served(port), served(port)] == [first] * 2
    shutil.copy(renewed.key_path, certificate.key_path)
    assert served(port) == renewed.path.read_text()
    relay.terminate()
    assert relay.wait() == 0
    assert [event["level"] for event in relay.events_named("certificate_not_renewed")] == ["warning"]


@pytest.mark.usefixtures("relay")
def test_the_health_command_asks_over_tls_and_trusts_anybody(port: ReservedPort, certificate: Certificate) -> None:
    asked = subprocess.run(
        outbox_relay("health"),
        env=os.environ | variables(port, certificate),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "ok\n", "")


def missing(certificate: Certificate, _authority: Authority) -> None:
    certificate.key_path.unlink()


def another_key(certificate: Certificate, authority: Authority) -> None:
    shutil.copy(authority.issue("other").key_path, certificate.key_path)


def a_key_with_a_password(certificate: Certificate, _authority: Authority) -> None:
    encrypt = ["openssl", "rsa", "-aes256", "-passout", "pass:sesame"]
    subprocess.run([*encrypt, "-in", certificate.key_path, "-out", certificate.key_path], check=True)


def no_pem(certificate: Certificate, _authority: Authority) -> None:
    certificate.path.write_text("a certificate\n")


@pytest.mark.parametrize("spoil", [missing, another_key, a_key_with_a_password, no_pem])
def test_a_certificate_that_cannot_be_used_exits_with_3_and_says_which_it_is(
    port: ReservedPort, authority: Authority, certificate: Certificate, spoil: Callable[[Certificate, Authority], None]
) -> None:
    spoil(certificate, authority)
    ended = subprocess.run(
        outbox_relay("run"),
        env=os.environ | variables(port, certificate),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3
    assert f"the certificate {certificate.path} and the key {certificate.key_path}: " in ended.stderr
