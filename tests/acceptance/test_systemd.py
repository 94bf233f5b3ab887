"""The systemd unit: what systemd itself says of it, and that it agrees with the relay and with docs/systemd.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_relay.cli.exits import ExitCode
from outbox_relay.config import Settings
from tests.fixtures.daemon import outbox_relay
from tests.fixtures.parts import missing_part

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "examples" / "systemd" / "outbox-relay.service"
PAGE = (ROOT / "docs" / "systemd.md").read_text(encoding="utf-8")
PROGRAM = "/opt/outbox-relay/bin/outbox-relay"
MOST_EXPOSURE = 15  # of 100; 12 with systemd 252, whose rating changes with the versions


@pytest.fixture(scope="module")
def directives() -> Mapping[str, list[str]]:
    found = defaultdict(list)
    for name, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE):
        found[name].append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit, with a program that exists here."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(PROGRAM, sys.executable), encoding="utf-8")
    return unit


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("systemd-analyze"):
        missing_part("systemd-analyze is missing: apt-get install systemd")
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_understands_every_line(installed: Path) -> None:
    verified = analyze("verify", "--man=no", installed)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_systemd_finds_it_hardly_exposed(installed: Path) -> None:
    rated = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}", installed)
    assert rated.returncode == 0, rated.stdout


def test_it_starts_the_command_that_the_page_installs(directives: Mapping[str, list[str]]) -> None:
    assert directives["ExecStart"] == [f"{PROGRAM} run"]
    assert f"python3 -m venv {PROGRAM.removesuffix('/bin/outbox-relay')}\n" in PAGE


def test_it_leaves_time_to_drain_and_does_not_repeat_what_cannot_work(directives: Mapping[str, list[str]]) -> None:
    [patience] = directives["TimeoutStopSec"]
    assert int(patience) > Settings.model_fields["drain_timeout"].default
    assert directives["RestartPreventExitStatus"] == [str(int(ExitCode.CONFIGURATION))]


@pytest.mark.outside("it reads files of the test")
def test_settings_and_credentials_of_the_page_are_read_as_the_unit_passes_them(
    directives: Mapping[str, list[str]], tmp_path: Path
) -> None:
    [credentials] = directives["LoadCredential"]
    prefix, directory = credentials.split(":")
    files = re.findall(rf"{directory}/(\w+)$", PAGE, re.MULTILINE)
    for file in files:  # a directory's files become <its id>_<name>
        (tmp_path / f"{prefix}_{file}").write_text("host=db password=sesame\n")
    [settings] = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "relay.toml").write_text(settings)

    given = dict(line.split("=", 1) for line in directives["Environment"])
    here = {"/etc/outbox-relay": str(tmp_path), "%d": str(tmp_path)}
    variables = {name: re.sub("|".join(here), lambda found: here[found[0]], value) for name, value in given.items()}
    shown = subprocess.run(
        outbox_relay("config", "show", "--json"),
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    sources = {name: row["source"] for name, row in json.loads(shown.stdout).items() if row["source"] != "default"}
    assert sources == {
        "OUTBOX_RELAY_DATABASE_URL": "secret file",
        "OUTBOX_RELAY_KAFKA__SASL_PASSWORD": "secret file",
        "OUTBOX_RELAY_METRICS_PORT": "TOML file",
        "OUTBOX_RELAY_METRICS_HOST": "TOML file",
        "OUTBOX_RELAY_KAFKA__BOOTSTRAP_SERVERS": "TOML file",
        "OUTBOX_RELAY_KAFKA__SECURITY_PROTOCOL": "TOML file",
        "OUTBOX_RELAY_KAFKA__SASL_MECHANISM": "TOML file",
        "OUTBOX_RELAY_KAFKA__SASL_USERNAME": "TOML file",
    }
