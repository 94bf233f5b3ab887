"""The files that operators load into Prometheus and Grafana, as values."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "helm" / "outbox-relay" / "files"
ALERTS = FILES / "alerts.yaml"
DASHBOARD = FILES / "dashboard.json"
RUNBOOKS = ROOT / "docs" / "runbooks.md"

SECONDS = {"m": 60, "h": 3600, "d": 86_400}
# By which a limit is lowered, from the first number on: transactions, rows, long times, times, failures, and the rest.
DIVISORS = ((1_000_000, 10_000), (10_000, 100), (600, 600), (60, 60), (5, 10), (0, 1))

METRIC = re.compile(r"\boutbox_(?:relay|consumer)_[a-z_]+")


@dataclass(frozen=True, slots=True)
class Rule:
    """One alert; `labels` and `annotations` as they are in the file."""

    name: str
    expression: str
    pending: str
    labels: dict[str, str]
    annotations: dict[str, str]


def rules() -> list[Rule]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [
        Rule(rule["alert"], rule["expr"], rule["for"], rule["labels"], rule["annotations"])
        for group in groups
        for rule in group["rules"]
    ]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a panel is, in columns of 24 and in lines."""

    x: int
    y: int
    w: int
    h: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel with queries; `datasources` and `links` are those of everything in it."""

    row: str
    place: Place
    title: str
    kind: str
    description: str
    unit: str
    is_log: bool
    is_stacked: bool
    expressions: list[str]
    legends: list[str]
    datasources: set[str]
    links: list[str]


def panels() -> list[Panel]:
    """The panels of the dashboard from top to bottom, without the rows' headings."""
    row = ""
    found = []
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        defaults = panel["fieldConfig"]["defaults"]
        found.append(
            Panel(
                row=row,
                place=Place(**panel["gridPos"]),
                title=panel["title"],
                kind=panel["type"],
                description=panel["description"],
                unit=defaults.get("unit") or panel["options"]["yAxis"]["unit"],
                is_log=defaults.get("custom", {}).get("scaleDistribution", {}).get("type") == "log",
                is_stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
                expressions=[target["expr"] for target in panel["targets"]],
                legends=[target["legendFormat"] for target in panel["targets"]],
                datasources={each["datasource"]["uid"] for each in (panel, *panel["targets"])},
                links=[link["url"] for link in panel["links"]],
            )
        )
    return found


def queried(expression: str, *, job: str) -> str:
    """The query of a panel as Grafana sends it for all relays of *job*, when they are scraped twice a second."""
    variables = {"$job": job, "$namespace": ".*", "$instance": ".*", "$__rate_interval": "5s"}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    return expression


def runbook_sections() -> dict[str, str]:
    """The text below each heading of an alert in the runbooks."""
    text = RUNBOOKS.read_text(encoding="utf-8")
    return dict(re.findall(r"^## (OutboxRelay\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def project_urls() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: str(url) for name, url in project["urls"].items()}


def commands(alert: str) -> str:
    """What an operator pastes from the runbook of *alert*: all of its blocks, from top to bottom."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", runbook_sections()[alert], re.MULTILINE | re.DOTALL))


def sped_up(rules_text: str) -> str:
    """
    The rules with all times divided by 60, for incidents of seconds: pauses and ranges, and the limits of ages.

    Limits of ten minutes and more are divided by 600, numbers of rows by 100, and of transactions by 10,000. Five
    failures are one, for nothing is tried more often than in service.
    """

    def shorter(time: re.Match[str]) -> str:
        return f"{1000 * int(time[1]) * SECONDS[time[2]] // 60}ms"

    def lower(limit: re.Match[str]) -> str:
        number = int(limit[1])
        return f"> {number // next(divisor for least, divisor in DIVISORS if number >= least)}"

    text = re.sub(r"(?<=for: )(\d+)([mhd])$", shorter, rules_text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\[)(\d+)([mhd])(?=\])", shorter, text)
    text = re.sub(r"(?<= offset )(\d+)([mhd])$", shorter, text, flags=re.MULTILINE)
    return re.sub(r"> (\d+)\b(?!\.)", lower, text)
