"""What each value renders."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.fixtures.helm import CHART, EVERYTHING, MINIMAL, ROOT, given, one, pod_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.fixtures.helm import Helm, Manifest

OUTBOX_JOB = {"migrations.enabled": True, "migrations.existingSecret": "owner"}
INBOX_JOB = {"migrations.inbox.enabled": True, "migrations.inbox.existingSecret": "owner"}
ALWAYS = {"ConfigMap/relay", "Deployment/relay", "Pod/relay-test", "Service/relay", "ServiceAccount/relay"}


def render(helm: Helm, values: Mapping[str, object] | None = None) -> list[Manifest]:
    """What the least values and *values* render, under the short name `relay`."""
    return helm.render("--values", MINIMAL, *given({"fullnameOverride": "relay"} | dict(values or {})))


def names(rendered: list[Manifest]) -> set[str]:
    return {f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in rendered}


def deployed_pod(helm: Helm, values: Mapping[str, object]) -> Manifest:
    pod = pod_of(one(render(helm, values), "Deployment"))
    assert pod is not None
    return pod


@pytest.mark.parametrize(
    ("values", "added"),
    [
        ({}, set()),
        ({"podMonitor.enabled": True}, {"PodMonitor/relay"}),
        ({"serviceMonitor.enabled": True}, {"ServiceMonitor/relay"}),
        ({"prometheusRule.enabled": True}, {"PrometheusRule/relay"}),
        ({"dashboard.enabled": True}, {"ConfigMap/relay-dashboard"}),
        ({"podDisruptionBudget.enabled": True}, {"PodDisruptionBudget/relay"}),
        ({"networkPolicy.enabled": True}, {"NetworkPolicy/relay"}),
        ({"keda.enabled": True, "keda.prometheusAddress": "http://prometheus"}, {"ScaledObject/relay"}),
        (OUTBOX_JOB, {"Job/relay-outbox"}),
        (OUTBOX_JOB | INBOX_JOB, {"Job/relay-outbox", "Job/relay-inbox"}),
    ],
)
def test_a_switch_adds_its_objects_and_no_others(helm: Helm, values: Mapping[str, object], added: set[str]) -> None:
    assert names(render(helm, values)) == ALWAYS | added


@pytest.mark.parametrize(
    ("switch", "taken"),
    [
        ("service.enabled", "Service/relay"),
        ("serviceAccount.create", "ServiceAccount/relay"),
        ("test.enabled", "Pod/relay-test"),
    ],
)
def test_a_switch_takes_its_object_away_and_no_other(helm: Helm, switch: str, taken: str) -> None:
    assert names(render(helm, {switch: False})) == ALWAYS - {taken}


def test_beside_a_sidecar_there_is_nothing_of_the_daemon(helm: Helm) -> None:
    rendered = helm.render(
        "--values", EVERYTHING, *given({"mode": "sidecar", "podMonitor.matchLabels": {"app": "shop"}})
    )
    kinds = {manifest["kind"] for manifest in rendered}
    assert kinds == {"ConfigMap", "Job", "Pod", "PodMonitor", "PrometheusRule", "ServiceAccount"}


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({}, "ghcr.io/outbox-relay/outbox-relay:0.1.0"),
        ({"image.tag": "1.2.3"}, "ghcr.io/outbox-relay/outbox-relay:1.2.3"),
        ({"image.registry": ""}, "outbox-relay/outbox-relay:0.1.0"),
        (
            {"image.tag": "1.2.3", "image.digest": f"sha256:{'a' * 64}"},
            f"ghcr.io/outbox-relay/outbox-relay@sha256:{'a' * 64}",
        ),
    ],
)
def test_the_image_is_named_by_digest_else_by_tag_else_by_version(
    helm: Helm, values: Mapping[str, object], image: str
) -> None:
    rendered = render(helm, {**OUTBOX_JOB, **values})
    pods = [pod for manifest in rendered if (pod := pod_of(manifest))]
    assert [pod["spec"]["containers"][0]["image"] for pod in pods] == [image] * 3


@pytest.mark.parametrize(
    ("release", "values", "name"),
    [
        ("relay", {}, "relay-outbox-relay"),
        ("shop-outbox-relay", {}, "shop-outbox-relay"),
        ("relay", {"nameOverride": "events"}, "relay-events"),
        ("relay", {"fullnameOverride": "events"}, "events"),
        ("r" * 53, {}, "r" * 51),
    ],
)
def test_objects_are_named_by_release_and_chart(
    helm: Helm, release: str, values: Mapping[str, object], name: str
) -> None:
    rendered = helm.render("--values", MINIMAL, *given(values), release=release)
    assert one(rendered, "Deployment")["metadata"]["name"] == name


def test_a_changed_setting_starts_new_pods(helm: Helm) -> None:
    checksums = [
        deployed_pod(helm, values)["metadata"]["annotations"]["checksum/config"]
        for values in ({}, {"replicaCount": 5}, {"config.lanes": 4})
    ]
    assert checksums[0] == checksums[1] != checksums[2]


def test_the_daemon_is_probed_where_the_relay_answers(helm: Helm) -> None:
    [container] = deployed_pod(helm, {"config.metrics_port": 9000})["spec"]["containers"]
    assert container["ports"] == [{"name": "relay-metrics", "containerPort": 9000}]
    where = {"port": "relay-metrics", "scheme": "HTTP"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez"} | where
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz"} | where


@pytest.mark.parametrize("value", ["metrics.tls.certificateSecret", "config.metrics_certificate"])
def test_with_a_certificate_for_metrics_all_that_ask_for_them_use_https(helm: Helm, value: str) -> None:
    monitor = {"enabled": True, "tlsConfig": {"serverName": "relay"}}
    rendered = render(helm, {value: "relay-tls", "podMonitor": monitor, "serviceMonitor": monitor})
    [container] = one(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    [endpoint] = one(rendered, "ServiceMonitor")["spec"]["endpoints"]
    [pod_endpoint] = one(rendered, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert {container[probe]["httpGet"]["scheme"] for probe in ("livenessProbe", "readinessProbe")} == {"HTTPS"}
    assert [(of["scheme"], of["tlsConfig"]) for of in (endpoint, pod_endpoint)] == [("https", monitor["tlsConfig"])] * 2


def test_selectors_find_the_relays_and_neither_jobs_nor_the_test(helm: Helm) -> None:
    rendered = helm.render("--values", EVERYTHING)
    labels = {manifest["kind"]: pod["metadata"]["labels"] for manifest in rendered if (pod := pod_of(manifest))}
    assert labels.keys() == {"Deployment", "Job", "Pod"}
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor", "Service"):
        selector = one(rendered, kind)["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert {of for of, has in labels.items() if has.items() >= wanted.items()} == {"Deployment"}, kind


def test_the_service_monitor_finds_the_service_and_its_port(helm: Helm) -> None:
    rendered = helm.render("--values", EVERYTHING)
    service, monitor = one(rendered, "Service"), one(rendered, "ServiceMonitor")
    assert service["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    assert [port["name"] for port in service["spec"]["ports"]] == [monitor["spec"]["endpoints"][0]["port"]]


def test_the_network_policy_holds_for_every_pod_of_the_release(helm: Helm) -> None:
    rendered = helm.render("--values", EVERYTHING)
    wanted = one(rendered, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    pods = [pod for manifest in rendered if (pod := pod_of(manifest))]
    assert [pod for pod in pods if not pod["metadata"]["labels"].items() >= wanted.items()] == []


def test_the_network_policy_opens_dns_postgresql_kafka_and_the_metrics(helm: Helm) -> None:
    database, broker, scraper = ({"podSelector": {"matchLabels": {"app": name}}} for name in ("pg", "kafka", "prom"))
    values = {
        "networkPolicy.enabled": True,
        "networkPolicy.postgresqlTo": [database],
        "networkPolicy.kafkaTo": [broker],
        "networkPolicy.kafkaPorts": [9094],
        "networkPolicy.metricsFrom": [scraper],
    }
    spec = one(render(helm, values), "NetworkPolicy")["spec"]
    assert spec["ingress"] == [{"ports": [{"port": 9464}], "from": [scraper]}]
    assert spec["egress"] == [
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {"ports": [{"port": 5432}], "to": [database]},
        {"ports": [{"port": 9094}], "to": [broker]},
    ]


def test_keda_alone_chooses_the_number_of_relays(helm: Helm) -> None:
    rendered = render(
        helm, {"keda.enabled": True, "keda.prometheusAddress": "http://prometheus", "keda.lagSeconds": 30}
    )
    deployment, scaled = one(rendered, "Deployment"), one(rendered, "ScaledObject")
    assert "replicas" not in deployment["spec"]
    assert scaled["spec"]["scaleTargetRef"] == {"name": deployment["metadata"]["name"]}
    [trigger] = scaled["spec"]["triggers"]
    assert trigger["metricType"] == "AverageValue"
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus",
        "query": 'max(outbox_relay_oldest_unpublished_seconds{namespace="shop",pod=~"relay-[^-]+-[^-]+"})',
        "threshold": "30",
    }


def test_keda_asks_for_a_metric_that_the_relay_has(helm: Helm) -> None:
    scaled = one(helm.render("--values", EVERYTHING), "ScaledObject")
    [metric] = re.findall(r"max\((\w+)", scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert f"`{metric.removeprefix('outbox_relay_')}`" in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def test_migrations_run_before_anything_else_of_the_release_exists(helm: Helm) -> None:
    rendered = render(helm, OUTBOX_JOB | INBOX_JOB | {"config.schema": "shop", "migrations.inbox.schema": "billing"})
    jobs = [manifest for manifest in rendered if manifest["kind"] == "Job"]
    assert [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs] == [
        ["migrate", "apply", "--schema", "shop"],
        ["migrate", "apply", "--inbox", "--schema", "billing"],
    ]
    for job in jobs:
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        pod = job["spec"]["template"]["spec"]
        assert "serviceAccountName" not in pod
        assert [volume for volume in pod["volumes"] if "configMap" in volume] == []


def test_the_owner_s_login_is_in_no_pod_but_the_jobs(helm: Helm) -> None:
    rendered = render(helm, {"migrations.enabled": True, "migrations.existingSecret": "the-owner"})
    assert {manifest["kind"] for manifest in rendered if "the-owner" in yaml.safe_dump(manifest)} == {"Job"}


def test_a_client_key_for_postgresql_is_readable_by_the_group_alone(helm: Helm) -> None:
    pod = deployed_pod(helm, {"database.tls.certificateSecret": "client"})["spec"]
    [secrets] = [volume["projected"] for volume in pod["volumes"] if "projected" in volume]
    assert pod["securityContext"]["fsGroup"] == 65532
    assert secrets["sources"][1]["secret"]["items"] == [
        {"key": "tls.crt", "path": "database-tls.crt"},
        {"key": "tls.key", "path": "database-tls.key", "mode": 0o440},
    ]


def test_alerts_and_dashboard_are_the_files_byte_for_byte(helm: Helm) -> None:
    alerts = (CHART / "files" / "alerts.yaml").read_text(encoding="utf-8")
    dashboard = (CHART / "files" / "dashboard.json").read_text(encoding="utf-8")
    values = given({"prometheusRule.enabled": True, "dashboard.enabled": True})

    rendered = helm.render("--values", MINIMAL, *values)
    assert one(rendered, "PrometheusRule")["spec"] == yaml.safe_load(alerts)
    assert one(rendered, "ConfigMap", suffix="-dashboard")["data"] == {"outbox-relay.json": dashboard}

    text = helm.template("--values", MINIMAL, *values, "--show-only", "templates/prometheusrule.yaml").stdout
    indented = text.partition("spec:\n")[2]
    assert "".join(line.removeprefix("  ") for line in indented.splitlines(keepends=True)) == alerts
