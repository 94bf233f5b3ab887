"""One pipeline to stderr for every log line: ours, the standard library's and librdkafka's."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from collections.abc import Collection

    from structlog.typing import EventDict, Processor, WrappedLogger

_REDACTED = "********"
_REPEAT_SECONDS = 60.0
_NOT_THE_WORDS = re.compile(r"\[[^]]*\]|\(after .*")  # producer and thread; how long, and how often before


def configure(
    *,
    log_format: Literal["auto", "json", "console"],
    level: Literal["debug", "info", "warning", "error"],
    secrets: Collection[str] = (),
) -> Redaction:
    """
    Send every log line to stderr, as JSON or for a terminal; calling it again replaces what was configured.

    Gives what takes the secrets out, so that it can be told of further ones.

    librdkafka joins when a producer is given `logging.getLogger("librdkafka")`.

    Args:
        secrets: Values that are replaced wherever they appear in a line, in another library's words too.
    """
    on_terminal = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
    ]
    redaction = Redaction(secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(on_terminal=on_terminal),
                redaction,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *common,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    return redaction


def _renderers(*, on_terminal: bool) -> list[Processor]:
    if on_terminal:
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]


class OncePerMinute(logging.Filter):
    """
    Lets the same words through once a minute, whichever producer says them and however long it tried.

    librdkafka repeats itself at each attempt to connect: several lines a second for each lane while a broker is away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether *record* says something that was not said within the last minute."""
        words = _NOT_THE_WORDS.sub("", record.getMessage())
        is_news = record.created - self._said_at.get(words, 0.0) >= _REPEAT_SECONDS
        if is_news:
            self._said_at = {said: at for said, at in self._said_at.items() if record.created - at < _REPEAT_SECONDS}
            self._said_at[words] = record.created
        return is_news


class Redaction:
    """Last processor: takes the secrets out of the finished line, as they are and as JSON spells them."""

    def __init__(self, secrets: Collection[str]) -> None:
        self._spellings: list[str] = []
        self.hide(secrets)

    def hide(self, secrets: Collection[str]) -> None:
        """Take out *secrets* as well from now on, by whichever thread."""
        spellings = {*self._spellings, *secrets, *(json.dumps(secret)[1:-1] for secret in secrets)}
        self._spellings = sorted(filter(None, spellings), key=len, reverse=True)  # a longer one may contain a shorter

    def __call__(self, _logger: WrappedLogger, _method: str, line: str | EventDict) -> str:
        """Give *line* without the secrets."""
        text = str(line)
        for secret in self._spellings:
            text = text.replace(secret, _REDACTED)
        return text
