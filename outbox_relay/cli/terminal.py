"""What people wrote into the database, made fit for a terminal."""

from __future__ import annotations


def printable(text: str, *, most: int | None = None) -> str:
    r"""
    Give *text* on one line, in at most *most* characters: what nobody would see is shown as `\x1b`, `\n` or `\u202e`.

    For people to read. It cannot be turned back, so what programs read is JSON.
    """
    cut = text if most is None else text[:most]
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in cut)
    return shown if most is None or max(len(shown), len(text)) <= most else f"{shown[: most - 1]}…"
