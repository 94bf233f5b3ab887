"""Registers the fixture plugins, each of which is explained in its own file, and says what runs in one process."""

from __future__ import annotations

import os
from pathlib import Path

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

CHART = Path(__file__).with_name("chart")
SOAK = Path(__file__).parent / "faults" / "test_soak.py"


def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` means: one more than cores, since tests wait for their servers half of the time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Keep the tests of a file in one process, for the sake of what they share, and all that wait for helm's build.

    The soak takes minutes and little of the machine: it begins first, so that nobody waits for it in the end.
    """
    items.sort(key=lambda item: item.path != SOAK)
    for item in items:
        group = CHART if CHART in item.path.parents else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))
