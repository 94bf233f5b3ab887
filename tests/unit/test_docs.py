"""The tables of the documentation name what the code has, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outbox_relay.observe import events
from outbox_relay.observe.metrics import Metrics

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def first_column(page: Path, *, section: str) -> list[str]:
    text = page.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_every_event_has_a_row_and_every_row_an_event() -> None:
    declared = [value for name, value in vars(events).items() if name.isupper()]
    assert sorted(first_column(OPERATIONS, section="Events")) == sorted(declared)


def test_every_metric_has_a_row_and_every_row_a_metric() -> None:
    families = [family.name for family in Metrics().registry.collect() if family.name.startswith("outbox_relay_")]
    names = [name.removeprefix("outbox_relay_") for name in families]
    documented = [name.removesuffix("_info") for name in first_column(OPERATIONS, section="Metrics")]
    assert sorted(documented) == sorted(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|docs|migrations|benchmarks|examples)/[\w/]+\.\w+)`", text)
    inside = re.findall(r"`((?:relay|writer|consumer|config|cli|sql|observe|sandbox|operate)/[\w/]+\.\w+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in inside if not (ROOT / "outbox_relay" / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(named - set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))) == []


@pytest.mark.parametrize("section", ["Process", "PostgreSQL", "Kafka", "Consumer"])
def test_every_fault_of_the_catalogue_names_a_test(section: str) -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 3
    assert [row for row in rows if not re.search(r"\| `test_\w+`(, `test_\w+`)* \|$", row)] == []
