"""Headers that carry the caller's trace to the consumer, when OpenTelemetry is installed."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def trace_headers() -> dict[str, str]:
    """
    Give what the global propagator says of the active span: `traceparent` and `tracestate`, unless set up otherwise.

    Empty without OpenTelemetry or without an active span.
    """
    inject = _propagator()
    headers: dict[str, str] = {}
    if inject is not None:
        inject(headers)
    return headers


@cache
def _propagator() -> Callable[[dict[str, str]], None] | None:
    try:
        from opentelemetry.propagate import inject  # noqa: PLC0415 -- an optional extra, looked for once
    except ImportError:
        return None
    return inject
