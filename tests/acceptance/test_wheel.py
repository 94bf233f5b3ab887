"""Wheel and sdist as users get them: built, installed into a clean environment, and run away from the checkout."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trove_classifiers
from packaging.metadata import Metadata

from outbox_relay import __version__
from outbox_relay.cli.exits import ExitCode
from tests.fixtures.parts import missing_part
from tests.fixtures.wheels import CHECKOUT, Environment, build, install, lend_dependencies

if TYPE_CHECKING:
    from tests.fixtures.postgres import Database


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "wheel", directory=tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "sdist", directory=tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    return directory / sdist.name.removesuffix(".tar.gz")


def run_uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "uv", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "error sending request" in finished.stderr:
        missing_part(f"the package index cannot be reached: {finished.stderr.strip()[-200:]}")
    return finished


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def metadata_of(wheel: Path) -> Metadata:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Metadata.from_email(archive.read(name), validate=True)


@pytest.mark.parametrize("target", ["sdist", "wheel"])
def test_what_is_built_from_the_sdist_is_byte_for_byte_what_is_built_from_the_checkout(
    target: str, request: pytest.FixtureRequest, unpacked_sdist: Path, tmp_path: Path
) -> None:
    built: Path = request.getfixturevalue(target)
    rebuilt = build(unpacked_sdist, target, directory=tmp_path / "rebuilt")
    assert (rebuilt.name, digest(rebuilt)) == (built.name, digest(built))


def test_the_sdist_holds_what_it_is_tested_with_and_nothing_that_only_lies_about(unpacked_sdist: Path) -> None:
    directories = {"benchmarks", "docs", "examples", "helm", "migrations", "outbox_relay", "requirements", "tests"}
    files = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"}
    tools = {".dockerignore", ".github", ".gitignore", "Dockerfile", "Makefile", "compose.yaml"}
    assert {path.name for path in unpacked_sdist.iterdir()} == directories | files | tools | {"PKG-INFO"}


def test_the_metadata_says_what_an_index_shows_and_an_installer_needs(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert (metadata.name, str(metadata.version)) == ("outbox-relay", __version__)
    assert (metadata.metadata_version, str(metadata.requires_python)) == ("2.4", ">=3.11")
    assert (metadata.license_expression, metadata.license_files) == ("Apache-2.0", ["LICENSE"])
    assert metadata.description_content_type == "text/markdown"
    assert set(metadata.provides_extra or []) == {
        "daemon",
        "demo",
        "django",
        "kafka",
        "metrics",
        "otel",
        "sqlalchemy",
    }
    assert set(metadata.project_urls or {}) == {"Changelog", "Documentation", "Issues", "Repository", "Runbooks"}
    assert [name for name in metadata.classifiers or [] if name not in trove_classifiers.classifiers] == []


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


@pytest.fixture(scope="module")
def lowest_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel with the lowest versions of all that it says it works with, on the lowest Python."""
    if sys.version_info >= (3, 12):
        pytest.skip("some of the lowest versions are of a time before this Python")
    environment = install(wheel, tmp_path_factory.mktemp("lowest"))
    python = str(environment.directory / "bin" / "python")
    extras = [f"--extra={name}" for name in ("demo", "django", "kafka", "metrics", "otel", "sqlalchemy")]
    project = ("--requirement", str(CHECKOUT / "pyproject.toml"), *extras)
    installed = run_uv("pip", "install", "--quiet", "--python", python, "--resolution=lowest-direct", *project)
    assert installed.returncode == 0, installed.stderr
    return environment


def test_every_module_can_be_imported_with_the_lowest_versions(lowest_install: Environment, wheel: Path) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in contents(wheel)
        if name.endswith(".py")
    ]
    finished = lowest_install.run("python", "-W", "error", "-c", f"import {', '.join(modules)}")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_settings_are_read_and_checked_with_the_lowest_versions(lowest_install: Environment) -> None:
    finished = lowest_install.run("outbox-relay", "config", "show", OUTBOX_RELAY_SCHEMA='a"; drop')
    assert finished.returncode == ExitCode.CONFIGURATION
    assert "OUTBOX_RELAY_SCHEMA: 'a\"; drop' is no plain lower-case identifier" in finished.stderr


def test_the_demo_runs_with_the_lowest_versions(lowest_install: Environment) -> None:
    finished = lowest_install.run("outbox-relay", "demo", "--kafka=mock")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("Nothing is lost, nothing is a phantom, every key is in order.\n")


def test_without_the_extra_the_command_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    environment = install(wheel, tmp_path / "environment")
    finished = environment.run("python", "-m", "outbox_relay", "run")
    assert (finished.returncode, finished.stdout) == (3, "")
    assert finished.stderr.endswith('Install it with: pip install "outbox-relay[daemon]"\n')


def test_the_command_runs_without_being_installed(wheel: Path) -> None:
    requirement = f"outbox-relay[daemon] @ {wheel.as_uri()}"
    finished = run_uv("tool", "run", "--isolated", "--from", requirement, "outbox-relay", "--version")
    assert (finished.returncode, finished.stdout) == (0, f"outbox-relay, version {__version__}\n"), finished.stderr
