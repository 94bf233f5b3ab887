"""Each rule of the settings, and the words in which a person is told of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from docs.generate import CONFIGURATION, configuration
from outbox_relay.config import Settings, load
from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"  # noqa: S105 -- what must not be shown


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OUTBOX_RELAY_"):
            monkeypatch.delenv(name)


def refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> list[str]:
    for name, value in variables.items():
        monkeypatch.setenv(f"OUTBOX_RELAY_{name}", value)
    with pytest.raises(ConfigurationError) as refusal:
        load()
    return str(refusal.value).splitlines()


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(text)
    return path


def test_without_any_source_every_setting_has_its_default() -> None:
    configuration = load()

    assert configuration.settings == Settings()
    assert configuration.origins == {}


def test_each_source_wins_over_those_below_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    names = ["batch_size", "lanes", "metrics_port", "source", "schema"]
    file = toml(tmp_path, 'batch_size = 1\nlanes = 1\nmetrics_port = 1\nsource = "1"\nschema = "a"\n')
    for name in names[:4]:
        (secrets / f"OUTBOX_RELAY_{name.upper()}").write_text("2\n")
    for name in names[:3]:
        (tmp_path / name).write_text("3\n")
        monkeypatch.setenv(f"OUTBOX_RELAY_{name.upper()}_FILE", str(tmp_path / name))
    for name in names[:2]:
        monkeypatch.setenv(f"OUTBOX_RELAY_{name.upper()}", "4")
    monkeypatch.setenv("OUTBOX_RELAY_SECRETS_DIR", str(secrets))

    configuration = load({"batch_size": "5"}, config_file=file)

    assert configuration.settings == Settings(batch_size=5, lanes=4, metrics_port=3, source="2", schema="a")
    assert configuration.origins == {
        "batch_size": "flag",
        "lanes": "environment",
        "metrics_port": "secret file",
        "source": "secret file",
        "schema": "TOML file",
    }


def test_the_toml_file_can_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_CONFIG", str(toml(tmp_path, 'batch_bytes = "1MiB"')))

    assert load().settings.batch_bytes == 1_048_576


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_LANES", "")
    monkeypatch.setenv("OUTBOX_RELAY_DATABASE_URL", "")

    assert load().settings == Settings()


def test_tables_and_lists_are_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_TOPIC_MAP", '{"order": "sales"}')
    monkeypatch.setenv("OUTBOX_RELAY_ALLOWED_TOPICS", '["sales", "other"]')

    assert load().settings == Settings(topic_map={"order": "sales"}, allowed_topics=frozenset({"sales", "other"}))


def test_librdkafka_properties_of_all_sources_are_merged_under_their_own_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS", "kafka:9092")
    monkeypatch.setenv("OUTBOX_RELAY_KAFKA__LOG_LEVEL", "3")
    monkeypatch.setenv("OUTBOX_RELAY_KAFKA__SASL_OAUTHBEARER_ASSERTION_FILE", "/a.jwt")
    (tmp_path / "password").write_text(SECRET)
    monkeypatch.setenv("OUTBOX_RELAY_KAFKA__SASL_PASSWORD_FILE", str(tmp_path / "password"))

    given = load(config_file=toml(tmp_path, '[kafka]\n"linger.ms" = 7000\nbatch.size = 2000000\n')).settings.kafka

    assert given == {
        "linger.ms": 7000,
        "batch.size": 2_000_000,
        "sasl.password": SECRET,
        "bootstrap.servers": "kafka:9092",
        "log_level": "3",
        "sasl.oauthbearer.assertion.file": "/a.jwt",
    }


def test_variables_that_kubernetes_adds_for_a_service_of_our_name_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("OUTBOX_RELAY_SERVICE_PORT_METRICS", "9090")
    monkeypatch.setenv("OUTBOX_RELAY_PORT", "tcp://10.0.0.1:9090")
    monkeypatch.setenv("OUTBOX_RELAY_PORT_9090_TCP_ADDR", "10.0.0.1")

    assert load().settings == Settings()


@pytest.mark.parametrize(
    ("variables", "problems"),
    [
        ({"LANES": "99"}, ["OUTBOX_RELAY_LANES: 99 is more than 16: lower it to 16 or less"]),
        ({"LANES": "0"}, ["OUTBOX_RELAY_LANES: 0 is less than 1: raise it to 1 or more"]),
        ({"BATCH_SIZE": "0"}, ["OUTBOX_RELAY_BATCH_SIZE: 0 is less than 1: raise it to 1 or more"]),
        ({"BATCH_BYTES": "1"}, ["OUTBOX_RELAY_BATCH_BYTES: 1 is less than 1024: raise it to 1024 or more"]),
        (
            {"BATCH_BYTES": "2GiB"},
            ["OUTBOX_RELAY_BATCH_BYTES: 2GiB is more than 1073741824: lower it to 1073741824 or less"],
        ),
        ({"BATCH_BYTES": "8Mx"}, ["OUTBOX_RELAY_BATCH_BYTES: '8Mx': could not interpret byte unit: Mx"]),
        ({"LOCK_TIMEOUT": "0"}, ["OUTBOX_RELAY_LOCK_TIMEOUT: 0 is less than 0.001: raise it to 0.001 or more"]),
        (
            {"LOCK_TIMEOUT": "0.0004"},
            ["OUTBOX_RELAY_LOCK_TIMEOUT: 0.0004 is less than 0.001: raise it to 0.001 or more"],
        ),
        (
            {"ORDERING_TIMEOUT": "3e6"},
            ["OUTBOX_RELAY_ORDERING_TIMEOUT: 3e6 is more than 2147483.0: lower it to 2147483.0 or less"],
        ),
        ({"LOCK_TIMEOUT": "inf"}, ["OUTBOX_RELAY_LOCK_TIMEOUT: 'inf': input should be a finite number"]),
        ({"ON_POISON": "skp"}, ["OUTBOX_RELAY_ON_POISON: 'skp' is none of 'park' or 'skip'"]),
        ({"SCHEMA": 'a"; drop'}, ["OUTBOX_RELAY_SCHEMA: 'a\"; drop' is no plain lower-case identifier"]),
        ({"SCHEMA": "a" * 64}, [f"OUTBOX_RELAY_SCHEMA: {'a' * 64!r} is no plain lower-case identifier"]),
        (
            {"FAILPOINTS": "after_claim=kill"},
            [
                (
                    "OUTBOX_RELAY_FAILPOINTS: makes the relay fail: remove it, or set"
                    " OUTBOX_RELAY_ALLOW_FAILPOINTS=true to mean it"
                )
            ],
        ),
        (
            {"FAILPOINTS": "after_claim=explode", "ALLOW_FAILPOINTS": "true"},
            [
                (
                    "OUTBOX_RELAY_FAILPOINTS: 'after_claim=explode' does nothing known: use kill, stop, raise or"
                    " sleep:SECONDS"
                )
            ],
        ),
        (
            {"SOURCE": "a\udcff"},
            ["OUTBOX_RELAY_SOURCE: holds a NUL character, or bytes that are not UTF-8: remove them"],
        ),
        (
            {"DATABASE_URL": f"host={SECRET}\udcff"},
            ["OUTBOX_RELAY_DATABASE_URL: holds a NUL character, or bytes that are not UTF-8: remove them"],
        ),
        ({"LANEZ": "2"}, ["OUTBOX_RELAY_LANEZ: unknown setting; did you mean OUTBOX_RELAY_LANES?"]),
        ({"QQQ": SECRET}, ["OUTBOX_RELAY_QQQ: unknown setting"]),
        ({"LANES__X": "2"}, ["OUTBOX_RELAY_LANES__X: unknown setting; did you mean OUTBOX_RELAY_LANES?"]),
        (
            {"TOPIC_MAP": "{"},
            [
                (
                    "OUTBOX_RELAY_TOPIC_MAP: not JSON: Expecting property name enclosed in double quotes: "
                    "line 1 column 2 (char 1)"
                )
            ],
        ),
        (
            {"TOPIC_MAP": '{"a": ".."}'},
            ["OUTBOX_RELAY_TOPIC_MAP: '..' is no topic name: use 1 to 249 of the characters a-z A-Z 0-9 . _ -"],
        ),
        (
            {"TOPIC_TEMPLATE": "{aggregate_id}"},
            [
                (
                    "OUTBOX_RELAY_TOPIC_TEMPLATE: '{aggregate_id}' is no topic template: "
                    "its only placeholder is {aggregate_type}"
                )
            ],
        ),
        (
            {"TOPIC_TEMPLATE": "{aggregate_type} x"},
            ["OUTBOX_RELAY_TOPIC_TEMPLATE: 'a x' is no topic name: use 1 to 249 of the characters a-z A-Z 0-9 . _ -"],
        ),
        (
            {"TOPIC_MAP": '{"a": "b"}', "ALLOWED_TOPICS": '["c"]'},
            ["OUTBOX_RELAY_TOPIC_MAP: b is not among the allowed topics: add it to OUTBOX_RELAY_ALLOWED_TOPICS"],
        ),
        (
            {"DATABASE_URL": f"{SECRET} {SECRET}"},
            [
                (
                    "OUTBOX_RELAY_DATABASE_URL: not a connection string: write postgresql://user@host/database or "
                    "host=... dbname=...; the value is not shown because it may hold a password"
                )
            ],
        ),
        (
            {"KAFKA": "{"},
            [
                (
                    "OUTBOX_RELAY_KAFKA: not JSON: set single properties instead, "
                    "e.g. OUTBOX_RELAY_KAFKA__COMPRESSION_TYPE=zstd"
                )
            ],
        ),
        ({"KAFKA": "5"}, ["OUTBOX_RELAY_KAFKA: not a table of librdkafka properties"]),
        (
            {"LANES_FILE": "/nowhere/lanes"},
            ["OUTBOX_RELAY_LANES_FILE: /nowhere/lanes cannot be read: No such file or directory"],
        ),
        (
            {"SECRETS_DIR": "/nowhere"},
            ["OUTBOX_RELAY_SECRETS_DIR: /nowhere cannot be read: No such file or directory"],
        ),
        ({"CONFIG": "/nowhere.toml"}, ["--config: /nowhere.toml cannot be read: No such file or directory"]),
        (
            {"LANES": "x", "ON_POISON": "y"},
            [
                "OUTBOX_RELAY_LANES: 'x': input should be a valid integer, unable to parse string as an integer",
                "OUTBOX_RELAY_ON_POISON: 'y' is none of 'park' or 'skip'",
            ],
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problems: list[str]
) -> None:
    assert refused(monkeypatch, variables) == problems


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"PUBLISH_DEADLINE": "25", "DRAIN_TIMEOUT": "25"},
            "OUTBOX_RELAY_KAFKA__MESSAGE_TIMEOUT_MS: 25 s is too short beside OUTBOX_RELAY_PUBLISH_DEADLINE of 25 s",
        ),
        (
            {"KAFKA__DELIVERY_TIMEOUT_MS": "30000"},
            "OUTBOX_RELAY_TRANSACTION_TIMEOUT: 30 s is too short beside OUTBOX_RELAY_KAFKA__MESSAGE_TIMEOUT_MS of 30 s",
        ),
        (
            {"DRAIN_TIMEOUT": "14.9"},
            "OUTBOX_RELAY_DRAIN_TIMEOUT: 14.9 s is too short beside OUTBOX_RELAY_PUBLISH_DEADLINE of 15 s",
        ),
        (
            {"STATEMENT_TIMEOUT": "2"},
            "OUTBOX_RELAY_STATEMENT_TIMEOUT: 2 s is too short beside OUTBOX_RELAY_LOCK_TIMEOUT of 2 s",
        ),
        (
            {"POLL_INTERVAL": "0.2"},
            "OUTBOX_RELAY_IDLE_POLL_INTERVAL: 0.1 s is too short beside OUTBOX_RELAY_POLL_INTERVAL of 0.2 s",
        ),
    ],
    ids=str,
)
def test_times_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    assert refused(monkeypatch, variables) == [f"{problem}: raise it, or lower the other"]


def test_a_canary_that_may_not_be_published_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {"ALLOWED_TOPICS": '["order.events"]'}
    assert refused(monkeypatch, {**allowed, "CANARY_INTERVAL": "60"}) == [
        "OUTBOX_RELAY_CANARY_INTERVAL: canaries go to outbox-relay-canary.events: add it to OUTBOX_RELAY_ALLOWED_TOPICS"
    ]


def test_a_canary_that_is_mapped_to_an_allowed_topic_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_ALLOWED_TOPICS", '["health"]')
    monkeypatch.setenv("OUTBOX_RELAY_TOPIC_MAP", '{"outbox-relay-canary": "health"}')
    monkeypatch.setenv("OUTBOX_RELAY_CANARY_INTERVAL", "60")
    assert load().settings.canary_interval == 60.0


@pytest.mark.parametrize(
    ("given", "missing"),
    [("METRICS_CERTIFICATE", "METRICS_CERTIFICATE_KEY"), ("METRICS_CERTIFICATE_KEY", "METRICS_CERTIFICATE")],
)
def test_a_certificate_and_its_key_go_together(monkeypatch: pytest.MonkeyPatch, given: str, missing: str) -> None:
    assert refused(monkeypatch, {given: "/etc/relay/tls"}) == [
        f"OUTBOX_RELAY_{missing}: not set: a certificate and its key go together"
    ]


def test_a_message_timeout_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, {"KAFKA__MESSAGE_TIMEOUT_MS": "long"}) == [
        "OUTBOX_RELAY_KAFKA__MESSAGE_TIMEOUT_MS: not a whole number: write digits alone, without a unit"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lanez = 2", "OUTBOX_RELAY_LANEZ: unknown setting; did you mean OUTBOX_RELAY_LANES?"),
        ("schema_name = 'a'", "OUTBOX_RELAY_SCHEMA_NAME: unknown setting; did you mean OUTBOX_RELAY_SCHEMA?"),
        ("[kafka]\n'linger.ms' = [5]", "OUTBOX_RELAY_KAFKA__LINGER_MS: not a string, a number or a boolean"),
        ('source = "a\\u0000"', "OUTBOX_RELAY_SOURCE: holds a NUL character, or bytes that are not UTF-8: remove them"),
        ("lanes = ", "{path} is no TOML: Invalid value (at end of document)"),
    ],
)
def test_a_wrong_toml_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = toml(tmp_path, text)

    with pytest.raises(ConfigurationError) as refusal:
        load(config_file=path)

    assert str(refusal.value) == problem.format(path=path)


def test_a_secret_file_that_is_no_text_is_refused_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_bytes(b"\xff" + SECRET.encode())

    with pytest.raises(ConfigurationError) as refusal:
        load(config_file=path)

    assert str(refusal.value) == f"--config: {path} is not UTF-8 text"


def test_settings_do_not_print_secrets() -> None:
    settings = Settings.model_validate(
        {"database_url": f"postgresql://u:{SECRET}@h/d", "kafka": {"sasl.password": SECRET}}
    )

    assert SECRET not in repr(settings)


def test_secrets_are_the_url_its_passwords_and_those_of_kafka() -> None:
    url = "postgresql://u:p%40ss@h/d?sslpassword=key"
    settings = Settings.model_validate(
        {"database_url": url, "kafka": {"sasl.password": SECRET, "sasl.username": "u", "linger.ms": 5000}}
    )

    assert settings.secrets() == {url, "p@ss", "key", SECRET}


def test_the_page_on_configuration_is_up_to_date() -> None:
    page = CONFIGURATION.read_text(encoding="utf-8")

    assert page == configuration(page), "renew it: .venv/bin/python docs/generate.py"
