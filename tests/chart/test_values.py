"""What the values may be: the schema, the rules between them, and the table of the README."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
import yaml

import outbox_relay
from outbox_relay.config import Settings
from outbox_relay.config.kafka import SECRETS
from tests.fixtures.helm import CHART, MINIMAL, ROOT, given

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from tests.fixtures.helm import Helm


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The script beside the chart."""
    spec = importlib.util.spec_from_file_location("generate_chart", ROOT / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_knows_the_settings_of_today(generator: ModuleType) -> None:
    text = generator.VALUES_SCHEMA.read_text(encoding="utf-8")
    assert text == generator.values_schema(text), "run python helm/generate.py"


def test_the_table_of_the_readme_has_the_values_of_today(generator: ModuleType) -> None:
    text = generator.README.read_text(encoding="utf-8")
    assert text == generator.readme(text), "run python helm/generate.py"


def test_every_value_is_described(generator: ModuleType) -> None:
    rows = [line for line in generator.README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_schema_names_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert schema["properties"].keys() - values.keys() == {"enabled", "global"}
    assert values.keys() - schema["properties"].keys() == set()


def test_the_chart_brings_the_version_beside_it() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == outbox_relay.__version__


def test_the_example_of_the_readme_is_the_minimal_case() -> None:
    readme = (CHART / "README.md").read_text(encoding="utf-8")
    [example] = [block.partition("```")[0] for block in readme.split("```yaml\n")[1:]]
    assert yaml.safe_load(example) == yaml.safe_load(MINIMAL.read_text(encoding="utf-8"))


def refusal(helm: Helm, values: Mapping[str, object]) -> str:
    rendered = helm.template("--values", MINIMAL, *given(values))
    assert rendered.returncode == 1
    return rendered.stderr


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": 3}, "additional properties 'replicas' not allowed"),
        ({"config.lane": 3}, "at '/config': additional properties 'lane' not allowed"),
        ({"config.lanes": 17}, "at '/config/lanes': maximum: got 17, want 16"),
        ({"config.lanes": "many"}, "at '/config/lanes': got string, want integer"),
        ({"config.on_poison": "drop"}, "at '/config/on_poison': value must be one of 'park', 'skip'"),
        ({"config.schema": "My Schema"}, "at '/config/schema': 'My Schema' does not match pattern"),
        ({"config.metrics_port": 0}, "at '/config/metrics_port': minimum: got 0, want 1"),
        ({"config.database_url": "postgresql://"}, "at '/config': additional properties 'database_url' not allowed"),
        ({r"config.kafka.linger\.mss": 5}, "at '/config/kafka': additional properties 'linger.mss' not allowed"),
        ({"image.digest": "1.2.3"}, "at '/image/digest': '1.2.3' does not match pattern"),
        ({"image.pullPolicy": "Sometimes"}, "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ({"mode": "cluster"}, "at '/mode': value must be one of 'daemon', 'sidecar'"),
        ({"podLabels.tier": 1}, "at '/podLabels/tier': got number, want string"),
        ({"keda.minReplicaCount": 0}, "at '/keda/minReplicaCount': minimum: got 0, want 1"),
        ({"keda.maxReplicaCount": 17}, "at '/keda/maxReplicaCount': maximum: got 17, want 16"),
        ({"networkPolicy.kafkaPorts": []}, "at '/networkPolicy/kafkaPorts': minItems: got 0, want 1"),
        ({"extraEnv": {"A": "b"}}, "at '/extraEnv': got object, want array"),
    ],
)
def test_a_wrong_value_is_refused_by_its_path(helm: Helm, values: Mapping[str, object], words: str) -> None:
    assert words in refusal(helm, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({r"config.kafka.bootstrap\.servers": ""}, 'config.kafka."bootstrap.servers" is not set: name'),
        ({"database.existingSecret": ""}, "database.existingSecret is not set: name the Secret"),
        (
            {"terminationGracePeriodSeconds": 20},
            "terminationGracePeriodSeconds is 20 and must be above config.drain_timeout, which is 20",
        ),
        (
            {"config.drain_timeout": 40.5},
            "terminationGracePeriodSeconds is 30 and must be above config.drain_timeout, which is 40.5",
        ),
        ({"kafka.sasl.existingSecret": "k"}, "kafka.sasl is not used with the security.protocol plaintext: set config"),
        (
            {"kafka.tls.caSecret": "k", r"config.kafka.security\.protocol": "SASL_PLAINTEXT"},
            "kafka.tls is not used with the security.protocol sasl_plaintext: set config",
        ),
        ({"migrations.enabled": True}, "migrations.existingSecret is not set: name the Secret"),
        ({"migrations.inbox.enabled": True}, "migrations.inbox.existingSecret is not set: name the Secret"),
        ({"mode": "sidecar", "podMonitor.enabled": True}, "podMonitor.matchLabels is not set: with mode: sidecar name"),
        ({"serviceMonitor.enabled": True, "service.enabled": False}, "serviceMonitor.enabled needs service.enabled"),
        ({"keda.enabled": True}, "keda.prometheusAddress is not set: name the Prometheus"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_the_remedy(
    helm: Helm, values: Mapping[str, object], words: str
) -> None:
    assert words in refusal(helm, values)


def test_all_that_does_not_go_together_is_told_at_once(helm: Helm) -> None:
    told = refusal(helm, {"keda.enabled": True, "migrations.enabled": True})
    assert "keda.prometheusAddress" in told
    assert "migrations.existingSecret" in told


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_is_no_setting_for_a_configmap(helm: Helm, name: str) -> None:
    told = refusal(helm, {f"config.kafka.{name.replace('.', chr(92) + '.')}": "hunter2"})
    assert name in told
    assert "hunter2" not in told


def test_variables_may_stand_for_secret_and_brokers(helm: Helm) -> None:
    values = {
        r"config.kafka.bootstrap\.servers": "",
        "database.existingSecret": "",
        "extraEnvFrom": [{"secretRef": {"name": "all"}}],
    }
    assert helm.template("--values", MINIMAL, *given(values)).returncode == 0


def test_the_grace_period_of_the_sidecar_is_that_of_its_application(helm: Helm) -> None:
    values = {"mode": "sidecar", "terminationGracePeriodSeconds": 1}
    assert helm.template("--values", MINIMAL, *given(values)).returncode == 0


def test_every_setting_but_the_secret_one_may_be_set(generator: ModuleType) -> None:
    schema = json.loads(generator.VALUES_SCHEMA.read_text(encoding="utf-8"))
    assert schema["properties"]["config"]["properties"].keys() == Settings.fields().keys() - {"database_url"}
