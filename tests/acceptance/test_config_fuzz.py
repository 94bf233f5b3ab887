"""Hostile settings through the real start of the commands: an answer in one line a problem, never a traceback."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from outbox_relay.cli import cli
from outbox_relay.config import Settings
from outbox_relay.config.kafka import SECRETS, kinds
from outbox_relay.config.names import env_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from tests.fixtures.pipeline import Pipeline

DRAWS = int(os.environ.get("RELAY_FUZZ_SETTINGS", "24"))
COMMANDS = (("config", "show"), ("run", "--once"), ("doctor",))
REFUSED = 3
EXIT_CODES = {0, REFUSED, 4, 5}
BRIEF = {"PUBLISH_DEADLINE": "2", "KAFKA__MESSAGE_TIMEOUT_MS": "3000", "KAFKA__SOCKET_TIMEOUT_MS": "1000"}

NUMBERS = (
    *("0", "1", "2", "5", "20", "100", "1000", "5000", "20000") * 3,
    *("-1", "1_000", "65535", "65536", "1000000", "2147483647", "2147483648"),
    *(
        "4294967297",
        "-2147483649",
        "9223372036854775807",
        "1" + "0" * 20,
        "9" * 5000,
        "0.5",
        "1e3",
        "1e400",
        "nan",
        "inf",
    ),
    *("0x10", "5s", "36h", "8MiB", "1e6 B", " 5", "5 ", "+5", "\u0665", "true", ""),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "ä",
        "a b",
        "a\nb",
        "a\tb",
        "a'b",
        'a"b',
        "a\\b",
        "{",
        "}",
        "{}",
        "{a}",
        "{aggregate_type}",
        "%s",
        "%",
    ),
    *(
        "x" * 5000,
        "\udcff",
        "\x1b[31m",
        "-",
        "--",
        "null",
        "None",
        "[]",
        '["a"]',
        '{"a": "b"}',
        '{"a": 1}',
        '{"a": {}}',
    ),
    *("/nowhere", "/", "/etc", "/etc/hostname", "/dev/null", ".", "probe", "http://h", "https://h/p", "file:///etc"),
    *(
        "host:1",
        "kafka://h:1",
        "h:1,h:2",
        "[::1]:1",
        "::1",
        "a:1 b:2",
        ",",
        "public",
        "Public",
        "a;b",
        "$$",
        "principal=a",
    ),
)
CHOICES = (
    *("all", "-1", "park", "skip", "json", "info", "native", "cloudevents", "lz4", "zstd", "none", "random", "murmur2"),
    *("consistent_random", "ssl", "sasl_ssl", "sasl_plaintext", "SASL_PLAINTEXT", "PLAIN", "SCRAM-SHA-256", "GSSAPI"),
    *(
        "OAUTHBEARER",
        "oidc",
        "default",
        "aws_iam",
        "azure_imds",
        "client_credentials",
        "lifo",
        "fifo",
        "v4",
        "v6",
        "any",
    ),
    *(
        "debug",
        "rebootstrap",
        "RS256",
        "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "true",
        "false",
        "t",
        "f",
        "1",
        "0",
    ),
)
EXTREMES = (
    "0",
    "1e-9",
    "0.0004",
    "0.001",
    "1",
    "16",
    "1e6",
    "2147483.6",
    "2147484",
    "1e9",
    "3e9",
    "1e15",
    "1e300",
    "true",
)
ADDRESSES = ("127.0.0.1:1", "kafka://127.0.0.1:1", "127.0.0.1", "PLAINTEXT://127.0.0.1:1", "127.0.0.1:1,", "[::1]:1")


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OUTBOX_RELAY_", "PG")):
            monkeypatch.delenv(name)


def draw(chance: random.Random) -> dict[str, str]:
    """Some settings and properties, most with a value of their kind, and some with any."""
    settings = [name for name in Settings.fields() if name != "kafka"]
    properties = (
        sorted(kinds()) + sorted(SECRETS) + ["error_cb", "default.topic.config", "opaque", "", "no.such", "a_b"]
    )
    variables = {"OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": chance.choice([ADDRESSES[0]] * 9 + [*ADDRESSES, *TEXTS])}
    for name in chance.sample(settings, chance.choice([0, 0, 1, 1, 3])):
        likely = NUMBERS if isinstance(Settings.fields()[name].default, int | float) else TEXTS
        variables[env_name(name)] = chance.choice(chance.choice([likely, likely, NUMBERS, TEXTS, CHOICES]))
    for name in chance.sample(properties, chance.choice([0, 1, 1, 3])):
        variables[env_name(f"kafka.{name}")] = value_of(kinds().get(name, "text"), chance=chance)
    return {name: value for name, value in variables.items() if "\0" not in value}


def value_of(kind: str, *, chance: random.Random) -> str:
    likely = {"integer": NUMBERS, "decimal": NUMBERS, "boolean": CHOICES, "choice": CHOICES}.get(kind, TEXTS)
    return chance.choice(chance.choice([likely, likely, NUMBERS, TEXTS, CHOICES]))


@contextmanager
def as_before() -> Iterator[None]:
    """What the daemon changes in its process is its own, and is put back here."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers, level = logging.root.handlers[:], logging.root.level
    thresholds = gc.get_threshold()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in signals.items():
            signal.signal(number, handler)
        logging.root.handlers[:], logging.root.level = handlers, level
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the sockets of the signals last as long as the process
            gc.collect()


