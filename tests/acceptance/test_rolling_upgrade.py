"""
A rolling upgrade: the version before runs on the new schema, beside the new version, under load.

The version before is the last one that does not know the newest migration, as the history of the checkout has it.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.daemon import Daemon
from tests.fixtures.load import Plan
from tests.fixtures.pipeline import flaws
from tests.fixtures.postgres import SCRIPTS
from tests.fixtures.wheels import CHECKOUT, build, install, lend_dependencies

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.pipeline import Pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

NEWEST = SCRIPTS["outbox"][-1]


def git(*arguments: str) -> bytes:
    command = ("git", "-c", "safe.directory=*", *arguments)  # whoever owns the checkout
    return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=60).stdout


def version_before() -> str:
    """The commit to upgrade from: the parent of the one that brought the newest migration, or HEAD before it is in."""
    if not (CHECKOUT / ".git").exists():
        pytest.skip("these sources are no checkout: there is no history to take the version before from")
    if git("rev-parse", "--is-shallow-repository").strip() == b"true":
        pytest.skip("the history of the checkout is cut off: git fetch --unshallow")
    parents = git("log", "-1", "--diff-filter=A", "--format=%P", "--", str(NEWEST)).decode()
    if parents.isspace():
        pytest.skip("the history begins with the newest migration: there is no version before")
    return parents.split()[0] if parents else "HEAD"


@pytest.fixture(scope="module")
def old_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`outbox-relay run` of the version before, with the dependencies of this one."""
    directory: Path = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(git("archive", version_before()))) as sources:
        sources.extractall(directory / "source", filter="data")
    wheel = build(directory / "source", "wheel", directory=directory / "dist")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(f"/outbox/{NEWEST.name}")]
    environment = install(wheel, directory / "installed")
    lend_dependencies(environment)
    return [str(environment.directory / "bin" / "outbox-relay"), "run"]


def test_a_rolling_upgrade_under_load_loses_repeats_and_overtakes_nothing(
    pipeline: Pipeline, old_command: list[str]
) -> None:
    environment = pipeline.environment(log_level="debug", batch_size=1000)
    with ExitStack() as running:
        old = [running.enter_context(Daemon(environment, command=old_command)) for _ in range(2)]
        with pipeline.load(Plan(bulk_rows=100)) as load:
            for relay in old:
                relay.wait_for_event("batch_published")
            for relay in old:
                running.enter_context(Daemon(environment)).wait_for_event("batch_published")
                load.await_more(2_000)  # while both versions publish
                relay.terminate()
                assert relay.wait() == 0
            load.await_more(2_000)
        pipeline.await_settled()
    assert flaws(pipeline.judge(load.writes)) == {}


def test_the_version_before_drains_the_new_schema_alone(pipeline: Pipeline, old_command: list[str]) -> None:
    with pipeline.load() as load:
        load.await_more(5_000)
    with Daemon(pipeline.environment(), command=old_command):
        pipeline.await_settled()
    assert flaws(pipeline.judge(load.writes)) == {}
