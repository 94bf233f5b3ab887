"""Each set of values in ci/: helm finds no fault in it, and neither would a cluster of any supported version."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.fixtures.helm import CASES, CHART, EVERYTHING, KUBERNETES_VERSIONS, one, pod_of, problems

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fixtures.helm import Helm, Manifest

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem.removesuffix("-values"))


@each_case
def test_lint_has_no_objection(helm: Helm, case: Path) -> None:
    linted = helm.run("lint", "--strict", CHART, "--values", case)
    assert linted.returncode == 0, linted.stdout


@each_case
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_manifest_fits_the_schemas_of_kubernetes(helm: Helm, case: Path, version: str) -> None:
    rendered = helm.render("--values", case)
    found = {manifest["kind"]: problems(manifest, version=version) for manifest in rendered}
    assert {kind: faults for kind, faults in found.items() if faults} == {}


@pytest.mark.parametrize("kind", ["Deployment", "PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject"])
def test_a_field_that_a_cluster_does_not_know_is_a_problem(helm: Helm, kind: str) -> None:
    manifest = one(helm.render("--values", EVERYTHING), kind)
    manifest["spec"]["replica"] = 1
    [problem] = problems(manifest, version=KUBERNETES_VERSIONS[0])
    assert "'replica' was unexpected" in problem


def test_the_package_brings_alerts_and_dashboard_and_no_cases(helm: Helm, tmp_path: Path) -> None:
    packaged = helm.run("package", CHART, "--destination", tmp_path)
    assert packaged.returncode == 0, packaged.stderr
    [package] = tmp_path.iterdir()
    with tarfile.open(package) as archive:
        names = {name.removeprefix("outbox-relay/") for name in archive.getnames()}
    assert names >= {"files/alerts.yaml", "files/dashboard.json", "values.schema.json", "README.md"}
    assert [name for name in names if name.startswith("ci/")] == []


@each_case
def test_pods_meet_the_restricted_security_standard(helm: Helm, case: Path) -> None:
    pods = [pod["spec"] for manifest in helm.render("--values", case) if (pod := pod_of(manifest))]
    assert pods or case.stem == "sidecar-values"
    for pod in pods:
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
        [container] = pod["containers"]
        context = pod["securityContext"] | container["securityContext"]
        assert context["runAsUser"] != 0 if "runAsUser" in context else case.stem == "bare-values"
        assert (
            context.items()
            >= {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }.items()
        )


@each_case
def test_every_file_that_a_container_is_told_of_is_mounted(helm: Helm, case: Path) -> None:
    pods = [pod["spec"] for manifest in helm.render("--values", case) if (pod := pod_of(manifest))]
    for pod in pods:
        [container] = pod["containers"]
        told = {variable["value"] for variable in container["env"] if variable.get("value", "").startswith("/etc/")}
        assert told - mounted_paths(pod, container) == set()


def mounted_paths(pod: Manifest, container: Manifest) -> set[str]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    paths = set()
    for mount in container["volumeMounts"]:
        volume, directory = volumes[mount["name"]], mount["mountPath"]
        items = [
            item for source in volume.get("projected", {}).get("sources", []) for item in source["secret"]["items"]
        ]
        paths |= {directory, f"{directory}/relay.toml"} | {f"{directory}/{item['path']}" for item in items}
    return paths
