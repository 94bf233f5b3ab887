"""The alerts by themselves: valid, each shown to fire and to stay silent by promtool, each with a runbook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.fixtures.prometheus import promtool
from tests.monitoring.files import ALERTS, METRIC, RUNBOOKS, Rule, project_urls, rules, runbook_sections
from tests.monitoring.metrics import exported_names

PROMTOOL_TESTS = Path(__file__).with_name("alerts.test.yaml")
INCIDENTS = Path(__file__).parents[1] / "acceptance" / "test_alerts.py"
RULES = rules()

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def shown(*, to_fire: bool) -> list[str]:
    """The names of the alerts that promtool's tests show to fire, or to stay silent."""
    tests = yaml.safe_load(PROMTOOL_TESTS.read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    return [case["alertname"] for case in cases if bool(case["exp_alerts"]) is to_fire]


def test_prometheus_accepts_the_rules() -> None:
    done = promtool("check", "rules", "--lint-fatal", ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_and_is_silent_where_its_tests_say() -> None:
    done = promtool("test", "rules", PROMTOOL_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("to_fire", [True, False], ids=["fires", "is silent"])
def test_every_alert_is_shown(*, to_fire: bool) -> None:
    assert [rule.name for rule in RULES if rule.name not in shown(to_fire=to_fire)] == []


@each_rule
def test_alert_waits_and_says_how_bad_it_is_and_what_it_saw(rule: Rule) -> None:
    assert re.fullmatch(r"\d+m", rule.pending)
    assert rule.labels["severity"] in {"critical", "warning"}
    assert rule.annotations.keys() == {"summary", "description", "runbook_url"}
    assert "$labels.job" in rule.annotations["description"]


@each_rule
def test_alert_tells_outboxes_apart_and_counts_no_relay_twice(rule: Rule) -> None:
    groupings = re.findall(r"\bby \(([^)]*)\)", rule.expression)
    assert groupings
    assert [grouping for grouping in groupings if not grouping.startswith("job, namespace")] == []


@each_rule
def test_alert_leads_to_the_runbook_of_its_name(rule: Rule) -> None:
    assert rule.annotations["runbook_url"] == f"{project_urls()['Runbooks']}#{rule.name.lower()}"
    assert rule.name in runbook_sections()


def test_every_runbook_belongs_to_an_alert() -> None:
    assert list(runbook_sections()) == [rule.name for rule in RULES]


def test_the_runbooks_say_of_every_alert_whether_an_incident_was_made_for_it() -> None:
    tried = RUNBOOKS.read_text(encoding="utf-8").split("## What was tried")[1]
    by_promtool_only = next(line for line in tried.splitlines() if "`promtool` only" in line)
    made = set(re.findall(r"OutboxRelay\w+", INCIDENTS.read_text(encoding="utf-8")))
    assert set(re.findall(r"OutboxRelay\w+", tried)) == {rule.name for rule in RULES}
    assert made & set(re.findall(r"OutboxRelay\w+", by_promtool_only)) == set()


@each_rule
def test_alert_looks_at_metrics_that_a_relay_has(rule: Rule) -> None:
    assert set(METRIC.findall(rule.expression)) - exported_names() == set()