def complaints(command: tuple[str, ...], variables: dict[str, str], *, names_the_setting: bool = True) -> list[str]:
    """Call a command and say what is wrong with its answer."""
    with as_before():
        return _complaints(CliRunner().invoke(cli, command, env=dict(variables)), names_the_setting=names_the_setting)


def _complaints(result: Result, *, names_the_setting: bool) -> list[str]:
    found = []
    if result.exit_code not in EXIT_CODES or not isinstance(result.exception, SystemExit | None):
        found.append(f"exit code {result.exit_code}: {result.exception!r}")
    if "Traceback" in result.output:
        found.append(f"a traceback: {result.output[-600:]}")
    lines = result.stderr.splitlines()
    named = [line for line in lines if line.startswith("outbox-relay: OUTBOX_RELAY_")]
    if names_the_setting and result.exit_code == REFUSED and (not named or named != lines):
        found.append(f"does not name the setting: {lines}")
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_whatever_is_set_each_command_starts_or_names_the_setting_in_one_line(
    command: tuple[str, ...], seed: int
) -> None:
    """PostgreSQL and Kafka are away: nothing listens at port 1."""
    chance = random.Random(seed)  # noqa: S311 -- reproducible
    found: dict[str, dict[str, str]] = {}
    away = {"OUTBOX_RELAY_DATABASE_URL": "host=127.0.0.1 port=1 user=u connect_timeout=2"}
    for _ in range(DRAWS):
        variables = away | {f"OUTBOX_RELAY_{name}": value for name, value in BRIEF.items()} | draw(chance)
        for complaint in complaints(command, variables):
            found.setdefault(complaint, variables)
    assert found == {}


@pytest.mark.kafka
def test_extreme_settings_publish_or_end_with_a_reason(pipeline: Pipeline, seed: int) -> None:
    """PostgreSQL and Kafka are there, and judge what the settings allow."""
    chance = random.Random(seed)  # noqa: S311 -- reproducible
    numbers = [name for name, field in Settings.fields().items() if isinstance(field.default, int | float)]
    found: dict[str, dict[str, str]] = {}
    for _ in range(DRAWS // 4):
        drawn = {env_name(name): chance.choice(EXTREMES) for name in chance.sample(numbers, chance.choice([1, 1, 2]))}
        variables = pipeline.environment() | drawn
        for complaint in complaints(("run", "--once"), variables, names_the_setting=False):
            found.setdefault(complaint, drawn)
    assert found == {}
