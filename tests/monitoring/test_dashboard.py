"""The dashboard by itself: it can be imported, looks at what exists, shows everything, and counts no relay twice."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.monitoring.files import DASHBOARD, METRIC, Panel, panels, project_urls, runbook_sections
from tests.monitoring.metrics import SUFFIXES, exported_names

if TYPE_CHECKING:
    from collections.abc import Iterable

PANELS = panels()
SURVEYED = {
    *("unpublished_messages", "oldest_unpublished_seconds", "waiting_messages", "oldest_waiting_seconds"),
    *("parked_messages", "parked_keys", "uncollected_writers", "unreconciled_seconds"),
    *("live_tuples", "dead_tuples", "table_bytes", "index_bytes", "xid_age", "oldest_xmin_age"),
    *("longest_transaction_seconds", "oldest_prepared_transaction_seconds", "partitions_ahead_seconds"),
}
LEFT_OUT: dict[str, str] = {}  # names of metrics that no panel shows, each with the reason

each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)


def base(name: str) -> str:
    """The name of a metric without what Prometheus' types put behind it."""
    endings = sorted((ending for endings in SUFFIXES.values() for ending in endings if ending), key=len)
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def shown() -> set[str]:
    return {name for panel in PANELS for expression in panel.expressions for name in METRIC.findall(expression)}


def bases(names: Iterable[str]) -> set[str]:
    return {base(name) for name in names}


@each_panel
def test_panel_explains_itself_and_takes_the_chosen_data_source(panel: Panel) -> None:
    assert panel.description
    assert panel.unit
    assert panel.datasources == {"${datasource}"}


@each_panel
def test_panel_shows_metrics_that_exist(panel: Panel) -> None:
    names = {name for expression in panel.expressions for name in METRIC.findall(expression)}
    assert names - exported_names() == set()


@each_panel
def test_panel_shows_the_chosen_outbox_only(panel: Panel) -> None:
    selectors = [selector for expression in panel.expressions for selector in re.findall(r"\{([^}]*)\}", expression)]
    assert selectors
    assert [each for each in selectors if 'namespace=~"$namespace"' not in each] == []


@each_panel
def test_panel_links_to_runbooks_that_exist(panel: Panel) -> None:
    urls = [f"{project_urls()['Runbooks']}#{alert.lower()}" for alert in runbook_sections()]
    assert [link for link in panel.links if link not in urls] == []


def test_every_metric_is_on_the_dashboard_or_left_out_for_a_reason() -> None:
    assert bases(exported_names()) - bases(shown()) == LEFT_OUT.keys()


def test_what_every_relay_shows_alike_is_never_summed() -> None:
    surveyed = {name for name in exported_names() if name.removeprefix("outbox_relay_") in SURVEYED}
    sums = [
        e for panel in PANELS for e in panel.expressions if e.startswith("sum") and surveyed & set(METRIC.findall(e))
    ]
    assert sums == []


def test_every_alert_is_linked_from_a_panel() -> None:
    linked = {link.rpartition("#")[2] for panel in PANELS for link in panel.links}
    assert {alert.lower() for alert in runbook_sections()} - linked == set()


def test_panels_have_a_place_and_a_number_of_their_own() -> None:
    raw = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in raw)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert max(x for x, _ in cells) == 23
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in raw}) == len(raw)
