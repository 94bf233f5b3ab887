"""What a person is told about settings that are wrong: every problem, by its variable, and never a secret."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox_relay.config.names import PREFIX, did_you_mean, env_name
from outbox_relay.config.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_LIMITS = {
    "greater_than_equal": "{input} is less than {ge}: raise it to {ge} or more",
    "less_than_equal": "{input} is more than {le}: lower it to {le} or less",
    "literal_error": "{input!r} is none of {expected}",
    "string_pattern_mismatch": "{input!r} is no plain lower-case identifier",
    "value_error": "{error}",
}
_WITH_SECRETS = {"database_url", "kafka"}


def explain(error: ValidationError) -> str:
    """Return one line per problem, each with the variable, the value unless it is secret, and the remedy."""
    # A value that fits none of a union's types fails once for each of them.
    return "\n".join(dict.fromkeys(line for details in error.errors() for line in _lines(details)))


def _lines(details: ErrorDetails) -> Iterator[str]:
    location = [str(part) for part in details["loc"]]
    if not location:  # the rules between settings name their variables themselves
        yield str(details["ctx"]["error"])
        return
    name = ".".join(location[:2]) if location[0] == "kafka" else location[0]
    yield f"{env_name(name)}: {_problem(details, name=name)}"


def _problem(details: ErrorDetails, *, name: str) -> str:
    if details["type"] == "extra_forbidden":
        known = [*map(str.upper, Settings.fields()), "CONFIG", "SECRETS_DIR"]
        return f"unknown setting{did_you_mean(name.upper(), known=known, prefix=PREFIX)}"
    if name.startswith("kafka."):
        return "not a string, a number or a boolean"
    if details["type"] in _LIMITS:
        return _LIMITS[details["type"]].format(input=details["input"], **details["ctx"])
    message = details["msg"][0].lower() + details["msg"][1:]
    return message if name in _WITH_SECRETS else f"{details['input']!r}: {message}"
