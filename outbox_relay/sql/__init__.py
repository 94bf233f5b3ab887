"""The statements, one per file, read once and bound to the configured schema."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

_COMMENT_LINE = re.compile(rb"^\s*--.*\n", re.MULTILINE)


def numbers(values: Iterable[int]) -> str:
    """Give *values* as the text of a PostgreSQL array; the driver's own way takes several times as long."""
    return "{" + ",".join(map(str, values)) + "}"


@cache
def statement(name: str, *, schema: str | None) -> bytes:
    """
    Give the statement in `<name>.sql` with `{schema}` replaced by the quoted *schema*; None leaves it to search_path.

    Comment lines are left out: the driver caches short statements only, and the server need not parse them each time.
    """
    text = _COMMENT_LINE.sub(b"", (files(__name__) / f"{name}.sql").read_bytes())
    if schema is None:
        return text.replace(b"{schema}.", b"").strip()
    return text.replace(b"{schema}", sql.Identifier(schema).as_bytes(None)).strip()
