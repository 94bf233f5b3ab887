"""Write the parts of the documentation that are made from the code: python docs/generate.py."""  # noqa: INP001 -- a script beside the pages

from __future__ import annotations

import json
from pathlib import Path

from outbox_relay.config import Settings
from outbox_relay.config.kafka import DEFAULTS
from outbox_relay.config.names import env_name

CONFIGURATION = Path(__file__).parent / "configuration.md"


def configuration(page: str) -> str:
    """Return *page*, the text of `configuration.md`, with its tables renewed."""
    return _between(_between(page, "settings", _settings_table()), "librdkafka", _librdkafka_table())


def _between(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: made by docs/generate.py -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def _settings_table() -> str:
    rows = ["| Environment | Default | What it does, and what gets worse |", "|---|---|---|"]
    for name, schema in Settings.model_json_schema()["properties"].items():
        description = schema["description"].replace("\n", " ").replace("|", "\\|")
        default = schema["default"]
        shown = default if isinstance(default, str) else json.dumps(default)
        choices = f" One of {', '.join(f'`{choice}`' for choice in schema['enum'])}." if "enum" in schema else ""
        rows.append(f"| `{env_name(name)}` | {f'`{shown}`' if shown else 'empty'} | {description}{choices} |")
    return "\n".join(rows)


def _librdkafka_table() -> str:
    rows = ["| librdkafka property | Value |", "|---|---|"]
    rows += [f"| `{name}` | `{json.dumps(value)}` |" for name, value in DEFAULTS.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    CONFIGURATION.write_text(configuration(CONFIGURATION.read_text(encoding="utf-8")), encoding="utf-8")
