"""Java programs from Maven Central, fetched once for this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outbox_relay.errors import DependencyUnavailable
from outbox_relay.sandbox.cache import make_once

if TYPE_CHECKING:
    from collections.abc import Mapping

LOG_TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Jars:
    """
    A program and all that it needs, as a pom lists it.

    Attributes:
        name: What an operator calls it.
        pom: Its dependencies; their versions are properties.
        versions: The properties, by name.
    """

    name: str
    pom: Path
    versions: Mapping[str, str]

    @property
    def directory(self) -> Path:
        """Where the jars are, or will be."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        versions = "-".join(self.versions.values())
        return Path(cache) / "outbox-relay" / f"{self.name.lower()}-{versions}"

    @property
    def class_path(self) -> str:
        """All of them, for `java -cp`."""
        return f"{self.directory}/*"

    def what_is_missing(self) -> str | None:
        """What has to be installed before the program can run here, and how; None when nothing is missing."""
        if not shutil.which("java"):
            return f"{self.name} needs Java 17 or newer: apt-get install openjdk-17-jre-headless"
        if not self.directory.exists() and not shutil.which("mvn"):
            return f"fetching {self.name} needs Maven: apt-get install maven"
        return None

    def fetch(self) -> None:
        """
        Have Maven fetch them unless they are here: some 90 files, 50 MB, about a minute.

        Raises:
            DependencyUnavailable: Maven could not; the message ends with what it said.
        """
        make_once(self.directory, self._copy)

    def _copy(self, directory: Path) -> None:
        versions = [f"-D{name}={version}" for name, version in self.versions.items()]
        goal = ("dependency:copy-dependencies", *versions, f"-DoutputDirectory={directory}")
        command = ("mvn", "--batch-mode", "--quiet", "--file", str(self.pom), *goal)
        fetched = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 -- our own pom
        if fetched.returncode:
            raise DependencyUnavailable(f"Maven could not fetch {self.name}\n{fetched.stdout[-LOG_TAIL_CHARACTERS:]}")
