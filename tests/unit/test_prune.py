"""How long messages are kept, as it is written, and when the command refuses to remove any."""

from __future__ import annotations

from contextlib import suppress

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from outbox_relay.cli.prune import prune
from outbox_relay.config import Settings, load
from outbox_relay.config.durations import duration_seconds
from outbox_relay.errors import ConfigurationError

DAY = 86_400.0


@pytest.fixture(autouse=True)
def _unreachable_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_DATABASE_URL", "host=127.0.0.1 port=1")
    monkeypatch.delenv("OUTBOX_RELAY_RETENTION", raising=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("90", 90.0), ("1.5s", 1.5), ("2m", 120.0), ("36 h", 36 * 3600.0), (" 7d ", 7 * DAY)],
)
def test_a_duration_is_seconds_or_has_a_unit(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds


@given(st.floats(allow_nan=True, allow_infinity=True).map(str) | st.text(max_size=5))
def test_a_duration_is_never_negative_nor_without_end(text: str) -> None:
    with suppress(ValueError):
        assert 0 <= duration_seconds(text) < float("inf")


def test_messages_are_kept_for_a_week_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().settings.retention == 7 * DAY
    monkeypatch.setenv("OUTBOX_RELAY_RETENTION", "36h")
    assert load().settings.retention == 36 * 3600.0
    assert load({"retention": "0"}).settings.retention == Settings(retention=0).retention == 0.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("-1", "'-1' is no duration: write seconds, or a number with s, m, h or d, such as 7d"),
        ("7 weeks", "'7 weeks' is no duration: write seconds, or a number with s, m, h or d, such as 7d"),
        ("40000d", "40000d is more than 3153600000.0: lower it to 3153600000.0 or less"),
    ],
)
def test_a_retention_that_is_none_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_RETENTION", text)
    with pytest.raises(ConfigurationError) as refusal:
        load()
    assert str(refusal.value) == f"OUTBOX_RELAY_RETENTION: {problem}"


@pytest.mark.parametrize(
    ("arguments", "retention", "problem"),
    [
        ([], "7d", "nobody can be asked here: add --yes to remove messages, or --dry-run to count them"),
        (["--yes"], "0", "the retention is 0, which keeps messages for ever: give --older-than, such as 30d"),
        (["--yes", "--older-than", "0s"], "7d", "0s is not between 0 and 100 years"),
        (["--yes", "--older-than", "-7d"], "7d", "'-7d' is no duration"),
        (["--yes", "--older-than", "40000d"], "7d", "40000d is not between 0 and 100 years"),
    ],
)
def test_the_command_removes_nothing_that_it_was_not_clearly_told_to(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], retention: str, problem: str
) -> None:
    monkeypatch.setenv("OUTBOX_RELAY_RETENTION", retention)
    refused = CliRunner().invoke(prune, arguments)
    assert refused.exit_code == 2
    assert problem in refused.stderr
    assert refused.stdout == ""
