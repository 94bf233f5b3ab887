"""The wheel as users get it: built, installed into a clean environment, and run away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.parts import missing_part

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with the wheel installed, and a directory outside the checkout to run it in."""

    directory: Path

    def run(self, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("OUTBOX_RELAY_", "PYTHON"))
        }
        return subprocess.run(
            [str(self.directory / "bin" / program), *arguments],
            cwd=self.directory,
            env=inherited | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def build(source: Path, target: str, *, directory: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    [built] = directory.iterdir()
    return built


def install(wheel: Path, directory: Path) -> Environment:
    venv.create(directory, symlinks=True)
    python = str(directory / "bin" / "python")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Environment(directory)


def lend_dependencies(environment: Environment) -> None:
    """Let the environment import the packages of this one, though not the checkout, which only a .pth file adds."""
    [site_packages] = environment.directory.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "wheel", directory=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sdist = build(CHECKOUT, "sdist", directory=tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build(unpacked / sdist.name.removesuffix(".tar.gz"), "wheel", directory=tmp_path_factory.mktemp("rebuilt"))


def contents(wheel: Path) -> dict[str, int]:
    """The files of the wheel with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


def test_a_wheel_built_from_the_sdist_is_the_wheel_built_from_the_checkout(wheel: Path, wheel_from_sdist: Path) -> None:
    assert contents(wheel_from_sdist) == contents(wheel)


def test_the_wheel_has_every_file_of_the_package_and_every_migration(wheel: Path) -> None:
    package = {file.relative_to(CHECKOUT) for file in (CHECKOUT / "outbox_relay").rglob("*.*") if file.suffix != ".pyc"}
    migrations = {
        Path("outbox_relay") / file.relative_to(CHECKOUT) for file in (CHECKOUT / "migrations").rglob("*.sql")
    }
    packed = {Path(name) for name in contents(wheel) if not name.startswith("outbox_relay-")}
    assert packed == package | migrations


def test_the_installed_wheel_migrates_away_from_the_checkout(wheel: Path, tmp_path: Path, database: Database) -> None:
    environment = install(wheel, tmp_path / "environment")
    lend_dependencies(environment)
    where = environment.run("python", "-c", "import outbox_relay; print(outbox_relay.__file__)").stdout
    assert where.startswith(str(environment.directory))

    variables = {"OUTBOX_RELAY_DATABASE_URL": database.dsn, "OUTBOX_RELAY_SCHEMA": "shop"}
    applied = environment.run("outbox-relay", "migrate", "apply", **variables)
    assert (applied.returncode, applied.stderr) == (0, "")
    assert environment.run("outbox-relay", "migrate", "status", **variables).returncode == 0


@pytest.fixture(scope="module")
def base_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel as pip installs it with nothing more said, dependencies from the package index."""
    environment = Environment(tmp_path_factory.mktemp("base"))
    venv.create(environment.directory, symlinks=True)
    python = str(environment.directory / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if installed.returncode:
        missing_part(f"the package index cannot be reached: {installed.stderr.strip()[-200:]}")
    return environment


def test_the_base_install_pulls_psycopg_only(base_install: Environment) -> None:
    [site_packages] = base_install.directory.glob("lib/python*/site-packages")
    distributions = {found.name.split("-")[0] for found in site_packages.glob("*.dist-info")}
    assert distributions - {"typing_extensions"} == {"outbox_relay", "psycopg"}  # psycopg needs the third before 3.13


def test_the_libraries_import_nothing_of_the_daemon(base_install: Environment) -> None:
    libraries = ("writer", "consumer", "transactions", "idempotency")
    imports = "; ".join(f"import outbox_relay.{name}" for name in libraries)
    finished = base_install.run("python", "-c", f"{imports}; import sys; print(*sys.modules)")
    if "no pq wrapper available" in finished.stderr:
        missing_part("libpq is not installed: apt-get install libpq5")
    loaded = set(finished.stdout.split())
    rooms = {name.split(".")[1] for name in loaded if name.startswith("outbox_relay.")}
    assert rooms >= set(libraries)
    assert rooms <= {*libraries, "errors", "queries", "sql", "wire"}
    third_parties = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    ours = {"outbox_relay", "psycopg", "typing_extensions"}  # psycopg needs the last one before Python 3.13
    assert {name for name in third_parties if not name.startswith("_")} <= ours


def test_without_the_extra_the_command_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    environment = install(wheel, tmp_path / "environment")
    finished = environment.run("python", "-m", "outbox_relay", "run")
    assert (finished.returncode, finished.stdout) == (3, "")
    assert finished.stderr.endswith('Install it with: pip install "outbox-relay[daemon]"\n')
