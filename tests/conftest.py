"""Registers the fixture plugins, each of which is explained in its own file, and says what runs in one process."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import pytest

pytest_plugins = [
    "tests.fixtures.postgres",
    "tests.fixtures.kafka",
    "tests.fixtures.pipeline",
    "tests.fixtures.shop",
    "tests.fixtures.ledger",
    "tests.fixtures.connect",
    "tests.fixtures.image",
]

CHART, SOAK = "tests/chart", "tests/faults/test_soak.py"


def pytest_configure() -> None:
    """Let the programs that tests start end on Ctrl-C, even if this run was started in the background of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` means: one more than cores, since tests wait for their servers half of the time."""
    return (os.cpu_count() or 1) + 1


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # untyped
    """Keeps the tests of a file in one process, for the sake of what they share, and all that wait for helm's build."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return CHART if file.startswith(CHART) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # in the order below
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the soak, which takes minutes and little of the machine, so that nobody waits for it in the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(SOAK))
