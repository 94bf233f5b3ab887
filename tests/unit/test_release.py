"""What a release is made of: one version everywhere, pinned workflows that run what a person runs, a changelog."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import outbox_relay
from tests.fixtures.go import go_program
from tests.fixtures.parts import missing_part

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CLASSIFIERS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())

ACTIONLINT = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.7"

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)

Mapping = dict[Any, Any]  # what is there decides


def load(path: Path) -> Mapping:
    loaded: Mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def jobs(workflow: Path) -> dict[str, Mapping]:
    found: dict[str, Mapping] = load(workflow)["jobs"]
    return found


def commands() -> Iterator[str]:
    for workflow in WORKFLOWS:
        for job in jobs(workflow).values():
            yield from (step["run"] for step in job.get("steps", ()) if "run" in step)


def test_every_file_that_names_a_version_of_ours_names_that_of_the_package() -> None:
    chart = load(ROOT / "helm" / "outbox-relay" / "Chart.yaml")
    dependency = load(ROOT / "examples" / "kubernetes" / "shop-chart" / "Chart.yaml")["dependencies"][0]
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    images = re.findall(r"/outbox-relay:(\d[\w.]*)", texts)
    assert {chart["version"], chart["appVersion"], dependency["version"], *images} == {outbox_relay.__version__}


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    heads = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert re.fullmatch(rf"\[{re.escape(outbox_relay.__version__)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", heads[0])


def test_released_versions_fall_in_the_changelog_and_are_dated() -> None:
    heads = re.findall(r"^## \[([\d.]+)\] - (.*)$", CHANGELOG, re.MULTILINE)
    versions = [tuple(int(part) for part in version.split(".")) for version, _ in heads]
    assert versions == sorted(set(versions), reverse=True)
    assert [date for _, date in heads[1:] if not re.fullmatch(r"\d{4}-\d\d-\d\d", date)] == []


def test_the_sections_of_the_changelog_are_those_of_its_format() -> None:
    sections = set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@each_workflow
def test_every_action_is_pinned_by_commit_and_says_its_version(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8"))
    loose = [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)]
    assert [action for action in loose if not action.startswith("./")] == []


def test_an_action_has_the_same_commit_wherever_it_is_used() -> None:
    pins = {pin for path in WORKFLOWS for pin in re.findall(r"uses: (\S+@\S+ # \S+)", path.read_text(encoding="utf-8"))}
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


@each_workflow
def test_a_job_has_the_permissions_that_it_names_and_no_others(workflow: Path) -> None:
    assert load(workflow)["permissions"] == {}
    assert [name for name, job in jobs(workflow).items() if "permissions" not in job] == []


@each_workflow
def test_no_job_runs_for_ever_or_beside_another_run_of_its_workflow(workflow: Path) -> None:
    assert "group" in load(workflow)["concurrency"]
    endless = [name for name, job in jobs(workflow).items() if "timeout-minutes" not in job and "uses" not in job]
    assert endless == []


def test_pull_requests_get_no_secret_and_no_right_to_write() -> None:
    open_to_all = [path for path in WORKFLOWS if "pull_request" in load(path)[True]]  # YAML reads `on` as a truth value
    texts = "\n".join(path.read_text(encoding="utf-8") for path in open_to_all)
    assert {path.stem for path in open_to_all} == {"audit", "ci"}
    assert re.findall(r"secrets\.|github\.token|: write|pull_request_target", texts) == []


def test_the_workflows_call_the_commands_of_the_makefile() -> None:
    called = {target for command in commands() for target in re.findall(r"\bmake (\w+)", command)}
    assert called == {"lint", "test", "dist", "audit"}
    assert called <= set(re.findall(r"^(\w+):.*## ", MAKEFILE, re.MULTILINE))


def test_every_command_of_make_that_a_page_names_exists() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
    named = set(re.findall(r"(?:^|`)make (\w+)", pages, re.MULTILINE))
    assert named - set(re.findall(r"^(\w+):.*## ", MAKEFILE, re.MULTILINE)) == set()
    assert {"setup", "test", "lint", "format", "schema", "lock", "audit", "dist"} <= named


def test_ci_tests_every_python_that_the_metadata_names_with_every_supported_postgresql() -> None:
    matrix = jobs(GITHUB / "workflows" / "ci.yml")["test"]["strategy"]["matrix"]
    assert matrix == {"python": CLASSIFIERS, "postgres": ["14", "15", "16", "17", "18"]}


def test_a_release_publishes_nothing_that_ci_has_not_passed() -> None:
    release = jobs(GITHUB / "workflows" / "release.yml")
    publishing = {name for name, job in release.items() if "write" in job["permissions"].values()}
    assert publishing == {"pypi", "image", "chart", "announce"}
    assert {name for name in publishing if "ci" not in everything_before(name, release)} == set()


def run_step(name: str, *, of: str, directory: Path, **variables: str) -> int:
    """The exit code of the shell commands of a step of the release, run as a runner does."""
    [script] = [
        step["run"] for step in jobs(GITHUB / "workflows" / "release.yml")[of]["steps"] if name in step.values()
    ]
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = os.environ | {"GITHUB_OUTPUT": str(directory / "output")} | variables
    return subprocess.run(shell, cwd=directory, env=environment, capture_output=True, check=False).returncode


def release_tree(directory: Path, *, changelog: str) -> Path:
    (directory / "outbox_relay").mkdir()
    (directory / "outbox_relay" / "__init__.py").write_text('"""Ours."""\n\n__version__ = "1.2.0"\n')
    (directory / "CHANGELOG.md").write_text(changelog)
    return directory


@pytest.mark.parametrize(
    ("tag", "head", "code"),
    [
        ("v1.2.0", "## [1.2.0] - 2026-12-01", 0),
        ("v1.2.0", "## [1.2.0] - unreleased", 1),
        ("v1.2.0", "## [1.1.0] - 2026-12-01", 1),
        ("v1.3.0", "## [1.3.0] - 2026-12-01", 1),
    ],
)
def test_a_tag_is_released_only_when_the_code_and_a_dated_section_name_it(
    tmp_path: Path, tag: str, head: str, code: int
) -> None:
    tree = release_tree(tmp_path, changelog=f"# Changelog\n\n{head}\n")
    assert run_step("version", of="version", directory=tree, GITHUB_REF_NAME=tag) == code


def test_the_notes_of_a_release_are_its_section_of_the_changelog(tmp_path: Path) -> None:
    sections = "# Changelog\n\n## [1.2.0] - 2026-12-01\n\n### Fixed\n\n- It.\n\n## [1.1.0] - 2026-11-21\n\n- That.\n"
    tree = release_tree(tmp_path, changelog=sections)
    (tree / "gh").write_text("#!/bin/sh\n")
    (tree / "gh").chmod(0o755)
    path = f"{tree}{os.pathsep}{os.environ['PATH']}"
    step = "Publish the section of the changelog with the files"
    assert run_step(step, of="announce", directory=tree, PATH=path, VERSION="1.2.0", GITHUB_REF_NAME="v1.2.0") == 0
    assert (tree / "notes.md").read_text().strip() == "### Fixed\n\n- It."


def everything_before(name: str, release: dict[str, Mapping]) -> set[str]:
    needs = release[name].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(everything_before(other, release) for other in direct))


def test_dependabot_watches_the_actions_the_requirements_and_the_base_of_the_image() -> None:
    watched = {entry["package-ecosystem"]: entry["directory"] for entry in load(GITHUB / "dependabot.yml")["updates"]}
    assert watched == {"github-actions": "/", "pip": "/requirements", "docker": "/"}


@pytest.mark.slow
def test_actionlint_finds_nothing_in_the_workflows() -> None:
    command = [str(go_program(ACTIONLINT)), "-shellcheck=", "-pyflakes=", *map(str, WORKFLOWS)]  # the same everywhere
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_zizmor_finds_nothing_unsafe_in_the_workflows() -> None:
    [pinned] = re.findall(r"zizmor@[\d.]+", MAKEFILE)
    zizmor = [str(Path(sys.executable).with_name("uv")), "tool", "run", pinned]
    fetched = subprocess.run([*zizmor, "--version"], capture_output=True, text=True, timeout=120, check=False)
    if fetched.returncode:
        missing_part(f"the package index cannot be reached: {fetched.stderr.strip()[-200:]}")
    command = [*zizmor, "--offline", "--quiet", str(GITHUB)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
