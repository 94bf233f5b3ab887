"""The relay in the pod of an application: the template of the chart, and the plain manifest beside it."""

from __future__ import annotations

import shutil
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.helm import CHART, KUBERNETES_VERSIONS, ROOT, given, manifests, one, problems

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.helm import Helm, Manifest

EXAMPLES = ROOT / "examples" / "kubernetes"


@pytest.fixture
def shop_chart(helm: Helm, tmp_path: Path) -> Path:
    """The example chart of an application, with the chart of the relay where its dependency says."""
    chart = tmp_path / "examples" / "kubernetes" / "shop-chart"
    shutil.copytree(EXAMPLES / "shop-chart", chart)
    shutil.copytree(CHART, tmp_path / "helm" / "outbox-relay")
    built = helm.run("dependency", "build", chart)
    assert built.returncode == 0, built.stderr
    return chart


@pytest.fixture
def plain() -> list[Manifest]:
    return manifests((EXAMPLES / "sidecar.yaml").read_text(encoding="utf-8"))


def pod(rendered: list[Manifest]) -> Manifest:
    template: Manifest = one(rendered, "Deployment")["spec"]["template"]
    return template


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_manifest_fits_the_schemas_of_kubernetes(
    helm: Helm, shop_chart: Path, plain: list[Manifest], version: str
) -> None:
    for manifest in [*helm.render(chart=shop_chart), *plain]:
        assert problems(manifest, version=version) == []


def test_the_chart_and_the_plain_manifest_make_the_same_pod(
    helm: Helm, shop_chart: Path, plain: list[Manifest]
) -> None:
    assert pod(helm.render(chart=shop_chart))["spec"] == pod(plain)["spec"]


def test_the_chart_and_the_plain_manifest_make_the_same_settings(
    helm: Helm, shop_chart: Path, plain: list[Manifest]
) -> None:
    rendered = one(helm.render(chart=shop_chart), "ConfigMap")["data"]
    [given_plainly] = [manifest["data"] for manifest in plain if manifest["kind"] == "ConfigMap"]
    assert tomllib.loads(rendered["relay.toml"]) == tomllib.loads(given_plainly["relay.toml"])


def test_the_sidecar_restarts_alone_and_never_makes_the_application_unready(plain: list[Manifest]) -> None:
    [sidecar] = pod(plain)["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "relay-metrics", "scheme": "HTTP"}
    assert sidecar.keys() & {"readinessProbe", "startupProbe", "lifecycle"} == set()


def test_a_changed_setting_starts_new_pods_of_the_application(helm: Helm, shop_chart: Path) -> None:
    checksums = {
        pod(helm.render(*given({"outbox-relay.config.lanes": lanes}), chart=shop_chart))["metadata"]["annotations"][
            "checksum/outbox-relay"
        ]
        for lanes in (1, 2)
    }
    assert len(checksums) == 2


def test_the_monitor_finds_the_application_s_pods_and_the_sidecar_s_port(helm: Helm, shop_chart: Path) -> None:
    rendered = helm.render(chart=shop_chart)
    monitor = one(rendered, "PodMonitor")["spec"]
    [sidecar] = pod(rendered)["spec"]["initContainers"]
    assert pod(rendered)["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    assert [port["name"] for port in sidecar["ports"]] == [monitor["podMetricsEndpoints"][0]["port"]]
