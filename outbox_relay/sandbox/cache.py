"""Directories that are made once and kept: complete or absent, whatever interrupts their making."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def make_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """
    *target*, filled by *fill* unless it is there already.

    It is filled under a temporary name and then renamed. Two processes may do it at the same time; the first one wins.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        unfinished = Path(temporary) / target.name
        unfinished.mkdir(mode=0o755)
        fill(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target
