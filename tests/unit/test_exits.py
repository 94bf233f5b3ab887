"""With which code the command ends, and what it says then."""

from __future__ import annotations

from typing import NoReturn

import pytest
from click.testing import CliRunner

from outbox_relay.cli import cli
from outbox_relay.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    InvalidMessage,
    KafkaUnavailable,
    MigrationError,
    OperationRefused,
    SchemaMismatch,
)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigurationError("a\nb"), 3, "outbox-relay: a\noutbox-relay: b\n"),
        (SchemaMismatch("no table"), 3, "outbox-relay: no table\n"),
        (DatabaseUnavailable("refused"), 4, "outbox-relay: refused\n"),
        (KafkaUnavailable("refused"), 4, "outbox-relay: refused\n"),
        (OperationRefused("not parked"), 2, "outbox-relay: not parked\n"),
        (InvalidMessage("no JSON"), 2, "outbox-relay: no JSON\n"),
        (MigrationError("syntax"), 1, "outbox-relay: syntax\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_each_kind_of_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> NoReturn:
        raise error

    monkeypatch.setattr("outbox_relay.cli.options.load", fail)

    result = CliRunner().invoke(cli, ["config", "show"])

    assert (result.exit_code, result.stdout, result.stderr) == (code, "", words)
