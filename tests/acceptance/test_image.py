"""The image: what it holds, what an engine is told, and how a relay runs inside; `--image` runs the others there."""

from __future__ import annotations

import os
import re
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outbox_relay import __version__
from outbox_relay.sandbox.ports import ReservedPort
from tests.fixtures.daemon import Daemon
from tests.fixtures.image import CHECKOUT, REVISION
from tests.fixtures.load import commit_messages
from tests.fixtures.pipeline import flaws

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fixtures.image import Image
    from tests.fixtures.pipeline import Pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("relays_in_the_image"),
    pytest.mark.timeout(900),  # the first one builds, and the first on a machine fetches Debian
]

HOME = "opt/outbox-relay"
STICKY = {"tmp", "var/tmp", "run/lock"}  # open to all in every Debian; the file system is read-only
BUILD_TOOLS = {"as", "c++", "cargo", "cc", "cmake", "gcc", "g++", "ld", "make", "pip", "pip3", "rustc", "uv"}


def files(root: Path) -> Iterator[Path]:
    """All that the image has of files and directories, but no links."""
    for directory, _, names in os.walk(root):
        yield Path(directory)
        yield from (path for path in (Path(directory) / name for name in names) if not path.is_symlink())


def test_an_engine_is_told_who_runs_what_and_how_to_ask_for_its_health(image: Image) -> None:
    assert {name: image.config[name] for name in ("User", "Entrypoint", "Cmd", "StopSignal", "ExposedPorts")} == {
        "User": "65532:65532",
        "Entrypoint": ["outbox-relay"],
        "Cmd": ["run"],
        "StopSignal": "SIGTERM",
        "ExposedPorts": {"9464/tcp": {}},
    }
    assert image.config["Healthcheck"]["Test"] == ["CMD", "outbox-relay", "health"]
    assert {name.partition("=")[0] for name in image.config["Env"]} == {
        "PATH",
        "SSL_CERT_FILE",
        "OUTBOX_RELAY_METRICS_PORT",
    }


def test_labels_tell_version_source_and_licence(image: Image) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in image.config["Labels"].items()}
    assert labels.pop("io.buildah.version")
    source = "https://github.com/outbox-relay/outbox-relay"
    assert labels == {
        "title": "outbox-relay",
        "description": "Transactional outbox relay from PostgreSQL to Kafka",
        "licenses": "Apache-2.0",
        "source": source,
        "documentation": f"{source}/blob/main/docs/container.md",
        "version": __version__,
        "revision": REVISION,
    }


def test_it_has_the_locked_packages_and_no_other(image: Image) -> None:
    locked = re.findall(r"^(\S+)==(\S+)(?! ; sys_platform == 'win32')\s", lock("daemon"), re.MULTILINE)
    expected = {f"{name.replace('-', '_')}-{version}.dist-info" for name, version in locked}
    found = {path.name for path in (image.root / HOME).glob("lib/python3.*/site-packages/*.dist-info")}
    assert found == expected | {f"outbox_relay-{__version__}.dist-info"}


def lock(name: str) -> str:
    return (CHECKOUT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["daemon", "build"])
def test_every_locked_version_is_the_one_that_the_tests_run_with(name: str) -> None:
    pins = re.findall(r"^\S+==\S+", lock(name), re.MULTILINE)
    assert set(pins) <= set(re.findall(r"^\S+==\S+", lock("dev"), re.MULTILINE))


def test_nothing_to_build_with_and_no_source_is_left_in_it(image: Image) -> None:
    programs = {path.name for path in image.root.glob("**/bin/*")}
    assert programs & BUILD_TOOLS == set()
    assert [path for path in image.root.glob("**/pip") if path.is_dir()] == []
    assert [path for path in image.root.glob("**/ensurepip") if path.is_dir()] == []
    assert not (image.root / "build").exists()
    assert len(list(image.root.glob("**/outbox_relay"))) == 1


def test_no_file_lends_its_owner_s_rights_and_none_can_be_written(image: Image) -> None:
    modes = {path: path.lstat() for path in files(image.root)}
    lends = stat.S_ISUID | stat.S_ISGID
    assert [path for path, found in modes.items() if stat.S_ISREG(found.st_mode) and found.st_mode & lends] == []
    open_to_all = [path for path, found in modes.items() if found.st_mode & stat.S_IWOTH and not is_device(found)]
    assert {str(path.relative_to(image.root)) for path in open_to_all} <= STICKY
    ours = {path: found for path, found in modes.items() if path.is_relative_to(image.root / HOME)}
    assert [path for path, found in ours.items() if found.st_uid or found.st_mode & stat.S_IWGRP] == []


def is_device(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode)


def test_it_runs_as_anybody_without_capabilities_on_a_read_only_root(image: Image) -> None:
    status = image.run("cat", "/proc/self/status").stdout
    facts = dict(re.findall(r"^(Uid|Cap(?:Prm|Eff|Bnd)|NoNewPrivs):\t(\w+)", status, re.MULTILINE))
    none = "0000000000000000"
    assert facts == {"Uid": "12345", "CapPrm": none, "CapEff": none, "CapBnd": none, "NoNewPrivs": "1"}
    written = image.run("touch", "/opt/outbox-relay/file")
    assert "Read-only file system" in written.stderr
    assert image.run("outbox-relay", "--version").stdout == f"outbox-relay, version {__version__}\n"


def test_authorities_are_found_by_both_libraries(image: Image) -> None:
    authorities = image.run("sh", "-c", 'grep -c BEGIN "$SSL_CERT_FILE"')
    assert int(authorities.stdout) > 50


@pytest.mark.kafka
def test_its_health_check_follows_the_relay(image: Image, pipeline: Pipeline) -> None:
    port = ReservedPort()
    _, *health = image.config["Healthcheck"]["Test"]
    variables = {"OUTBOX_RELAY_METRICS_PORT": str(port.number)}
    before = image.run(*health, **variables)
    assert (before.returncode, before.stdout) == (4, "")
    with pipeline.relay(metrics_port=port.number) as relay:
        relay.wait_until_ready()
        alive = image.run(*health, **variables)
        assert (alive.returncode, alive.stdout) == (0, "ok\n")


@pytest.mark.kafka
def test_as_the_first_process_it_drains_on_the_signal_that_an_engine_sends(image: Image, pipeline: Pipeline) -> None:
    """PID 1 has no default for signals: what is not handled is ignored, and the engine kills it in the end."""
    first = ["unshare", "--pid", "--fork", "--kill-child", *image.command("outbox-relay", "run")]
    with (
        Daemon(pipeline.environment(), command=first) as engine,
        pipeline.database.connect() as writer,
    ):
        writes = commit_messages(writer, "order-1", "order-2", "order-1")
        assert engine.wait_for_event("relay_started")["pid"] == 1
        pipeline.await_settled()
        relay = Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text(encoding="ascii")
        os.kill(int(relay), signal.Signals[image.config["StopSignal"]])
        assert engine.wait() == 0
    assert flaws(pipeline.judge(writes)) == {}
