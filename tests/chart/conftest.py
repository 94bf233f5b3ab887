"""What every test of the chart starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.helm import Helm

TIMEOUT_SECONDS = 900  # the first test on a machine builds helm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm-home"))
