"""The real command `outbox-relay config`, as a person or a script calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.daemon import outbox_relay

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"  # noqa: S105 -- what must not be shown
BROKER = {"OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_RELAY_")}
    return subprocess.run(
        outbox_relay(*arguments),
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.outside("it reads files of the test")
def test_show_names_the_source_of_every_value(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('on_poison = "skip"\n[kafka]\n"linger.ms" = 7000\n')
    (tmp_path / "dsn").write_text(f"postgresql://u:{SECRET}@h/d\n")

    shown = run(
        *("config", "show", "--json", "--config", str(file), "--batch-size", "7", "--synchronous-commit"),
        OUTBOX_RELAY_LANES="3",
        OUTBOX_RELAY_DATABASE_URL_FILE=str(tmp_path / "dsn"),
        OUTBOX_RELAY_KAFKA__SASL_PASSWORD=SECRET,
        **BROKER,
    )

    assert (shown.returncode, shown.stderr) == (0, "")
    given = {name: row for name, row in json.loads(shown.stdout).items() if row["source"] != "default"}
    assert given == {
        "OUTBOX_RELAY_DATABASE_URL": {"value": "********", "source": "secret file"},
        "OUTBOX_RELAY_LANES": {"value": 3, "source": "environment"},
        "OUTBOX_RELAY_BATCH_SIZE": {"value": 7, "source": "flag"},
        "OUTBOX_RELAY_ON_POISON": {"value": "skip", "source": "TOML file"},
        "OUTBOX_RELAY_SYNCHRONOUS_COMMIT": {"value": True, "source": "flag"},
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": {"value": "127.0.0.1:1", "source": "environment"},
        "OUTBOX_RELAY_KAFKA__LINGER_MS": {"value": 7000, "source": "TOML file"},
        "OUTBOX_RELAY_KAFKA__SASL_PASSWORD": {"value": "********", "source": "environment"},
    }


def test_show_for_people_is_a_line_per_setting() -> None:
    shown = run("config", "show", OUTBOX_RELAY_LANES="3", **BROKER)

    lines = [line.split() for line in shown.stdout.splitlines()]
    assert shown.returncode == 0
    assert ["OUTBOX_RELAY_LANES", "3", "(environment)"] in lines
    assert ["OUTBOX_RELAY_ON_POISON", "park", "(default)"] in lines


def test_show_prints_the_settings_even_when_librdkafka_refuses_them() -> None:
    shown = run("config", "show", "--json", OUTBOX_RELAY_KAFKA__SASL_PASWORD=SECRET, **BROKER)

    assert shown.returncode == 3
    assert json.loads(shown.stdout)["OUTBOX_RELAY_KAFKA__SASL_PASWORD"]["value"] == "********"
    assert shown.stderr == (
        'outbox-relay: OUTBOX_RELAY_KAFKA__SASL_PASWORD: No such configuration property: "sasl.pasword"; '
        "did you mean sasl.password?\n"
    )


@pytest.mark.parametrize(
    "variable", ["DATABASE_URL", "TOPIC_MAP", "QQQ", "KAFKA", "KAFKA__ACKS", "KAFKA__SSL_KEY_PEM", "SECRETS_DIR"]
)
def test_no_error_contains_a_secret_that_went_into_the_wrong_variable(variable: str) -> None:
    shown = run("config", "show", **{f"OUTBOX_RELAY_{variable}": f"pass {SECRET}", "OUTBOX_RELAY_LANES": "99"})

    assert shown.returncode == 3
    assert variable == "SECRETS_DIR" or SECRET not in shown.stdout + shown.stderr


def test_every_problem_is_told_on_stderr_at_once() -> None:
    shown = run("config", "show", OUTBOX_RELAY_LANES="99", OUTBOX_RELAY_LANEZ="1")

    assert (shown.returncode, shown.stdout) == (3, "")
    assert shown.stderr.splitlines() == [
        "outbox-relay: OUTBOX_RELAY_LANES: 99 is more than 16: lower it to 16 or less",
        "outbox-relay: OUTBOX_RELAY_LANEZ: unknown setting; did you mean OUTBOX_RELAY_LANES?",
    ]


def test_schema_is_the_json_schema_of_the_toml_file() -> None:
    schema = json.loads(run("config", "schema").stdout)

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["lanes"].items() >= {"type": "integer", "minimum": 1, "maximum": 16}.items()


def test_a_wrong_option_is_a_usage_error() -> None:
    assert run("config", "show", "--on-poison", "burn").returncode == 2


def test_no_secret_can_be_given_on_the_command_line() -> None:
    assert run("config", "show", "--database-url", SECRET).returncode == 2


def test_version_and_help_need_no_settings() -> None:
    assert run("--version").stdout.startswith("outbox-relay, version ")
    assert run("config", "-h").returncode == 0


def test_reading_the_settings_does_not_load_librdkafka() -> None:
    code = "import sys, outbox_relay.cli.config; sys.exit('confluent_kafka' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
