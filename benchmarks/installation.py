"""What is measured: this checkout, or another git revision of it with that revision's own locked requirements."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tests.fixtures.daemon import outbox_relay
from tests.fixtures.wheels import CHECKOUT, build, install

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Installation:
    """An `outbox-relay` that can be run: its name in the report, and the beginning of its command lines."""

    name: str
    program: tuple[str, ...]

    def command(self, *arguments: str) -> list[str]:
        """Return a command line."""
        return [*self.program, *arguments]

    def migrate(self, dsn: str) -> None:
        """Create its tables in an empty database."""
        environment = {**os.environ, "OUTBOX_RELAY_DATABASE_URL": dsn}
        subprocess.run(self.command("migrate", "apply"), env=environment, check=True, stdout=subprocess.DEVNULL)


def this_checkout() -> Installation:
    """Return the installation that runs from the working tree."""
    return Installation("checkout", tuple(outbox_relay()))


@contextmanager
def installed_revision(revision: str) -> Iterator[Installation]:
    """
    Build the wheel of a git *revision* and install it into a temporary environment; the working tree is not touched.

    Raises:
        subprocess.CalledProcessError: There is no such revision, or it cannot be built or installed.
    """
    commit = _git("rev-parse", "--short", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    with TemporaryDirectory(prefix="outbox-relay-revision-") as name:
        directory = Path(name)
        source = directory / "source"
        with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit))) as archive:
            archive.extractall(source, filter="data")
        environment = install(build(source, "wheel", directory=directory / "wheel"), directory / "environment")
        python = str(environment.directory / "bin" / "python")
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
        requirements = source / "requirements" / "daemon.txt"
        subprocess.run([*pip, "--require-hashes", "--requirement", str(requirements)], check=True)
        yield Installation(
            commit, (python, "-I", "-m", "outbox_relay")
        )  # isolated from PYTHONPATH, or it is the checkout


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE).stdout  # noqa: S607
