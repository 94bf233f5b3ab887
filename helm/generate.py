"""Write what the chart takes from the code and from its values: python helm/generate.py."""  # noqa: INP001 -- a script beside the chart

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from outbox_relay.config import Settings
from outbox_relay.config.kafka import kinds

CHART = Path(__file__).parent / "outbox-relay"
VALUES_SCHEMA = CHART / "values.schema.json"
README = CHART / "README.md"

_COMMENT = re.compile(r" *# ?(.*)")
_KEY = re.compile(r"( *)([\w.]+):")
_LIMITS = {"ge": "minimum", "le": "maximum"}
_BEGIN, _END = "<!-- values: made by helm/generate.py -->", "<!-- end of values -->"


def values_schema(text: str) -> str:
    """Return *text*, the schema of the values, with the settings of the relay renewed."""
    schema = json.loads(text)
    schema["properties"]["config"] = _settings_schema()
    return json.dumps(schema, indent=2) + "\n"


def readme(text: str) -> str:
    """Return *text*, the chart's README, with its table of values renewed."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{_values_table()}\n{_END}{after}"


def _settings_schema() -> dict[str, object]:
    properties = Settings.model_json_schema()["properties"]
    del properties["database_url"]  # a secret
    for schema in properties.values():
        del schema["title"], schema["default"]
        schema["description"] = schema["description"].replace("\n", " ")
        # What pydantic checks after a conversion it writes by its own names.
        schema |= {name: schema.pop(limit) for limit, name in _LIMITS.items() if limit in schema}
    properties["retention"]["type"] = ["number", "string"]  # such as 36h
    properties["kafka"] = {
        "type": "object",
        "description": "Properties of librdkafka under their own names, such as `linger.ms`.",
        "additionalProperties": False,
        "properties": {name: {"$ref": "#/definitions/librdkafka"} for name in sorted(kinds())},
    }
    properties["metrics_port"]["minimum"] = 1  # the probes ask there
    required = ["kafka", "metrics_port", "drain_timeout"]
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _values_table() -> str:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    described = _descriptions(text)
    rows = ["| Value | Default | What it is |", "|---|---|---|"]
    for path, default in _leaves(yaml.safe_load(text), described=described):
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {described.get(path, '')} |")
    return "\n".join(rows)


def _leaves(values: dict[str, object], *, described: dict[str, str], parent: str = "") -> list[tuple[str, object]]:
    """Return the values that a row is for: those with a description, and below the others each that is no map."""
    leaves: list[tuple[str, object]] = []
    for name, value in values.items():
        path = f"{parent}{name}"
        if isinstance(value, dict) and path not in described:
            leaves += _leaves(value, described=described, parent=f"{path}.")
        else:
            leaves.append((path, value))
    return leaves


def _descriptions(text: str) -> dict[str, str]:
    """Return the comment that begins with `# --` above each value, by the path of the value."""
    descriptions: dict[str, str] = {}
    above: list[str] = []
    parents: list[str] = []
    for line in text.splitlines():
        if comment := _COMMENT.match(line):
            above.append(comment[1])
        elif key := _KEY.match(line):
            parents[len(key[1]) // 2 :] = [key[2]]
            description = " ".join(above)
            if description.startswith("-- "):
                descriptions[".".join(parents)] = description.removeprefix("-- ")
            above = []
    return descriptions


if __name__ == "__main__":
    VALUES_SCHEMA.write_text(values_schema(VALUES_SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
