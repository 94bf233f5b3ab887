"""What helm prints after an installation."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.helm import CHART, EVERYTHING, MINIMAL, given, one

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.helm import Helm

AS_A_MANIFEST = """
apiVersion: v1
kind: ConfigMap
metadata: {name: notes}
data: {text: {{ include "notes" . | toJson }}}
"""


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """The chart with its notes as a manifest: helm prints them for a real cluster only."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    notes = (chart / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    (chart / "templates" / "NOTES.txt").unlink()
    (chart / "templates" / "_notes.tpl").write_text('{{- define "notes" }}' + notes + "{{- end }}", encoding="utf-8")
    (chart / "templates" / "notes.yaml").write_text(AS_A_MANIFEST, encoding="utf-8")
    return chart


def notes(helm: Helm, chart: Path, *arguments: str | Path) -> str:
    text: str = one(helm.render(*arguments, chart=chart), "ConfigMap", suffix="notes")["data"]["text"]
    return text


def test_the_notes_name_the_deployment_and_what_is_still_missing(helm: Helm, chart: Path) -> None:
    text = notes(helm, chart, "--values", MINIMAL)
    assert text.startswith("2 relays of outbox-relay 0.1.0 in the Deployment relay-outbox-relay.\n")
    assert "\n  kubectl -n shop exec deployment/relay-outbox-relay -c outbox-relay -- outbox-relay status\n" in text
    assert "\n  helm -n shop test relay --logs\n" in text
    assert "The tables are not migrated by this release" in text
    assert "Nobody is told to scrape the metrics" in text


def test_the_notes_miss_nothing_where_everything_is_on(helm: Helm, chart: Path) -> None:
    text = notes(helm, chart, "--values", EVERYTHING)
    assert text.startswith("2 to 4 relays ")
    assert "not migrated" not in text
    assert "Nobody" not in text


def test_the_notes_beside_a_sidecar_send_to_the_application(helm: Helm, chart: Path) -> None:
    text = notes(helm, chart, "--values", MINIMAL, *given({"mode": "sidecar"}))
    assert text.startswith("The settings of the relay are in the ConfigMap relay-outbox-relay.")
    assert "deployment/" not in text
